"""Load a checkpoint with its processor: the bundled model, a hub id or a local folder."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from dop_search.models.adapter import ModelAdapter
from dop_search.models.families import adapter_for, check_model_type
from dop_search.models.quantization import Quantization, quantization_config, stored
from dop_search.utils.errors import DopError, MissingExtraError, UnsupportedModelError
from dop_search.utils.network import hub_is_reachable as hub_is_reachable

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LoadedModel:
    """A model with what belongs to it.

    Attributes:
        name: what the user asked for.
        model: the Hugging Face model, in evaluation mode.
        processor: tokenizer, image processor and chat template.
        adapter: what the framework knows about the family.
        weights_fingerprint: hash of architecture, dtype and a sample of every weight.
    """

    name: str
    model: PreTrainedModel
    processor: Any
    adapter: ModelAdapter = field(repr=False)
    weights_fingerprint: str

    @property
    def fingerprint(self) -> str:
        """Hash of everything that answers depend on, names caches: weights, configurations, processor, tokenizer."""
        tokenizer = getattr(self.processor, "tokenizer", None)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        parts = {
            "weights": self.weights_fingerprint,
            "config": self.model.config.to_dict(),
            "generation": None if self.model.generation_config is None else self.model.generation_config.to_dict(),
            "processor": self.processor.to_dict(),
            "chat_template": getattr(self.processor, "chat_template", None),
            "tokenizer": type(tokenizer).__name__ if backend is None else json.loads(backend.to_str()),
            "transformers": transformers.__version__,
        }
        return hashlib.sha256(json.dumps(_lasting(parts), sort_keys=True).encode()).hexdigest()[:16]


_PASSING = frozenset(
    {"_name_or_path", "name_or_path", "transformers_version", "_commit_hash", "tokenizer_file", "padding", "truncation"}
)
"""Keys that say where a file was, what wrote it, or how a tokenizer was last called."""


def _lasting(value: Any) -> Any:
    """Plain data that is the same for the same settings, wherever they were read from."""
    if isinstance(value, Mapping):
        return {str(key): _lasting(item) for key, item in value.items() if key not in _PASSING}
    if isinstance(value, (list, tuple)):
        return [_lasting(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def load(
    name_or_path: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | dict[str, Any] | None = None,
    quantization: Quantization | None = None,
    attn_implementation: str = "sdpa",
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a model and its processor.

    Args:
        name_or_path: ``"pocket"`` (bundled; ``"pocket/<variant>"`` for its other variants), a hub id or a local folder.
        revision: branch, tag or commit of a hub checkpoint; pin a commit for results that you publish.
        dtype: ``float32``, ``float16``, ``bfloat16`` or ``auto``: the checkpoint's on an accelerator, float32 on a CPU
            (half precision is slow there).
        device: ``cpu``, ``cuda``, ``cuda:0`` …, or ``auto``: the first accelerator, else the CPU.
        device_map: passed on to transformers (by accelerate) instead of ``device``; the decoder's layers may be on
            several GPUs, but not offloaded.
        quantization: ``bnb4``, ``bnb8`` (bitsandbytes) or ``int8`` (torchao): the decoder's weights in fewer bits.
        attn_implementation: attention backend of the decoder.
        trust_remote_code: run code that comes with a hub checkpoint; off unless asked for.

    Raises:
        DopError: if the checkpoint cannot be found; says how to point to a local copy. If a package that
            ``quantization`` needs is missing.
        MissingExtraError: ``device_map`` without accelerate.
        UnsupportedModelError: if transformers does not know the checkpoint's format, if no adapter covers the model's
            class, or if its decoder is offloaded.
    """
    if dtype not in {"auto", *DTYPES}:
        raise DopError(f"`dtype` must be one of {['auto', *DTYPES]}, but got {dtype!r}")
    if device_map is not None and importlib.util.find_spec("accelerate") is None:
        raise MissingExtraError("`device_map` needs accelerate; install with: pip install accelerate")
    source = _source(name_or_path)
    target = _device(device)
    torch_dtype: Any = DTYPES.get(dtype, torch.float32 if target.type == "cpu" and device_map is None else "auto")
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if not Path(source).is_dir() and not hub_is_reachable():
        options["local_files_only"] = True  # fail at once instead of retrying for minutes
    try:
        check_model_type(_model_type(source, options, name_or_path), repr(name_or_path))
        processor = AutoProcessor.from_pretrained(source, **options)
        if quantization is not None:
            config = AutoConfig.from_pretrained(source, **options)
            options["quantization_config"] = quantization_config(quantization, config, torch_dtype)
            device_map = device_map or {"": target}  # packed where they are loaded: they cannot all be moved
        model: Any = AutoModelForImageTextToText.from_pretrained(
            source, dtype=torch_dtype, device_map=device_map, attn_implementation=attn_implementation, **options
        )
    except OSError as error:
        raise DopError(
            f"cannot load {name_or_path!r}: {str(error).splitlines()[0]}\n"
            "Without network access, point to a local copy: model.name_or_path=/path/to/checkpoint "
            "(a folder with config.json, weights and the processor's files), or use the bundled one: model=pocket"
        ) from error
    if device_map is None:
        model.to(target)
    model.eval()
    if getattr(processor, "tokenizer", None) is not None:
        processor.tokenizer.padding_side = "left"
    adapter = adapter_for(model)
    adapter.check_decoder()
    return LoadedModel(name_or_path, model, processor, adapter, weights_fingerprint(model))


