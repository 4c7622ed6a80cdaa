"""What a plan knows of a model and its prompts without weights: sizes from its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from dop_search.app.config.schema import DataConfig, ModelConfig
from dop_search.data.samples import Sample, with_context
from dop_search.data.validation import OWN, validation_set
from dop_search.divergence.footprint import Footprint, SampleSize, num_patches, tower_bytes
from dop_search.models.adapter import ModelAdapter
from dop_search.models.families import adapter_for
from dop_search.models.loading import DTYPES, checkpoint_source, load_processor
from dop_search.models.prompts import model_inputs
from dop_search.models.published import published_models
from dop_search.models.quantization import check_quantization, meta_model, packed_bytes
from dop_search.models.text import MARKERS_KEY
from dop_search.models.text_processor import TextProcessor
from dop_search.utils.errors import DopError

TEXT_BEFORE, TEXT_AFTER = 35, 25
"""Text tokens of a prompt where no processor is at hand to count them: system prompt, question."""
LARGE_IMAGE = (1008, 1008)
LONG_PASSAGE = 1000


@dataclass(frozen=True)
class ModelFacts:
    """A model by its sizes.

    Attributes:
        source: where the sizes are from.
        footprint: what its activations take.
        weight_bytes: of all weights, as they would be loaded.
        linear_flops: of one token through the decoder's linear layers and ``lm_head``.
        tower_flops: of one sample's images through the vision tower and projector.
        tower_bytes: of activations for one sample's images.
        prompts: sizes of the prompts, with the longest answer.
        prompts_from: where those are from.
        dtype: of the weights that are not quantised.
    """

    name: str
    source: str
    footprint: Footprint
    weight_bytes: int
    linear_flops: int
    tower_flops: int
    tower_bytes: int
    prompts: tuple[SampleSize, ...]
    prompts_from: str
    dtype: torch.dtype


def model_facts(model: ModelConfig, data: DataConfig, device_type: str) -> ModelFacts:
    """Sizes of a model and of its prompts; DopError if the checkpoint is neither here nor one of known sizes."""
    place = Path(checkpoint_source(model.name_or_path))
    folder = place if place.is_dir() else None
    config, source = _config(model, folder)
    dtype = _dtype(model.dtype, config, device_type)
    if model.quantization is not None:
        check_quantization(model.quantization, config)
    meta = meta_model(config, dtype)
    adapter = adapter_for(meta)
    element = dtype.itemsize
    parts = _parts(meta, adapter)
    weights = {name: _bytes(part, model, element, name) for name, part in parts.items()}
    prompts, patches, prompts_from = _prompts(model, data, folder, adapter)
    vision = getattr(meta.config, "vision_config", None)
    tower = sum(p.numel() for p in parts["tower"].parameters())
    footprint = Footprint(
        adapter.dims,
        element,
        eager=model.attn_implementation == "eager",
        masks=device_type != "cuda",
        unpacked=Footprint.largest_weight(adapter.dims, element) if model.quantization else 0,
        deepstack=len(getattr(vision, "deepstack_visual_indexes", ())) if adapter.has_deepstack else 0,
    )
    linear = sum(p.numel() for p in adapter.layers.parameters() if p.ndim == 2)  # type: ignore[attr-defined]
    return ModelFacts(
        name=model.name_or_path,
        source=source,
        footprint=footprint,
        weight_bytes=sum(weights.values()),
        linear_flops=2 * (linear + adapter.dims.hidden_size * adapter.dims.vocab_size),
        tower_flops=2 * tower * patches,
        tower_bytes=tower_bytes(meta.config, adapter.tower_width, patches, element) if adapter.has_tower else 0,
        prompts=prompts,
        prompts_from=prompts_from,
        dtype=dtype,
    )


def _config(model: ModelConfig, folder: Path | None) -> tuple[PretrainedConfig, str]:
    options = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    try:
        source = model.name_or_path if folder is None else folder
        config = AutoConfig.from_pretrained(source, local_files_only=True, **options)
        return config, "the checkpoint's config.json"
    except OSError as error:
        published = published_models().get(model.name_or_path)
        if published is None:
            raise DopError(
                f"the sizes of {model.name_or_path!r} are not known: there is no copy on this machine, and a plan asks "
                f"no hub; set model.name_or_path to a local copy, or plan one of {', '.join(published_models())}"
            ) from error
    return published.config, "the published architecture"


def _dtype(name: str, config: PretrainedConfig, device_type: str) -> torch.dtype:
    if name != "auto":
        return DTYPES[name]
    own = getattr(config, "dtype", None)
    return torch.float32 if device_type == "cpu" else own if isinstance(own, torch.dtype) else torch.bfloat16


def _parts(meta: Any, adapter: ModelAdapter) -> dict[str, nn.Module]:
    """The decoder's layers, what else belongs to the text, and the tower with the projector."""
    language = adapter.text_model
    others = nn.ModuleList([module for name, module in language.named_children() if name != "layers"])
    around = meta.model.children() if adapter.has_tower else ()
    tower = nn.ModuleList([module for module in around if module is not language])
    return {"layers": language.layers, "text": nn.ModuleList([others, meta.lm_head]), "tower": tower}


