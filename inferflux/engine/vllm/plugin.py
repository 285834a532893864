"""Small corrections to vLLM, loaded in each of its processes (entry point `vllm.general_plugins`).

Each is idempotent and guarded by the contract suite: when vLLM changes underneath, a test fails, not a user.
"""

from __future__ import annotations

import ctypes
import dataclasses
import logging
import multiprocessing
import os
import signal
from contextlib import contextmanager
from multiprocessing.context import ForkContext, ForkProcess
from typing import TYPE_CHECKING, Any

import torch

from inferflux.engine.vllm.transfer import DELIVERED

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

PR_SET_PDEATHSIG = 1
CORE = "EngineCore"


def register() -> None:
    """Entry point: runs in the worker, in the engine core and in each rank."""
    die_with_parent()
    count_delivered_tokens_as_output()
    advance_grammars()
    spare_generators_of_discarded_tokens()
    share_the_only_group()
    correct_ranks_on_cpus()
    die_with_the_input_thread()


def die_with_parent() -> None:
    """Ask the kernel to kill this child with its parent: vLLM leaves orphans when its frontend is killed."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent.pid:  # it died before prctl took effect
        os.kill(os.getpid(), signal.SIGKILL)


def die_with_the_input_thread() -> None:
    """End an engine core whose input thread has died of a request that it can't read.

    vLLM's core lives on without it and never hears anything again; the frontend notices only the death of a process.
    """
    from vllm.v1.engine.core import EngineCoreProc  # noqa: PLC0415

    process_input = EngineCoreProc.process_input_sockets
    if getattr(process_input, "_inferflux", False):
        return

    def process_input_or_die(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            process_input(self, *args, **kwargs)
        except Exception:
            logging.getLogger(__name__).exception("the engine core can't read its input any more")
            os._exit(os.EX_SOFTWARE)

    process_input_or_die._inferflux = True  # type: ignore[attr-defined]  # noqa: SLF001
    EngineCoreProc.process_input_sockets = process_input_or_die


def count_delivered_tokens_as_output() -> None:
    """Let a request start with tokens that another worker has sampled.

    They belong to the output (limits, penalties, stop conditions count them) though this engine did not sample them;
    the scheduler computes their KV like that of a request resumed after preemption.
    """
    from vllm.v1 import request  # noqa: PLC0415
    from vllm.v1.worker import gpu_model_runner  # noqa: PLC0415

    if getattr(request.Request, "_inferflux", False):
        return
    init = request.Request.__init__

    def init_with_delivered(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if delivered := delivered_tokens(self.sampling_params):
            self.append_output_token_ids(list(delivered))
        if len(delivered) > 1:
            # The prefix cache may hold output too: then more is cached than the prompt has, which the scheduler's
            # statistics of prefill take for a bug and end the engine.
            self.prefill_stats = None

    @dataclasses.dataclass
    class CachedRequestState(gpu_model_runner.CachedRequestState):
        output_token_ids: list[int]

        def __post_init__(self) -> None:
            super().__post_init__()
            if not self.output_token_ids:
                self.output_token_ids = list(delivered_tokens(self.sampling_params))
                if self.generator is not None:
                    skip_draws(self.generator, len(self.output_token_ids))

    request.Request.__init__ = init_with_delivered
    request.Request._inferflux = True  # noqa: SLF001
    gpu_model_runner.CachedRequestState = CachedRequestState


def skip_draws(generator: torch.Generator, num_tokens: int) -> None:
    """Bring a request's generator to where it is after `num_tokens` sampled tokens.

    The sampler draws once per token: on CPU the seed of its noise (TopKTopPSampler.forward_cpu), elsewhere a step of 4
    in the generator's offset (GPUModelRunner takes back as much for a token that it discards).
    """
    if generator.device.type != "cpu":
        generator.set_offset(generator.get_offset() + 4 * num_tokens)
        return
    for _ in range(num_tokens):
        torch.randint(0, 2**31, (1,), generator=generator, dtype=torch.long)


def advance_grammars() -> None:
    """Let a grammar begin after the tokens that another worker has sampled under it."""
    from vllm.v1 import structured_output  # noqa: PLC0415

    manager = structured_output.StructuredOutputManager
    if getattr(manager, "_inferflux", False):
        return
    create = manager._create_grammar  # noqa: SLF001

    def create_advanced(self: Any, request: Any) -> Any:
        grammar = create(self, request)
        if delivered := list(delivered_tokens(request.sampling_params)):
            # Reasoning comes before what the grammar rules; where it has ended, the manager must know.
            bounds = self._get_constraint_bounds(request, delivered, spec_tokens_committed=True)
            if bounds.grammar_start <= len(delivered):
                request.structured_output_request.reasoning_ended = True
                if not grammar.accept_tokens(request.request_id, delivered[bounds.grammar_start :]):
                    raise ValueError("the delivered tokens do not follow from the grammar")
        return grammar

    manager._create_grammar = create_advanced  # noqa: SLF001
    manager._inferflux = True  # noqa: SLF001


def spare_generators_of_discarded_tokens() -> None:
    """Draw nothing from a seeded request's generator for a token that is thrown away.

    A prompt that takes several steps samples at each of them and discards all tokens but the last. vLLM winds the
    generator back afterwards, which generators on CPU can't: two long prompts at once and a seed kill the engine.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner  # noqa: PLC0415

    if hasattr(GPUModelRunner, "_inferflux_sample"):
        return
    sample, keep_books = GPUModelRunner._sample, GPUModelRunner._bookkeeping_sync  # noqa: SLF001

    def sample_spared(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = self.input_batch
        discarded = self.discard_request_mask.np[: batch.num_reqs].nonzero()[0].tolist()
        with _hidden(batch.generators, discarded if self.device.type == "cpu" else ()):
            return sample(self, *args, **kwargs)

    def keep_books_spared(self: Any, *args: Any, **kwargs: Any) -> Any:
        generators = self.input_batch.generators
        with _hidden(generators, tuple(generators) if self.device.type == "cpu" else ()):
            return keep_books(self, *args, **kwargs)

    GPUModelRunner._inferflux_sample = True  # noqa: SLF001
    GPUModelRunner._sample, GPUModelRunner._bookkeeping_sync = sample_spared, keep_books_spared  # noqa: SLF001


@contextmanager
def _hidden(generators: dict[int, Any], indexes: Iterable[int]) -> Iterator[None]:
    """Take some generators out of a batch inside the block."""
    hidden = {i: generators.pop(i) for i in indexes if i in generators}
    try:
        yield
    finally:
        generators.update(hidden)


def share_the_only_group() -> None:
    """Use one process group where there is one rank, and one that talks to nobody.

    Each gloo group keeps a thread that wakes up 100 times a second; vLLM's 14 cost an idle engine 2.2% of a core.
    """
    from torch.testing._internal.distributed import fake_pg  # noqa: F401, PLC0415  -- registers the backend "fake"

    init, new_group = torch.distributed.init_process_group, torch.distributed.new_group
    destroy = torch.distributed.destroy_process_group
    if getattr(new_group, "_inferflux", False):
        return
    shared: list[Any] = []

    def init_alone_or_with_peers(*args: Any, **kwargs: Any) -> None:
        if kwargs.get("world_size") == 1 and kwargs.get("backend") == "gloo":
            kwargs["backend"] = "fake"
        init(*args, **kwargs)

    def new_or_only_group(*args: Any, **kwargs: Any) -> Any:
        if torch.distributed.get_world_size() > 1:
            return new_group(*args, **kwargs)
        shared.append(torch.distributed.group.WORLD)
        return shared[-1]

    def destroy_unless_shared(group: Any = None) -> None:
        """Leave a shared group to whoever ends the whole world (None)."""
        if group is None or not any(group is other for other in shared):
            destroy(group)

    new_or_only_group._inferflux = True  # type: ignore[attr-defined]  # noqa: SLF001
    torch.distributed.init_process_group = init_alone_or_with_peers
    torch.distributed.new_group = new_or_only_group
    torch.distributed.destroy_process_group = destroy_unless_shared


def correct_ranks_on_cpus() -> None:
    """See inferflux.engine.vllm.ranks."""
    from vllm.platforms import current_platform  # noqa: PLC0415

    if current_platform.is_cpu():
        from inferflux.engine.vllm import adapters, ranks  # noqa: PLC0415

        ranks.register()
        adapters.register()


def delivered_tokens(sampling_params: Any) -> Sequence[int]:
    """Tokens that the client of this engine marked as sampled elsewhere."""
    extra_args = getattr(sampling_params, "extra_args", None)
    return extra_args.get(DELIVERED, ()) if extra_args else ()


class EngineProcess(ForkProcess):
    """vLLM's engine core or one of its ranks as a forked child: pinned, with its threads, gone with its parent.

    A core whose ranks are children of its own has one thread: more can't be forked.
    """

    cpu_cores: tuple[int, ...] = ()
    threads = 1
    has_forked_ranks = False

    def run(self) -> None:
        die_with_parent()
        if self.cpu_cores:
            os.sched_setaffinity(0, self.cpu_cores)
        is_parent = self.has_forked_ranks and self.name.startswith(CORE)
        torch.set_num_threads(1 if is_parent else self.threads)
        super().run()


def fork_engine(cpu_cores: tuple[int, ...], threads: int, num_ranks: int) -> None:
    """Make vLLM fork its engine core and its ranks instead of spawning them: no second import of torch, 10 s saved.

    Only valid before threads exist in this process (gRPC, exporters).
    """
    from vllm.utils import system_utils  # noqa: PLC0415
    from vllm.v1.engine import coordinator, utils  # noqa: PLC0415
    from vllm.v1.executor import multiproc_executor  # noqa: PLC0415

    how = {"cpu_cores": cpu_cores, "threads": threads, "has_forked_ranks": num_ranks > 1}
    process = type("EngineProcess", (EngineProcess,), how)
    context = type("EngineContext", (ForkContext,), {"Process": process})()
    for module in (system_utils, utils, coordinator, multiproc_executor):
        module.get_mp_context = lambda: context
