"""What the papers' released code gave on small inputs: numbers, with the facts about each beside them.

``cases/NAME-i.json`` says where the code is from, which function it was, how each output is to be compared and which
deviation is right; ``cases/NAME-i.safetensors`` holds inputs (``in.*``) and outputs (``out.*``).
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parent / "cases"


@dataclass(frozen=True)
class Case:
    """One run of released code."""

    name: str
    facts: dict[str, Any]
    tensors: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @property
    def settings(self) -> dict[str, Any]:
        return self.facts["settings"]

    def kept(self, name: str = "out.kept") -> list[int]:
        """An output that is a set of tokens, sorted."""
        return sorted(self[name].tolist())

    def close(self, name: str, found: Tensor) -> None:
        """Compare an output at the tolerance that its case states."""
        how = self.facts["outputs"][name]
        torch.testing.assert_close(
            found.double(), self[name].double(), rtol=how["rtol"], atol=how["atol"], check_dtype=False
        )


def case_names(method: str) -> list[str]:
    names = sorted(path.stem for path in FOLDER.glob(f"{method}-*.json"))
    assert names, method
    return names


def read_case(name: str) -> Case:
    facts = json.loads((FOLDER / f"{name}.json").read_text())
    tensors = load_file(FOLDER / f"{name}.safetensors")
    assert _digest(tensors) == facts["tensors_sha256"], name
    return Case(name, facts, tensors)


def cases(method: str) -> pytest.MarkDecorator:
    """Run a test on every case of a method, as its argument ``case``."""
    return pytest.mark.parametrize("case", [read_case(name) for name in case_names(method)], ids=lambda case: case.name)


def _digest(tensors: dict[str, Tensor]) -> str:
    result = hashlib.sha256()
    for name in sorted(tensors):
        result.update(name.encode())
        result.update(tensors[name].detach().contiguous().cpu().numpy().tobytes())
    return result.hexdigest()


# -- tiny models whose parameters a seed gives ------------------------------------------------------------------------


def _fill(model: torch.nn.Module, seed: int, gain: float) -> torch.nn.Module:
    """Every parameter from one generator, in the order of the names, so that no library's initialisation matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            x = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            if "norm" in name.lower() and name.endswith("weight"):
                x = 1 + 0.1 * x
            elif name.endswith("bias"):
                x = 0.1 * x
            elif "embed" not in name.lower():
                x = x * gain / math.sqrt(parameter[0].numel()) if parameter.ndim >= 2 else 0.5 * x
            parameter.copy_(x)
    return model.eval()


def _check(model: torch.nn.Module, expected: str) -> None:
    found = _digest({name: parameter.float() for name, parameter in model.named_parameters()})
    assert found == expected, "the tiny model is not the one that the released code ran on"


def tiny_clip(case: Case) -> Any:
    """The CLIP model of a case."""
    from transformers import CLIPConfig, CLIPModel

    model = _fill(CLIPModel(CLIPConfig(**case.settings["clip_config"])), case.settings["clip_seed"], gain=1.6)
    with torch.no_grad():
        model.visual_projection.weight.mul_(0.25)
        model.text_projection.weight.mul_(0.5)
    _check(model, case.settings["clip_sha256"])
    return model


def tiny_llava(case: Case, clip: Any = None) -> Any:
    """The LLaVA model of a case, with the vision tower of ``clip`` where that is given."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    model = _fill(
        LlavaForConditionalGeneration(LlavaConfig(**case.settings["llava_config"])), case.settings["llava_seed"], 1.3
    )
    if clip is not None:
        model.model.vision_tower.load_state_dict(clip.vision_model.state_dict(), strict=False)
    else:  # the released code's models were damped, so that one layer does not decide everything
        with torch.no_grad():
            for layer in model.model.language_model.layers:
                layer.self_attn.o_proj.weight.mul_(0.8)
                layer.mlp.down_proj.weight.mul_(0.5)
            model.lm_head.weight.mul_(1.5)
    _check(model, case.settings["llava_sha256"])
    return model


def tiny_qwen_tower(case: Case) -> Any:
    """The vision tower of Qwen2-VL of a case, with attention that is less even than random weights make it."""
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

    s = case.settings
    tower = Qwen2VisionTransformerPretrainedModel(Qwen2VLVisionConfig(**s["vision_config"]))
    _fill(tower, s["tower_seed"], 1.6)
    with torch.no_grad():
        for block in tower.blocks:
            block.attn.qkv.weight.mul_(s["qkv_gain"])
    _check(tower, s["tower_sha256"])
    return tower


def decoder_layer(case: Case) -> Any:
    """A Llama layer with the projections and the input norm of a case; nothing else of it is used."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    s = case.settings
    config = LlamaConfig(
        hidden_size=case["in.hidden"].shape[1],
        intermediate_size=8,
        num_attention_heads=s["heads"],
        num_key_value_heads=s["kv_heads"],
        head_dim=s["head_dim"],
        rms_norm_eps=s["rms_norm_eps"],
        attn_implementation="eager",
    )
    layer = LlamaDecoderLayer(config, 0).eval()
    with torch.no_grad():
        layer.self_attn.q_proj.weight.copy_(case["in.q_proj"])
        layer.self_attn.k_proj.weight.copy_(case["in.k_proj"])
        layer.input_layernorm.weight.copy_(case["in.input_layernorm"])
        if "in.v_proj" in case.tensors:
            layer.self_attn.v_proj.weight.copy_(case["in.v_proj"])
    return layer


def rope(length: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of positions ``0 .. length - 1``."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2).float() / head_dim)
    angles = torch.outer(torch.arange(length).float(), frequencies)
    both = torch.cat([angles, angles], dim=-1)
    return both.cos(), both.sin()
