"""What was trained, in float16, into the package: updates of the decoder, projector and tower.

python -m experiments.smol_llava.package WORK dop_search/models/smol_llava
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, LlamaForCausalLM

from dop_search.models.smollm2 import smollm2_path
from experiments.smol_llava.see import add_lora


def main(work: Path, target: Path) -> None:
    """``see.pt`` and ``tower.pt`` of a folder → ``weights.safetensors`` of another."""
    with torch.device("meta"):
        names = [f"lora.{name}" for name in add_lora(LlamaForCausalLM(AutoConfig.from_pretrained(smollm2_path())))]
    values: list[Tensor] = torch.load(work / "see.pt")["parameters"]
    trained = dict(zip(names, values, strict=True))
    for name, tensor in torch.load(work / "tower.pt")["model"].items():
        part = "projector" if name.startswith("linear_") else "tower"
        trained[f"{part}.{name.removeprefix('vision_tower.')}"] = tensor
    path = target / "weights.safetensors"
    save_file({name: tensor.half().contiguous() for name, tensor in trained.items()}, path)
    path.chmod(0o644)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
