"""Who asks, and whether he may."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.support.fake_kube.errors import ApiError
from tests.support.fake_kube.store import Store


@dataclass(frozen=True, slots=True)
class Request:
    """What somebody wants to do. `resource`: e.g. deployments/scale."""

    verb: str
    group: str
    resource: str
    namespace: str
    name: str


class Guard:
    """Knows callers by their tokens, and what the roles of the store allow them."""

    def __init__(self, store: Store, admin_token: str) -> None:
        self._store = store
        self._users = {admin_token: "system:admin"}

    def issue(self, namespace: str, name: str) -> str:
        """Make a token of a service account."""
        token = secrets.token_hex(16)
        self._users[token] = f"system:serviceaccount:{namespace}:{name}"
        return token

    def authenticate(self, header: str) -> str:
        """Return the user. Raises ApiError for a token that is none."""
        kind, _, token = header.partition(" ")
        user = self._users.get(token)
        if kind.lower() != "bearer" or user is None:
            raise ApiError(401, "Unauthorized", "Unauthorized")
        return user

    def authorize(self, user: str, request: Request) -> None:
        """Raise ApiError when no role of the user allows it."""
        if user == "system:admin" or any(_allows(rule, request) for rule in self._rules(user, request.namespace)):
            return
        where = f'in the namespace "{request.namespace}"' if request.namespace else "at the cluster scope"
        what = f'cannot {request.verb} resource "{request.resource}" in API group "{request.group}" {where}'
        raise ApiError(403, "Forbidden", f'{request.resource} "{request.name}" is forbidden: User "{user}" {what}')

    def _rules(self, user: str, namespace: str) -> Iterator[dict[str, Any]]:
        for binding in self._store.list("ClusterRoleBinding"):
            yield from self._bound(binding, user, "")
        for binding in self._store.list("RoleBinding", namespace) if namespace else ():
            yield from self._bound(binding, user, namespace)

    def _bound(self, binding: dict[str, Any], user: str, namespace: str) -> Iterator[dict[str, Any]]:
        if not any(_user_of(subject, namespace) == user for subject in binding.get("subjects") or ()):
            return
        reference = binding["roleRef"]
        home = namespace if reference["kind"] == "Role" else ""
        role = self._store.get(reference["kind"], home, reference["name"])
        yield from (role or {}).get("rules") or ()


def _user_of(subject: dict[str, Any], namespace: str) -> str:
    if subject["kind"] == "ServiceAccount":
        return f"system:serviceaccount:{subject.get('namespace', namespace)}:{subject['name']}"
    return str(subject["name"])


def _allows(rule: dict[str, Any], request: Request) -> bool:
    names = rule.get("resourceNames")
    return (
        _has(rule["verbs"], request.verb)
        and _has(rule.get("apiGroups", ()), request.group)
        and _has(rule.get("resources", ()), request.resource)
        and (not names or request.name in names)
    )


def _has(allowed: Any, value: str) -> bool:
    return "*" in allowed or value in allowed
