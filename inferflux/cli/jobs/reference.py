"""Compute a model's numerics reference with transformers in float32 on CPU; see inferflux.engine.reference.

python -m inferflux.cli.jobs.reference MODEL_FOLDER WEIGHTS_DIGEST OUTPUT_FILE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from inferflux.cli.jobs import report
from inferflux.engine.reference import NumericsReference, save

NUM_PROMPT_TOKENS = 48
NUM_GREEDY = 8
TEXT = (
    "Water boils at one hundred degrees Celsius at sea level, and freezes at zero. The capital of France is Paris, "
    "which lies on the river Seine; 2 + 2 = 4, and the first five prime numbers are 2, 3, 5, 7 and 11. "
    "Once upon a time there was a small village at the foot of a mountain."
)


def compute(folder: Path, weights_digest: str) -> NumericsReference:
    """Run the fixed text through the model once, then decode greedily."""
    import torch  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    report(0.2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    sees = "vision_config" in json.loads((folder / "config.json").read_text())
    kind = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    report(0.6)
    prompt: list[int] = tokenizer(TEXT, add_special_tokens=False)["input_ids"][:NUM_PROMPT_TOKENS]
    with torch.inference_mode():
        result = model(torch.tensor([prompt]), use_cache=True)
        logprobs = result.logits[0].float().log_softmax(-1)
        greedy = [int(logprobs[-1].argmax())]
        while len(greedy) < NUM_GREEDY:
            report(0.6 + 0.4 * len(greedy) / NUM_GREEDY)
            result = model(torch.tensor([greedy[-1:]]), past_key_values=result.past_key_values, use_cache=True)
            greedy.append(int(result.logits[0, -1].argmax()))
    top = logprobs.max(-1)
    following = logprobs[:-1].gather(-1, torch.tensor(prompt[1:])[:, None])[:, 0]
    return NumericsReference(
        weights_digest=weights_digest,
        prompt_token_ids=tuple(prompt),
        top1_ids=tuple(top.indices.tolist()),
        top1_logprobs=tuple(top.values.tolist()),
        next_logprobs=tuple(following.tolist()),
        greedy_ids=tuple(greedy),
        source=f"transformers {transformers.__version__}, torch {torch.__version__}, float32, cpu",
    )


if __name__ == "__main__":
    save(compute(Path(sys.argv[1]), sys.argv[2]), Path(sys.argv[3]))
