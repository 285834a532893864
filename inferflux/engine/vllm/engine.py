"""VllmEngine: the engine contract on vLLM's application, client and connector."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from typing import TYPE_CHECKING, Any

from inferflux.engine.base import Adapter, Engine, EngineInfo, EngineLoad, KvSource, Prefilled
from inferflux.engine.options import auto_dtype
from inferflux.engine.prefix import Prefixes
from inferflux.engine.reference import load as load_reference
from inferflux.engine.reference import load_embedding
from inferflux.engine.resume import Withheld
from inferflux.engine.vllm import transfer
from inferflux.engine.vllm.arguments import server_arguments, set_environment
from inferflux.engine.vllm.transfer import ExpertReport, Report
from inferflux.errors import (
    ConfigError,
    Conflict,
    EngineFailed,
    Internal,
    InvalidRequest,
    NumericsMismatch,
    Unavailable,
    WorkerLost,
)
from inferflux.telemetry import metrics
from inferflux.types import End, ErrorDetail, Frame, HttpAnswer, KvReport, ModelFingerprint, RequestContext, Role

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from inferflux.engine.options import EngineOptions
    from inferflux.engine.vllm.grammars import Grammars
    from inferflux.engine.vllm.llm import DecodePhase, TicketLLM
    from inferflux.engine.vllm.pooling import PoolingPhase
    from inferflux.kv.arena import Arena
    from inferflux.kv.prefixes import PrefixStore
    from inferflux.types import Delivered, HttpCall


class VllmEngine(Engine):
    """One vLLM engine core (a forked child) and the application around it."""

    def __init__(self, options: EngineOptions, arena: Arena | None, store: PrefixStore | None = None) -> None:
        if options.model_dir is None:
            raise ConfigError("model_dir: the vllm engine needs the model's directory, got none")
        if arena is not None and options.parallelism.data > 1:
            raise ConfigError(
                f"data_parallel: {options.parallelism.data} replicas can't share a prefill worker's arena"
            )
        self._options = options
        self._arena = arena
        self._store = store
        self._prefixes: Prefixes | None = None
        self._is_pooling = options.role is Role.POOLING
        self._dtype = self._auto_dtype() if options.dtype == "auto" else options.dtype
        self._tasks: tuple[Any, ...] = ()
        self._reports = ReportPipe()
        self._meter = StepMeter()
        self._loras: dict[tuple[str, str], Any] = {}
        self._num_loras = 0
        self._started: TicketLLM | None = None
        self._grammars: Grammars | None = None
        self._app: Any = None

    async def start(self) -> EngineInfo:
        """Fork the engine core and build the application. Call before any thread or gRPC object exists."""
        set_environment(self._options)
        from vllm.engine.arg_utils import AsyncEngineArgs  # noqa: PLC0415

        from inferflux.engine.vllm import plugin  # noqa: PLC0415
        from inferflux.engine.vllm.grammars import Grammars  # noqa: PLC0415
        from inferflux.engine.vllm.llm import TicketLLM  # noqa: PLC0415

        plugin.register()
        plugin.fork_engine(self._options.cpu_cores, self._options.threads, self._options.parallelism.num_ranks)
        if self._options.model_dir is not None:
            self._grammars = Grammars(self._options.model_dir, self._options.grammar_limits)
        arena_fd = self._arena.fd if self._arena is not None else None
        args = server_arguments(self._options, self._dtype, arena_fd, self._reports.write_fd)
        engine_args = AsyncEngineArgs.from_cli_args(args)
        self._started = TicketLLM.from_engine_args(engine_args, stat_loggers=[self._meter.logger()])
        self._started.grammars = self._grammars
        await self._build_app(args)
        if self._arena is not None:
            self._prefixes = Prefixes(self._arena, self._store, self._fingerprint())
        self._reports.listen()
        return self._info()

    def _auto_dtype(self) -> str:
        # Vectors are kept and compared for years: they get the precision that their model was published in.
        return "float32" if self._is_pooling else auto_dtype()

    @property
    def _llm(self) -> TicketLLM:
        if self._started is None:
            raise Unavailable(f"the engine of model {self._options.model} is not running")
        return self._started

    async def _build_app(self, args: Any) -> None:
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state  # noqa: PLC0415
        from vllm.entrypoints.launchers.app import build_app  # noqa: PLC0415

        from inferflux.engine.vllm import vision  # noqa: PLC0415
        from inferflux.engine.vllm.identity import derive_from_requests  # noqa: PLC0415

        self._tasks = tasks = await self._llm.get_supported_tasks()
        self._app = build_app(args, tasks, self._llm.model_config)
        await init_app_state(self._llm, self._app.state, args, tasks)
        derive_from_requests()
        vision.time_preprocessing(self._llm, self._options.role)

    def _info(self) -> EngineInfo:
        config = self._llm.vllm_config
        self._meter.num_blocks = config.cache_config.num_gpu_blocks or 0
        return EngineInfo(
            name="vllm",
            model=self._options.model,
            fingerprint=self._fingerprint(),
            max_model_len=config.model_config.max_model_len,
            max_num_seqs=config.scheduler_config.max_num_seqs,
            slot_bytes=self._arena.slot_bytes if self._arena is not None else 0,
            capabilities=self._capabilities(),
        )

    def _capabilities(self) -> tuple[str, ...]:
        from inferflux.engine.vllm import pooling, vision  # noqa: PLC0415

        if self._is_pooling:
            return pooling.capabilities(self._tasks, self._llm.vllm_config.model_config)
        able = ("chat", "completion", "responses", "messages", "tools", "json_schema", "logprobs")
        return (*able, "vision") if vision.can_see(self._llm) else able

    def _fingerprint(self) -> ModelFingerprint:
        import vllm  # noqa: PLC0415

        config = self._llm.vllm_config
        return ModelFingerprint(
            weights_digest=self._options.model_digest,
            dtype=self._dtype,
            layout=f"vllm-{vllm.__version__}/{'pooling' if self._is_pooling else _packing(config) + '/layer-head'}",
            block_size=config.cache_config.block_size or 0,
        )

    async def check_numerics(self) -> None:
        """Compare with the reference file. Without one the engine's word is not taken."""
        from inferflux.engine.vllm import numerics  # noqa: PLC0415

        if self._options.numerics_reference is None:
            raise NumericsMismatch(f"numerics: no reference for model {self._options.model}; make one with inferctl")
        path = self._options.numerics_reference
        if self._is_pooling:
            await numerics.check_embedding(self._llm, load_embedding(path), self._dtype)
        else:
            await numerics.check(self._llm, load_reference(path), self._dtype)

    async def prefill(self, context: RequestContext, call: HttpCall) -> Prefilled | HttpAnswer:
        """See Engine.prefill. The application's answer counts only if it never got as far as the engine."""
        from inferflux.engine.vllm.application import answer  # noqa: PLC0415
        from inferflux.engine.vllm.llm import PHASE, PrefillPhase  # noqa: PLC0415

        phase = PrefillPhase(context.cache_salt, context.priority, self._prefixes)
        phase.adapter, phase.lora = context.adapter, self._lora(context)
        PHASE.set(phase)
        start, response = time.monotonic(), None
        try:
            # One token is not always what the application can format (tool calls, documents): its complaint is void.
            with contextlib.suppress(Exception):
                response = await answer(self._app, call, context.request_id)
            self._raise_if_dead()
        except BaseException:
            phase.give_up()
            raise
        finally:
            phase.close()
        if phase.prompts:
            return Prefilled(tuple(phase.prompts), time.monotonic() - start)
        if phase.refusal is not None:
            raise phase.refusal
        if response is None:
            raise Internal("the application failed before it asked for a prompt")
        return response

    async def generate(
        self,
        context: RequestContext,
        call: HttpCall,
        sources: Sequence[KvSource] = (),
        delivered: Delivered | None = None,
    ) -> AsyncGenerator[Frame]:
        """See Engine.generate."""
        from inferflux.engine.vllm.application import Exchange  # noqa: PLC0415
        from inferflux.engine.vllm.identity import IDENTITY, Identity  # noqa: PLC0415
        from inferflux.engine.vllm.llm import PHASE, DecodePhase  # noqa: PLC0415
        from inferflux.engine.vllm.pooling import PoolingPhase  # noqa: PLC0415
        from inferflux.engine.vllm.shape import shaped  # noqa: PLC0415

        phase: DecodePhase | PoolingPhase
        if self._is_pooling:
            phase = PoolingPhase(context.cache_salt, context.priority)
        else:
            phase = DecodePhase(context.cache_salt, context.priority, sources, delivered, call.path)
            phase.adapter, phase.lora = context.adapter, self._lora(context)
        PHASE.set(phase)
        IDENTITY.set(Identity(context.request_id, context.created_s))
        exchange = Exchange(self._app, call, context.request_id, phase.take_tokens)
        withheld = Withheld(delivered.num_events if delivered else 0)
        with self._reports.watch(sources, phase.num_loads, exchange.wake) as reports:
            phase.report = reports.put
            async with contextlib.aclosing(exchange.messages()) as messages:
                async for message in messages:
                    if phase.refusal is not None:
                        raise phase.refusal
                    if self._llm.errored:
                        break  # what the application says of it is no part of a response that goes on elsewhere
                    if exchange.is_json and message.get("body"):
                        message["body"] = shaped(message["body"])
                    frame = _frame(message, reports.take())
                    if frame is not None and (told := withheld.remainder(frame)) is not None:
                        yield told
            yield Frame(kv=reports.rest(), choices=phase.take_tokens(), end=self._end(phase))

    def _end(self, phase: DecodePhase | PoolingPhase) -> End:
        error = None
        if self._llm.errored:
            error = ErrorDetail.of(WorkerLost("the worker's engine died"))
        elif phase.has_failed:
            error = ErrorDetail.of(EngineFailed("the engine could not finish the request"))
        return End(phase.finish_reason, phase.usage, error)

    def _raise_if_dead(self) -> None:
        if self._llm.errored:
            raise WorkerLost("the worker's engine died")

    async def load_adapter(self, adapter: Adapter) -> None:
        """See Engine.load_adapter. Each version has a name of its own in vLLM, which tells adapters apart by it."""
        from vllm.lora.request import LoRARequest  # noqa: PLC0415

        limit = 2 * self._options.max_adapters  # each may be there twice while it is changed
        if len(self._loras) >= limit:
            raise Conflict(f"the engine holds {len(self._loras)} versions of adapters, at most {limit}")
        self._num_loras += 1
        path = str(adapter.folder)
        lora = LoRARequest(f"{adapter.name}@{adapter.digest[:16]}", self._num_loras, path)
        try:
            await self._llm.add_lora(lora)
            if adapter.is_pinned:
                await self._llm.pin_lora(lora.lora_int_id)
        except Exception as e:
            self._raise_if_dead()
            raise InvalidRequest(f"adapter {adapter.name} does not fit: {str(e)[:300]}", param="adapter") from e
        self._loras[adapter.name, adapter.digest] = lora
        self._served_adapters()[adapter.name] = LoRARequest(adapter.name, lora.lora_int_id, path)

    async def drop_adapter(self, adapter: Adapter, *, is_last: bool) -> None:
        """See Engine.drop_adapter."""
        if is_last:
            self._served_adapters().pop(adapter.name, None)
        if (lora := self._loras.pop((adapter.name, adapter.digest), None)) is not None:
            await self._llm.remove_lora(lora.lora_int_id)

    def _served_adapters(self) -> dict[str, Any]:
        """What the application takes for a model's name besides the model's own."""
        served: dict[str, Any] = self._app.state.openai_serving_models.lora_requests
        return served

    def _lora(self, context: RequestContext) -> Any:
        """The version with which a request begins; None without an adapter."""
        if not context.adapter:
            return None
        lora = self._loras.get((context.adapter, context.adapter_digest))
        if lora is None:
            raise Unavailable(f"adapter {context.adapter!r} is not in this engine", retry_after_s=1)
        return lora

    def load(self) -> EngineLoad:
        """See Engine.load; numbers are those of the last step, what the engine was given since counts as waiting."""
        if self._started is None:
            return self._meter.load(0, is_alive=False)
        return self._meter.load(self._started.get_num_unfinished_requests(), is_alive=not self._started.errored)

    async def close(self) -> None:
        """See Engine.close."""
        if self._started is not None:
            self._started.shutdown()
            self._started = None
        if self._grammars is not None:
            self._grammars.close()
        self._reports.close()


