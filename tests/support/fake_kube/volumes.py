"""A pod's volumes as directories of this machine."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

from tests.support.fake_kube.environment import ConfigMissing, data_of, field
from tests.support.fake_kube.store import Object, Store

Files = dict[str, tuple[bytes, int]]


class Volumes:
    """The volumes of one pod below `directory`; claims live in `claims` and stay when the pod goes."""

    def __init__(self, store: Store, pod: Object, directory: Path, claims: Path) -> None:
        self._store = store
        self._pod = pod
        self._directory = directory
        self._claims = claims
        self._group = (pod["spec"].get("securityContext") or {}).get("fsGroup")

    def make(self) -> None:
        """Make or update all volumes. Raises ConfigMissing."""
        for volume in self._pod["spec"].get("volumes") or ():
            self._make(volume)

    def remove(self) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)

    def path(self, name: str) -> Path:
        """Where the volume of this name lies."""
        volume = next(v for v in self._pod["spec"]["volumes"] if v["name"] == name)
        if "hostPath" in volume:
            return Path(volume["hostPath"]["path"])
        if "persistentVolumeClaim" in volume:
            namespace = self._pod["metadata"]["namespace"]
            return self._claims / namespace / volume["persistentVolumeClaim"]["claimName"]
        return self._directory / name

    def _make(self, volume: dict[str, Any]) -> None:  # noqa: C901  -- a table
        path = self.path(volume["name"])
        match volume:
            case {"emptyDir": _}:
                self._make_directory(path, 0o777)
            case {"persistentVolumeClaim": {"claimName": claim}}:
                if self._store.get("PersistentVolumeClaim", self._pod["metadata"]["namespace"], claim) is None:
                    raise ConfigMissing(f'persistentvolumeclaim "{claim}" not found')
                self._make_directory(path, 0o755)
            case {"hostPath": source}:
                if source.get("type") == "DirectoryOrCreate":
                    path.mkdir(parents=True, exist_ok=True)
                elif not path.exists():
                    raise ConfigMissing(f"hostPath {path} does not exist")
            case {"secret": source}:
                self._publish(path, self._secret(source), source.get("defaultMode", 0o644))
            case {"configMap": source}:
                self._publish(path, self._data("ConfigMap", source["name"], source), source.get("defaultMode", 0o644))
            case {"projected": source}:
                files = {name: f for part in source["sources"] for name, f in self._projected(part).items()}
                self._publish(path, files, source.get("defaultMode", 0o644))
            case {"downwardAPI": source}:
                self._publish(path, self._downward(source), source.get("defaultMode", 0o644))
            case _:
                raise ConfigMissing(f"no such volume: {volume}")

    def _make_directory(self, path: Path, mode: int) -> None:
        """Make a directory as kubelets do: with a group of the pod's, if it names one."""
        path.mkdir(parents=True, exist_ok=True)
        if self._group is not None:
            os.chown(path, -1, self._group)
            mode |= 0o2070
        path.chmod(mode)

    def _secret(self, source: dict[str, Any]) -> Files:
        return self._data("Secret", source["secretName"], source)

    def _data(self, kind: str, name: str, source: dict[str, Any]) -> Files:
        try:
            data = data_of(self._store, kind, self._pod["metadata"]["namespace"], name)
        except ConfigMissing:
            if source.get("optional"):
                return {}
            raise
        items = source.get("items") or [{"key": key, "path": key} for key in data]
        if missing := [item["key"] for item in items if item["key"] not in data]:
            raise ConfigMissing(f"no keys {missing} in {kind.lower()} {name!r}")
        return {item["path"]: (data[item["key"]], item.get("mode", 0)) for item in items}

    def _projected(self, source: dict[str, Any]) -> Files:
        match source:
            case {"secret": inner}:
                return self._data("Secret", inner["name"], inner)
            case {"configMap": inner}:
                return self._data("ConfigMap", inner["name"], inner)
            case {"downwardAPI": inner}:
                return self._downward(inner)
            case _:
                raise ConfigMissing(f"no such source: {source}")

    def _downward(self, source: dict[str, Any]) -> Files:
        items = source.get("items") or ()
        return {item["path"]: (field(self._pod, item["fieldRef"]["fieldPath"]).encode(), 0) for item in items}

    def _publish(self, path: Path, files: Files, mode: int) -> None:
        """Put all files in place at once: readers go through a link, which is changed in one step."""
        path.mkdir(parents=True, exist_ok=True)
        current = path / "..data"
        if current.exists() and {f.name: f.read_bytes() for f in current.iterdir()} == _contents(files):
            return
        version = path / f"..{time.time_ns()}"
        version.mkdir()
        for name, (content, own_mode) in files.items():
            self._write(version / name, content, own_mode or mode)
        old = current.resolve() if current.exists() else None
        _link(Path(version.name), current)
        for name in files:
            _link(Path("..data") / name, path / name)
        if old is not None:
            shutil.rmtree(old)

    def _write(self, path: Path, content: bytes, mode: int) -> None:
        path.write_bytes(content)
        if self._group is not None:
            os.chown(path, -1, self._group)
            mode |= 0o440
        path.chmod(mode)


def _contents(files: Files) -> dict[str, bytes]:
    return {name: content for name, (content, _) in files.items()}


def _link(target: Path, link: Path) -> None:
    temporary = link.with_name(f"{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)
