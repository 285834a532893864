"""Small random models that several ranks can share, with the default model's tokenizer.

    python -m tests.support.tiny_models KIND FOLDER TOKENIZER_FOLDER

Made from a seed, once, and kept with the other models. Untied and with large weights: the usual small random model says
one token for ever, which proves nothing. The default model itself has three KV heads, which two ranks can't share.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from inferflux.cli import models
from inferflux.paths import models_dir

REPOSITORY = Path(__file__).parents[2]
SEED = 20
LLAMA, QWEN_MOE, BERT = "llama", "qwen3moe", "bert"
AVAILABLE_BYTES = 1 << 34
TEXTS = ("a cat", "The sea is deep, and most of it is dark.", "one two three four five six seven eight " * 12)
VECTORS = "vectors.json"
"""What an embedding model's folder has of TEXTS: a list of unit vectors."""


def tiny_model(kind: str) -> dict[str, Any]:
    """Fields of EngineOptions for the model of this kind; makes it when it is not there.

    BERT gives vectors, the others tokens.
    """
    directory = models_dir(os.environ)
    tokenizer = models.prepare(models.DEFAULT, directory, _silent, available_bytes=AVAILABLE_BYTES).folder
    name = f"tiny-{kind}"
    with models.locked(directory / f".lock-make-{name}", lambda: None):
        if not (directory / name).is_dir():
            _make(kind, directory / name, tokenizer)
    model = models.prepare(name, directory, _silent, available_bytes=AVAILABLE_BYTES, is_embedding=kind == BERT)
    return {"model_dir": model.folder, "model_digest": model.weights_digest, "numerics_reference": model.reference}


def _make(kind: str, folder: Path, tokenizer: Path) -> None:
    """In a process of its own: torch stays out of the test run."""
    unfinished = folder.with_name(f".{folder.name}-{os.getpid()}")
    command = [sys.executable, "-m", "tests.support.tiny_models", kind, str(unfinished), str(tokenizer)]
    subprocess.run(command, cwd=REPOSITORY, check=True, timeout=300)
    unfinished.rename(folder)


def _silent(what: str, part: float | None) -> None: ...


# --- in the child -----------------------------------------------------------------------------------------------------


def make(kind: str, folder: Path, tokenizer: Path) -> None:
    """Write the model."""
    if kind == BERT:
        make_embedding(folder, tokenizer)
    else:
        make_generating(kind, folder, tokenizer)


def make_embedding(folder: Path, tokenizer: Path) -> None:
    """Write an encoder whose vectors are means, and beside it what it makes of TEXTS, by transformers."""
    import torch
    import transformers

    torch.manual_seed(SEED)
    words = transformers.AutoTokenizer.from_pretrained(tokenizer)
    shape: dict[str, Any] = {
        "vocab_size": 49152,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.15,
    }
    model = transformers.BertModel(transformers.BertConfig(**shape)).eval()
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (path, name) in enumerate(kinds.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": shape["hidden_size"], "pooling_mode_mean_tokens": True})
    )
    with torch.inference_mode():
        states = [model(torch.tensor([words(text)["input_ids"]])).last_hidden_state[0].mean(0) for text in TEXTS]
    (folder / VECTORS).write_text(json.dumps([(state / state.norm()).tolist() for state in states]))


def make_generating(kind: str, folder: Path, tokenizer: Path) -> None:
    """Write a language model."""
    import torch
    import transformers

    torch.manual_seed(SEED)
    words = transformers.AutoTokenizer.from_pretrained(tokenizer)
    shape: dict[str, Any] = {
        "vocab_size": 49152,
        "max_position_embeddings": 2048,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "tie_word_embeddings": False,
        "initializer_range": 0.15,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
    }
    if kind == LLAMA:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    else:
        experts: dict[str, Any] = {
            "moe_intermediate_size": 64,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
        model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**shape, **experts))
    model.to(torch.bfloat16).save_pretrained(folder)
    words.save_pretrained(folder)


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
