"""How every service starts, stops and owns its background tasks.

`run` is the whole life of a process: logs and name first, then `prepare` (heavy synchronous set-up that may fork; no
loop, no thread and no gRPC exist yet), then the event loop with the ops server and `main`. The first SIGTERM or SIGINT
begins the drain, the second one exits at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Protocol, Self

import uvloop

from inferflux.clock import until_tick
from inferflux.errors import ConfigError, InferfluxError
from inferflux.lifecycle import Lifecycle
from inferflux.ops import OpsServer
from inferflux.telemetry import logs, metrics, tracing
from inferflux.types import State

LAG_INTERVAL_S = 0.5
LAG_WARNING_S = 0.5
EXIT_OK, EXIT_FAILED, EXIT_CONFIG = 0, 1, 2
_PR_SET_PDEATHSIG = 1
_log = logging.getLogger(__name__)


class RunSettings(Protocol):
    """The settings that `run` needs; CommonSettings has them."""

    @property
    def ops_address(self) -> str: ...
    @property
    def ops_token(self) -> str: ...
    @property
    def log_level(self) -> str: ...


def run(
    role: str,
    instance_id: str,
    settings: RunSettings,
    main: Callable[[Lifecycle], Awaitable[None]],
    *,
    prepare: Callable[[], None] | None = None,
) -> int:
    """Run a service until it is drained and return its exit code: 0 drained, 1 failed, 2 bad configuration.

    `main` serves until `lifecycle.draining` is set, finishes what runs and returns; it is cancelled when a signal
    arrives before it called `set_ready`. A signal during `prepare` kills at once: there is nothing to drain yet.
    """
    logs.setup(role, instance_id, settings.log_level)
    _set_name(instance_id)
    _follow_parent()
    lifecycle = Lifecycle(role, instance_id)
    try:
        tracing.setup(role, instance_id, os.environ)
        if prepare is not None:
            prepare()
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(lifecycle, settings, main))
    except ConfigError as e:
        _log.error("bad configuration", extra={"reason": e.message})
        return EXIT_CONFIG
    except Exception:  # noqa: BLE001  -- the last one who can say why
        _log.exception("process failed")
        return EXIT_FAILED
    finally:
        tracing.shutdown()
    return EXIT_OK


def fail(role: str, error: ConfigError) -> int:
    """Report a configuration that could not even be loaded; returns the exit code."""
    logs.setup(role, "", "INFO")
    _log.error("bad configuration", extra={"reason": error.message})
    return EXIT_CONFIG


class TaskEnded(InferfluxError):
    """A background task returned though it should run until the process drains."""


class Tasks:
    """Background tasks owned by an `async with` block, which they cannot outlive.

    A task that raises, or that returns though it should not, cancels the block and its exception leaves it. When the
    block ends the tasks are cancelled and awaited.
    """

    def __init__(self) -> None:
        self._group = asyncio.TaskGroup()
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, coro: Coroutine[Any, Any, Any], name: str, *, may_return: bool = False) -> asyncio.Task[None]:
        """Start `coro`. `may_return`: it does a finite piece of work, e.g. one request."""
        task = self._group.create_task(_guard(coro, name, may_return=may_return), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: coro.close())  # cancelled before it began: never awaited
        return task

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in tuple(self._tasks):
            task.cancel()
        try:
            await self._group.__aexit__(kind, error, trace)
        except BaseExceptionGroup as group:
            raise _unwrap(group) from group


async def _guard(coro: Coroutine[Any, Any, Any], name: str, *, may_return: bool) -> None:
    await coro
    if not may_return:
        raise TaskEnded(f"background task {name} ended")


def _unwrap(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Prefer a lone exception: it is worth more to the caller than a group of one."""
    return group.exceptions[0] if len(group.exceptions) == 1 else group


async def _serve(lifecycle: Lifecycle, settings: RunSettings, main: Callable[[Lifecycle], Awaitable[None]]) -> None:
    ops = OpsServer(settings.ops_address, lifecycle, metrics.render, settings.ops_token)
    address = await ops.start()
    _log.info("started", extra={"incarnation": lifecycle.incarnation, "ops_address": address, "pid": os.getpid()})
    try:
        async with Tasks() as tasks:
            tasks.spawn(_watch_lag(), "loop-lag")
            await _until_drained(lifecycle, main)
    finally:
        await ops.close()
    _log.info("stopped")


async def _until_drained(lifecycle: Lifecycle, main: Callable[[Lifecycle], Awaitable[None]]) -> None:
    task = asyncio.ensure_future(main(lifecycle))
    _handle_signals(lifecycle, task)
    try:
        await task
    except asyncio.CancelledError:
        if not (task.cancelled() and lifecycle.draining.is_set()):
            task.cancel()
            raise
    if not lifecycle.draining.is_set():
        raise TaskEnded("main returned without being drained")


def _handle_signals(lifecycle: Lifecycle, task: asyncio.Future[None]) -> None:
    def on_signal(number: int) -> None:
        if lifecycle.draining.is_set():
            _exit_now(number)
        was_starting = lifecycle.state is State.STARTING
        lifecycle.begin_drain()
        if was_starting:
            task.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)


def _exit_now(number: int) -> NoReturn:
    _log.warning("second signal: exit without draining")
    os._exit(128 + number)


async def _watch_lag() -> None:
    """Measure how late the loop runs a timer: everything this process serves was late by as much."""
    loop = asyncio.get_running_loop()
    while True:
        span_s = until_tick(LAG_INTERVAL_S)
        due_at = loop.time() + span_s
        await asyncio.sleep(span_s)
        lag_s = max(0.0, loop.time() - due_at)
        metrics.LOOP_LAG.observe(lag_s)
        if lag_s > LAG_WARNING_S:
            _log.warning("event loop was blocked", extra={"lag_s": round(lag_s, 3)})


def _set_name(instance_id: str) -> None:
    """Show up as ifx-<instance_id> in ps and top; the kernel keeps 15 bytes."""
    with suppress(OSError):
        Path("/proc/self/comm").write_text(f"ifx-{instance_id}"[:15], encoding="utf-8")


def _follow_parent() -> None:
    """Die with the parent if asked to; by default a service outlives a supervisor that crashed."""
    if os.environ.get("INFERFLUX_PDEATHSIG") == "1":
        import ctypes  # noqa: PLC0415  -- only where it is asked for

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
