"""What the plug-in refuses of an engine and of a prompt, since nothing shows that it would be right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaModel
from vllm.model_executor.models.qwen2 import Qwen2DecoderLayer, Qwen2Model
from vllm.platforms import current_platform

from dop_search.utils.errors import DopError, UnsupportedModelError

_DECODERS = ((LlamaModel, {LlamaDecoderLayer}), (Qwen2Model, {Qwen2DecoderLayer}))
"""Classes of decoders, and of their layers, that compute what packed layers compute."""


def check_engine(vllm_config: VllmConfig, decoder: Any) -> None:
    """Refuse settings and decoders under which the plug-in has not been run.

    Raises:
        DopError: which setting, and the remedy.
        UnsupportedModelError: which decoder.
    """
    multimodal = vllm_config.model_config.multimodal_config
    parallel = vllm_config.parallel_config
    found = {
        "tensor parallelism": (parallel.tensor_parallel_size > 1, "--tensor-parallel-size 1"),
        "pipeline parallelism": (parallel.pipeline_parallel_size > 1, "--pipeline-parallel-size 1"),
        "speculative decoding": (vllm_config.speculative_config is not None, "no --speculative-config"),
        "KV transfer": (vllm_config.kv_transfer_config is not None, "no --kv-transfer-config"),
        "LoRA": (vllm_config.lora_config is not None, "merged weights"),
        "quantised weights": (vllm_config.quant_config is not None, "a checkpoint in bfloat16 or float32"),
        "image embeddings as inputs": (
            bool(getattr(multimodal, "enable_mm_embeds", False)),
            "images, without --enable-mm-embeds",
        ),
        "vLLM's own pruning of videos": (
            bool(getattr(multimodal, "video_pruning_rate", None)),
            "no --video-pruning-rate",
        ),
        f"the platform {current_platform.device_type!r}": (
            not current_platform.is_cpu(),
            "a CPU build of vLLM; paths through CUDA graphs are not written (dop_search/serving/README.md)",
        ),
    }
    for what, (is_so, remedy) in found.items():
        if is_so:
            raise DopError(f"{what} is not served with a strategy; use {remedy}")
    kinds = {type(layer) for layer in decoder.layers}
    windows = any(layer.self_attn.attn.sliding_window is not None for layer in decoder.layers)
    if (type(decoder), kinds) not in _DECODERS or windows:
        raise UnsupportedModelError(
            f"only Llama and Qwen2 decoders without windows are served, but got {type(decoder).__name__} of "
            f"{', '.join(sorted(kind.__name__ for kind in kinds))}; use `dop.pruned` of Hugging Face's model"
        )


def check_prompt(config: ModelConfig, length: int, images: Sequence[tuple[int, int]], further: int) -> None:
    """Refuse a prompt that begins or ends with an image, or whose positions the model does not have; DopError with the
    remedy.

    Kept tokens keep their positions, so that text stands as far on as without pruning.

    Args:
        config: the engine's, with the longest sequence that it takes.
        length: tokens of the prompt.
        images: where the images begin in it, and their kept tokens.
        further: positions that the images take besides those of their kept tokens.
    """
    for offset, size in images:
        if offset == 0 or offset + size == length:
            raise DopError(
                "a prompt must begin and end with text, but an image is its "
                f"{'first' if offset == 0 else 'last'} token; put the question after the image"
            )
    limit = getattr(config.hf_text_config, "max_position_embeddings", None)
    total = config.max_model_len + further
    if limit is not None and total > limit:
        raise DopError(
            "`max_model_len + dropped tokens <= max_position_embeddings` must hold, since tokens keep their positions, "
            f"but got ({config.max_model_len} + {further}, {limit}); start the engine with "
            f"--max-model-len {limit - further} or less"
        )