def weights_fingerprint(model: PreTrainedModel) -> str:
    """Hash of the architecture, the dtype and up to 64 evenly spaced values of every parameter."""
    digest = hashlib.sha256(adapter_for(model).fingerprint.encode())
    for name, parameter in model.named_parameters():
        for part, tensor in stored(name, parameter):  # scales are attributes of the parameter itself
            flat = tensor.detach().reshape(-1)
            values = flat[:: max(1, flat.numel() // 64)][:64].float().cpu()
            digest.update(f"{part}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:16]


def _model_type(source: str, options: dict[str, Any], name: str) -> str | None:
    try:
        model_type: str | None = AutoConfig.from_pretrained(source, **options).model_type
    except ValueError as error:
        raise UnsupportedModelError(
            f"transformers cannot tell the model of {name!r}: {str(error).splitlines()[0]}\n"
            "A checkpoint in Hugging Face format is needed, whose config.json names a `model_type` that transformers "
            "knows: of a checkpoint in its authors' own format take the one on the hub that ends in -hf (as in "
            "llava-hf/llava-1.5-7b-hf, OpenGVLab/InternVL3-8B-hf), or convert it with the script in transformers' "
            "repository (src/transformers/models/FAMILY/convert_*.py)"
        ) from error
    return model_type


def _source(name_or_path: str) -> str:
    name, _, variant = name_or_path.partition("/")
    if name != "pocket":
        return _folder(name_or_path) if _is_path(name_or_path) else name_or_path
    from dop_search.models.pocket import POCKET_VARIANTS, pocket_path

    for known in POCKET_VARIANTS:
        if variant in ("", known):
            return str(pocket_path(known))
    raise DopError(f"the bundled model has no variant {variant!r}; there are {', '.join(POCKET_VARIANTS)}")


def _is_path(name: str) -> bool:
    """Whether it can only be a folder: a hub id is ``NAME`` or ``OWNER/NAME``."""
    return name.startswith(("/", "./", "../", "~")) or name in (".", "..") or name.count("/") > 1


def _folder(name: str) -> str:
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    above = next(parent for parent in path.absolute().parents if parent.is_dir())
    what = "is a file" if path.is_file() else f"does not exist ({str(above)!r} is there)"
    raise DopError(
        f"cannot load {name!r}: {str(path)!r} {what}; set model.name_or_path to the folder of a checkpoint "
        "(with config.json, weights and the processor's files) or to a hub id, or use the bundled model: model=pocket"
    )


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise DopError(f"`device` must be auto, cpu or cuda[:index], but got {device!r}") from error
