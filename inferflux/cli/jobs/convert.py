"""Turn a GGUF file into a Hugging Face folder that vLLM serves: bfloat16 safetensors, tokenizer, chat template.

python -m inferflux.cli.jobs.convert FILE.gguf FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

from inferflux.cli.jobs import report


def main(gguf: Path, folder: Path) -> None:
    """Write `folder`. Weights are dequantized once here; nothing is quantized while serving."""
    import torch  # noqa: PLC0415
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig  # noqa: PLC0415

    report(0.2)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    report(0.4)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    report(0.8)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    report(1.0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