def _packing(config: Any) -> str:
    """What the bytes of a block depend on besides shape and type: the instruction set on CPU, the device elsewhere."""
    from vllm.platforms import current_platform  # noqa: PLC0415

    if not current_platform.is_cpu():
        return str(current_platform.get_device_name())
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa  # noqa: PLC0415

    model, block_size = config.model_config, config.cache_config.block_size
    isa = _get_attn_isa(model.dtype, block_size, model.get_head_size())
    return f"{current_platform.get_cpu_architecture().name.lower()}-{isa}"


def _frame(message: Any, kv: tuple[KvReport, ...]) -> Frame | None:
    """One ASGI message with the sideband that belongs to it; None when there is nothing to say."""
    from inferflux.engine.vllm.application import CHOICES, response_head  # noqa: PLC0415

    if message["type"] == "http.response.start":
        return Frame(head=response_head(message), kv=kv)
    data = message.get("body", b"")
    if data:
        return Frame(data=data, choices=message[CHOICES], kv=kv)
    return Frame(kv=kv) if kv else None


class ReportPipe:
    """Transfer reports from the engine core, handed to the request that waits for them."""

    def __init__(self) -> None:
        self._read_fd, self.write_fd = os.pipe()
        os.set_inheritable(self.write_fd, True)
        os.set_blocking(self._read_fd, False)
        self._buffer = b""
        self._inboxes: dict[str, Inbox] = {}
        self._is_listening = False

    def listen(self) -> None:
        """Start delivering on the running loop."""
        asyncio.get_running_loop().add_reader(self._read_fd, self._deliver)
        self._is_listening = True

    def _deliver(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._buffer += os.read(self._read_fd, 65536)
        *lines, self._buffer = self._buffer.split(b"\n")
        for report in map(transfer.parse, lines):
            if isinstance(report, ExpertReport):
                _count_tokens(report)
            elif inbox := self._inboxes.get(report.ticket_id):
                inbox.put(report)

    @contextlib.contextmanager
    def watch(self, sources: Sequence[KvSource], num_loads: dict[str, int], wake: Any) -> Any:
        """Collect the reports of one request's sources. `num_loads`: how many each will have (choices), live."""
        inbox = Inbox(sources, num_loads, wake)
        self._inboxes.update(dict.fromkeys((s.ticket_id for s in sources), inbox))
        try:
            yield inbox
        finally:
            for source in sources:
                self._inboxes.pop(source.ticket_id, None)

    def close(self) -> None:
        if self._is_listening:
            asyncio.get_running_loop().remove_reader(self._read_fd)
            self._is_listening = False
            os.close(self._read_fd)
            os.close(self.write_fd)


def _count_tokens(report: ExpertReport) -> None:
    for expert, num_tokens in enumerate(report.expert_tokens, report.first):
        metrics.EXPERT_TOKENS.labels(str(expert)).inc(num_tokens)


class Inbox:
    """Reports of one request: one per ticket goes out, when all its choices have loaded."""

    def __init__(self, sources: Sequence[KvSource], num_loads: dict[str, int], wake: Any) -> None:
        self._open: dict[str, list[Report]] = {source.ticket_id: [] for source in sources}
        self._num_loads = num_loads
        self._wake = wake
        self._done: list[KvReport] = []

    def put(self, report: Report) -> None:
        reports = self._open.get(report.ticket_id)
        if reports is None:
            return
        reports.append(report)
        if len(reports) >= self._num_loads.get(report.ticket_id, 1):
            del self._open[report.ticket_id]
            self._done.append(_merge(reports))
            self._wake()

    def take(self) -> tuple[KvReport, ...]:
        """Reports that are complete."""
        done, self._done = tuple(self._done), []
        return done

    def rest(self) -> tuple[KvReport, ...]:
        """All that is left at the end: tickets nobody asked for count as unneeded."""
        rest = [_merge(reports) if reports else KvReport(ticket, "unneeded") for ticket, reports in self._open.items()]
        self._open.clear()
        return self.take() + tuple(rest)


def _merge(reports: list[Report]) -> KvReport:
    report = Report.merge(reports)
    return KvReport(report.ticket_id, report.result, report.reason, report.num_bytes, report.transfer_s)


class StepMeter:
    """vLLM's statistics, as far as a pulse needs them; of all replicas together."""

    def __init__(self) -> None:
        self.num_blocks = 0
        self._step = 0
        self._num_running: dict[int, int] = {}
        self._usage: dict[int, float] = {}

    def logger(self) -> Any:
        """A stat logger factory for AsyncLLM."""
        from vllm.v1.metrics.loggers import StatLoggerBase  # noqa: PLC0415

        meter = self

        class Logger(StatLoggerBase):
            def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
                self._index = engine_index

            def record(self, scheduler_stats: Any, *args: Any, **kwargs: Any) -> None:
                if scheduler_stats is not None:
                    meter.record(self._index, scheduler_stats)

            def log_engine_initialized(self) -> None: ...

        return Logger

    def record(self, replica: int, stats: Any) -> None:
        """Called by vLLM after each step of an engine."""
        self._step += 1
        self._num_running[replica] = stats.num_running_reqs
        self._usage[replica] = stats.kv_cache_usage

    def load(self, num_unfinished: int, *, is_alive: bool) -> EngineLoad:
        """The last steps' numbers. `num_unfinished`: requests that the engine owes an answer, seen from outside."""
        num_running = min(sum(self._num_running.values()), num_unfinished)
        num_waiting = num_unfinished - num_running
        usage = sum(self._usage.values()) / max(len(self._usage), 1)
        num_free = round(self.num_blocks * (1 - usage))
        return EngineLoad(self._step, num_running, num_waiting, 0, num_free, self.num_blocks, is_alive=is_alive)
