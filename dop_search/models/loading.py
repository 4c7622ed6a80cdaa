"""Load a checkpoint with its processor: the bundled model, a hub id or a local folder."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, PreTrainedModel

from dop_search.models.adapter import ModelAdapter
from dop_search.models.checkpoint import (
    check_folder,
    check_generation,
    check_keys,
    check_processor,
    check_size,
    explained,
)
from dop_search.models.families import TEXT_MODELS, adapter_class, adapter_for, auto_class
from dop_search.models.fingerprint import settings_fingerprint, weights_fingerprint
from dop_search.models.quantization import Quantization, quantization_config
from dop_search.models.text import MARKERS_KEY
from dop_search.models.text_processor import TextProcessor
from dop_search.utils.errors import DopError, MissingExtraError, UnsupportedModelError
from dop_search.utils.network import hub_is_reachable as hub_is_reachable

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""How accelerate may spread weights; a device takes all of them."""
_DEVICE_RULE = "`device` must be auto, cpu or cuda[:index]"
DEVICE_MAP_RULE = f"`device_map` must be one of {', '.join(DEVICE_MAPS)}, or a device"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LoadedModel:
    """A model with what belongs to it.

    Attributes:
        name: what the user asked for.
        model: the Hugging Face model, in evaluation mode.
        processor: tokenizer, image processor and chat template.
        adapter: what the framework knows about the family.
        weights_fingerprint: hash of architecture, dtype and a sample of every weight and saved buffer.
    """

    name: str
    model: PreTrainedModel
    processor: Any
    adapter: ModelAdapter = field(repr=False)
    weights_fingerprint: str

    @property
    def fingerprint(self) -> str:
        """Hash of everything that answers depend on, names caches."""
        return settings_fingerprint(self.weights_fingerprint, self.model, self.processor)


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
        name_or_path: ``"pocket"`` (bundled; ``"pocket/<variant>"`` for its other variants), ``"smollm2"`` and
            ``"smol_llava"`` (assembled from a package), a hub id or a local folder.
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
        CheckpointError: if the checkpoint cannot be found, is damaged, or if its weights, configuration and processor
            do not fit each other. Pickled weights are never read.
        MissingExtraError: ``device_map`` without accelerate.
        DopError: if a package that ``quantization`` needs is missing.
        UnsupportedModelError: if transformers does not know the checkpoint's format, if no adapter covers the model's
            class or vision tower, or if its decoder is offloaded.
    """
    if dtype not in {"auto", *DTYPES}:
        raise DopError(f"`dtype` must be one of {['auto', *DTYPES]}, but got {dtype!r}")
    if device_map is not None and importlib.util.find_spec("accelerate") is None:
        raise MissingExtraError("`device_map` needs accelerate; install with: pip install accelerate")
    source = checkpoint_source(name_or_path)
    target = _device(device)
    if isinstance(device_map, str) and device_map not in DEVICE_MAPS:
        _device(device_map, DEVICE_MAP_RULE)
    torch_dtype: Any = DTYPES.get(dtype, torch.float32 if target.type == "cpu" and device_map is None else "auto")
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    is_local = Path(source).is_dir()
    num_stored = check_folder(Path(source), name_or_path) if is_local else None
    if not is_local and not hub_is_reachable():
        options["local_files_only"] = True  # fail at once instead of retrying for minutes
    with explained(name_or_path, is_local=is_local):
        config = _config(source, options, name_or_path)
        is_quantised = hasattr(config, "quantization_config")
        if num_stored is not None and not is_quantised:
            check_size(config, num_stored, name_or_path)
        processor = load_processor(source, config, **options)
        if quantization is not None:
            options["quantization_config"] = quantization_config(quantization, config, torch_dtype)
            device_map = device_map or {"": target}  # packed where they are loaded: they cannot all be moved
        with _without_report():
            loading: Any = auto_class(config.model_type).from_pretrained(
                source,
                dtype=torch_dtype,
                device_map=device_map,
                attn_implementation=attn_implementation,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are reported with all others
                output_loading_info=True,
                **options,
            )
        model, report = loading
        check_generation(model.generation_config, name_or_path)
        check_keys(report, name_or_path, quantised=is_quantised or quantization is not None)
        if device_map is None:
            model.to(target)
    model.eval()
    if isinstance(processor, TextProcessor):
        setattr(model.config, MARKERS_KEY, processor.markers)
    adapter = adapter_for(model)
    adapter.check_decoder()
    check_processor(processor, adapter, name_or_path)
    processor.tokenizer.padding_side = "left"
    return LoadedModel(name_or_path, model, processor, adapter, weights_fingerprint(model))


def load_processor(source: str | Path, config: Any, **options: Any) -> Any:
    """The processor of a checkpoint; for models that read text alone their tokenizer, as one."""
    if config.model_type in TEXT_MODELS:
        return TextProcessor(AutoTokenizer.from_pretrained(source, **options))
    return AutoProcessor.from_pretrained(source, **options)


@contextmanager
def _without_report() -> Iterator[None]:
    """Without transformers' table of keys that do not fit: :func:`check_keys` says it."""
    logger = logging.getLogger("transformers.modeling_utils")

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def _config(source: str, options: dict[str, Any], name: str) -> Any:
    """The configuration of a model that an adapter covers."""
    try:
        config = AutoConfig.from_pretrained(source, **options)
    except ValueError as error:
        raise UnsupportedModelError(
            f"transformers cannot tell the model of {name!r}: {str(error).splitlines()[0]}\n"
            "A checkpoint in Hugging Face format is needed, whose config.json names a `model_type` that transformers "
            "knows: of a checkpoint in its authors' own format take the one on the hub that ends in -hf (as in "
            "llava-hf/llava-1.5-7b-hf, OpenGVLab/InternVL3-8B-hf), or convert it with the script in transformers' "
            "repository (src/transformers/models/FAMILY/convert_*.py)"
        ) from error
    adapter_class(config.model_type, repr(name)).check_config(config)
    return config


def checkpoint_source(name_or_path: str) -> str:
    """The folder of a bundled or local checkpoint, or the hub id; DopError if it is a folder or a variant that is not
    there."""
    name, _, variant = name_or_path.partition("/")
    if name_or_path == "smollm2":
        from dop_search.models.smollm2 import smollm2_path

        return str(smollm2_path())
    if name_or_path == "smol_llava":
        from dop_search.models.smol_llava import smol_llava_path

        return str(smol_llava_path())
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


def named_device(name: str, rule: str = _DEVICE_RULE) -> torch.device:
    """The device of a name, in this machine or another; DopError if it is no name of a device; begins with ``rule``."""
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise DopError(f"{rule}, but got {name!r}") from error


def _device(name: str, rule: str = _DEVICE_RULE) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = named_device(name, rule)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # not of this build of torch, or not in this machine
        raise DopError(f"{rule} of this machine, but got {name!r} ({shorten(str(error), 80)})") from error
    return device
