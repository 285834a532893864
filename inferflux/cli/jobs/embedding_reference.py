"""Compute an embedding model's numerics reference with transformers in float32 on CPU.

python -m inferflux.cli.jobs.embedding_reference MODEL_FOLDER WEIGHTS_DIGEST OUTPUT_FILE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from inferflux.cli.jobs import report
from inferflux.cli.jobs.reference import NUM_PROMPT_TOKENS, TEXT
from inferflux.engine.reference import EmbeddingReference, save


def compute(folder: Path, weights_digest: str) -> EmbeddingReference:
    """Run the fixed text through the model and pool its last states as the folder's modules say."""
    import torch  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    report(0.2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    report(0.6)
    prompt: list[int] = tokenizer(TEXT, truncation=True, max_length=NUM_PROMPT_TOKENS)["input_ids"]
    with torch.inference_mode():
        states = model(torch.tensor([prompt])).last_hidden_state[0].float()
    return EmbeddingReference(
        weights_digest=weights_digest,
        prompt_token_ids=tuple(prompt),
        embedding=tuple(pooled(states, folder).tolist()),
        source=f"transformers {transformers.__version__}, torch {torch.__version__}, float32, cpu",
    )


def pooled(states: Any, folder: Path) -> Any:
    """Pool states of shape (tokens, hidden) into one vector; its length does not matter. Raises ValueError."""
    how = pooling(folder)
    if how.get("pooling_mode_mean_tokens"):
        return states.mean(0)
    if how.get("pooling_mode_cls_token"):
        return states[0]
    if how.get("pooling_mode_lasttoken"):
        return states[-1]
    raise ValueError(
        f"{folder}: tokens are pooled in a way that is not known: {sorted(k for k, v in how.items() if v)}"
    )


def pooling(folder: Path) -> dict[str, Any]:
    """Read how tokens are pooled. Raises ValueError when there is more to it than pooling and normalizing."""
    kinds = {module["type"].rpartition(".")[2]: module for module in json.loads((folder / "modules.json").read_text())}
    if unknown := kinds.keys() - {"Transformer", "Pooling", "Normalize"}:
        raise ValueError(f"{folder}: modules that are not known: {', '.join(sorted(unknown))}")
    how: dict[str, Any] = json.loads((folder / kinds["Pooling"]["path"] / "config.json").read_text())
    return how


if __name__ == "__main__":
    save(compute(Path(sys.argv[1]), sys.argv[2]), Path(sys.argv[3]))
