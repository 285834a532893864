"""Does this engine compute what the model computes? Asked before a worker joins a pool.

Compiled kernels that are wrong on one CPU model, a bad conversion or a broken quantization give fluent nonsense with
status 200. A fixed prompt, compared with the model's reference (transformers, float32), tells.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from vllm.pooling_params import PoolingParams
from vllm.sampling_params import RequestOutputKind, SamplingParams

from inferflux.errors import NumericsMismatch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.v1.engine.async_llm import AsyncLLM

    from inferflux.engine.reference import EmbeddingReference, NumericsReference

# Mean absolute difference of the prompt's log-probabilities. Measured on smollm2-135m: float32 2e-5, bfloat16 0.03;
# wrong kernels are off by more than 1. The factor ten in between is for other models.
TOLERANCE = {"float32": 2e-3, "bfloat16": 0.25, "float16": 0.1}
# Share of positions whose top-1 token must be the reference's; near-ties flip in half precision.
MIN_TOP1_SHARE = {"float32": 0.98, "bfloat16": 0.85, "float16": 0.9}
# Cosine with the reference's vector. Measured on all-MiniLM-L6-v2: float32 1 - 1e-7.
MIN_COSINE = {"float32": 0.9999, "bfloat16": 0.99, "float16": 0.999}


async def check(llm: AsyncLLM, reference: NumericsReference, dtype: str) -> None:
    """Compare the reference's prompt position by position. Raises NumericsMismatch with the numbers."""
    params = SamplingParams(
        temperature=0, max_tokens=1, prompt_logprobs=1, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
    )
    prompt = {"prompt_token_ids": list(reference.prompt_token_ids)}
    (final,) = [output async for output in llm.generate(prompt, params, "numerics")]
    top1, differences = 0, []
    # Entry i of prompt_logprobs is about token i given those before it; the first has none.
    for i, entry in enumerate(final.prompt_logprobs[1:]):
        best = next((token for token, logprob in entry.items() if logprob.rank == 1), None)
        top1 += best == reference.top1_ids[i]
        differences.append(abs(entry[reference.prompt_token_ids[i + 1]].logprob - reference.next_logprobs[i]))
    _judge(top1 / len(differences), sum(differences) / len(differences), dtype)


def _judge(top1_share: float, mean_difference: float, dtype: str) -> None:
    tolerance, min_share = TOLERANCE.get(dtype, 0.25), MIN_TOP1_SHARE.get(dtype, 0.85)
    if math.isfinite(mean_difference) and mean_difference <= tolerance and top1_share >= min_share:
        return
    raise NumericsMismatch(
        f"numerics: {top1_share:.0%} of top-1 tokens match the reference (at least {min_share:.0%} must), "
        f"log-probabilities differ by {mean_difference:.4f} on average (at most {tolerance} may) in {dtype}"
    )


async def check_embedding(llm: AsyncLLM, reference: EmbeddingReference, dtype: str) -> None:
    """Compare the vector of the reference's prompt. Raises NumericsMismatch with the numbers."""
    prompt = {"prompt_token_ids": list(reference.prompt_token_ids)}
    (final,) = [output async for output in llm.encode(prompt, PoolingParams(task="embed"), "numerics")]
    cosine = _cosine(final.outputs.data.flatten().tolist(), reference.embedding)
    least = MIN_COSINE.get(dtype, 0.99)
    if not cosine >= least:  # a NaN is not
        raise NumericsMismatch(
            f"numerics: the vector's cosine with the reference is {cosine:.6f} (at least {least} must be) in {dtype}"
        )


def _cosine(a: Sequence[float], b: Sequence[float]) -> float:
    if len(a) != len(b):
        return 0.0
    return sum(x * y for x, y in zip(a, b, strict=True)) / max(math.hypot(*a) * math.hypot(*b), 1e-30)
