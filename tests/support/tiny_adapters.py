"""Small random LoRA adapters, and what a model with each of them merged into its weights says.

    python -m tests.support.tiny_adapters ORDER_JSON

The oracle is transformers in float32 on weights to which the adapters' products were added: no LoRA code at all.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
RANK, ALPHA, SCALE = 4, 8, 0.15
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Said = dict[str, list[list[int]]]


def make(model: Path, adapters: Mapping[Path, int], prompts: Sequence[Sequence[int]], num_tokens: int) -> Said:
    """Write adapters, from a seed each; returns greedy tokens for each prompt by folder name, "" is the model itself.

    In a process of its own: torch stays out of the test run.
    """
    order = {
        "model": str(model),
        "adapters": {str(folder): seed for folder, seed in adapters.items()},
        "prompts": [list(prompt) for prompt in prompts],
        "num_tokens": num_tokens,
    }
    command = [sys.executable, "-m", "tests.support.tiny_adapters", json.dumps(order)]
    done = subprocess.run(command, cwd=REPOSITORY, check=True, timeout=300, stdout=subprocess.PIPE, text=True)
    said: Said = json.loads(done.stdout.splitlines()[-1])
    return said


# --- in the child -----------------------------------------------------------------------------------------------------


def carry_out(order: dict[str, Any]) -> Said:
    import torch
    import transformers

    torch.set_num_threads(1)

    def plain() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(order["model"], dtype=torch.float32).eval()

    said = {"": [greedy(plain(), prompt, order["num_tokens"]) for prompt in order["prompts"]]}
    for folder, seed in order["adapters"].items():
        model = plain()
        write(model, Path(folder), seed)
        said[Path(folder).name] = [greedy(model, prompt, order["num_tokens"]) for prompt in order["prompts"]]
    return said


def write(model: Any, folder: Path, seed: int) -> None:
    """Write an adapter for all linear layers, and add it to the model's own weights."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in model.named_modules():
        if not name.endswith(MODULES):
            continue
        size_out, size_in = module.weight.shape
        a = torch.randn((RANK, size_in), generator=generator) * SCALE
        b = torch.randn((size_out, RANK), generator=generator) * SCALE
        tensors |= {f"base_model.model.{name}.lora_{x}.weight": y for x, y in (("A", a), ("B", b))}
        module.weight.data += ALPHA / RANK * b @ a
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(MODULES), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def greedy(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    import torch

    with torch.inference_mode():
        result = model(torch.tensor([prompt]), use_cache=True)
        ids = [int(result.logits[0, -1].argmax())]
        while len(ids) < num_tokens:
            result = model(torch.tensor([ids[-1:]]), past_key_values=result.past_key_values, use_cache=True)
            ids.append(int(result.logits[0, -1].argmax()))
    return ids


if __name__ == "__main__":
    print(json.dumps(carry_out(json.loads(sys.argv[1]))))  # noqa: T201