def _bytes(part: nn.Module, model: ModelConfig, element: int, name: str) -> int:
    packed: dict[int, int] = {}
    if name == "layers" and model.quantization is not None:
        linears = [module for module in part.modules() if isinstance(module, nn.Linear)]
        packed = {id(linear.weight): packed_bytes(linear, model.quantization, element) for linear in linears}
    tensors = {id(tensor): tensor for tensor in (*part.parameters(), *part.buffers())}
    return sum(packed.get(key, tensor.nbytes) for key, tensor in tensors.items())


def _prompts(
    model: ModelConfig, data: DataConfig, folder: Path | None, adapter: ModelAdapter
) -> tuple[tuple[SampleSize, ...], int, str]:
    """Sizes of prompts, patches of one sample's images, and where that is from."""
    answer = data.max_new_tokens
    count = data.sizes["search"]
    published = published_models().get(model.name_or_path)
    if folder is None and published is not None:
        size = SampleSize(TEXT_BEFORE, TEXT_AFTER + answer - 1, published.num_visual_tokens, answer)
        return (size,) * count, published.num_patches, f"{published.image}; {TEXT_BEFORE + TEXT_AFTER} text tokens"
    config: Any = adapter.model.config
    processor = load_processor(folder or model.name_or_path, config, trust_remote_code=model.trust_remote_code)
    if isinstance(processor, TextProcessor):
        setattr(config, MARKERS_KEY, processor.markers)
    if data.name in OWN:
        drawn = validation_set(data.name, count, data.seed, "search", path=data.path, families=data.families)
        samples, where = drawn.samples, f"{count} samples of {data.name}"
    elif not adapter.has_tower:
        samples = (Sample("plan", None, with_context("word " * LONG_PASSAGE, "What is said?"), (), "plan"),)
        where = f"a passage of {LONG_PASSAGE} words"
    else:
        image = Image.new("RGB", LARGE_IMAGE)
        samples = (Sample(id="plan", image=image, question="What is shown?", answers=(), family="plan"),)
        where = f"an image of {LARGE_IMAGE[0]} x {LARGE_IMAGE[1]} pixels"
    inputs = [model_inputs(processor, [sample], torch.device("cpu")) for sample in samples]
    sizes = [SampleSize.of_prompt(adapter.visual_token_mask(item["input_ids"])[0], answer) for item in inputs]
    sizes = sizes if len(sizes) == count else sizes * count
    patches = [num_patches(item["pixel_values"].numel(), adapter) for item in inputs] if adapter.has_tower else [0]
    return tuple(sizes), max(patches), where
