"""Checkpoints that are incomplete, damaged or at odds with themselves: found out before anything is computed with them.

transformers draws missing weights at random and says so in a log line only; here that is an error.
"""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open

from dop_search.data.samples import with_context
from dop_search.models.adapter import ModelAdapter
from dop_search.models.families import is_known
from dop_search.models.prompts import chat_prompt
from dop_search.models.quantization import meta_model
from dop_search.utils.errors import CheckpointError, DopError, UnsupportedModelError

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SETTINGS = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_LFS = b"version https://git-lfs.github.com/spec/"
_LFS_MAX_BYTES = 1024

_NEVER_READ = re.compile(
    r"rotary_emb\.inv_freq$|(^|\.)position_ids$|(^|\.)vision_(tower|model)\.(.+\.)?head\."
    r"|\.num_batches_tracked$"
)
"""Left-over weights that mean nothing: what old versions saved and is computed today, SigLIP's pooling head, and how
long a batch norm was trained."""
_QUANTISATION_STATE = re.compile(
    r"\.(g_idx|qzeros|scales|SCB|weight_format|absmax|quant_map|nested_\w+|quant_state\.\w+|\w*_scale(_inv)?|"
    r"\w*zero_point|weight_shape)$"
)
"""What quantisers save beside packed weights, and their newer versions do without."""

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_DEPTHS = frozenset({"num_hidden_layers", "num_layers", "n_layers", "depth"})
_NUM_SHOWN = 3

_DAMAGED = (
    "a file is missing, damaged or of another checkpoint: download or copy config.json, weights, tokenizer and "
    "processor files again"
)
_OTHER_IMAGES = (
    "its processor prepares other images than its vision tower reads: compare vision_feature_layer and vision_config "
    "in config.json with size, patch_size, vision_feature_select_strategy, num_additional_image_tokens and "
    "image_seq_length in processor_config.json"
)
_NOT_FOUND = (
    "without network access, point to a local copy: model.name_or_path=/path/to/checkpoint (a folder with config.json, "
    "weights and the processor's files), or use the bundled one: model=pocket"
)


@contextmanager
def explained(name: str, *, is_local: bool = True, remedy: str = _DAMAGED) -> Iterator[None]:
    """Turn whatever a library raises on the files of the checkpoint ``name`` into one sentence with a ``remedy``;
    CheckpointError instead of anything that is no :class:`DopError`."""
    try:
        yield
    except DopError:
        raise
    except ImportError as error:
        install = "install it (a quantised checkpoint needs the package of its quantiser), or take another checkpoint"
        raise _unusable(name, f"it needs a package that is not installed ({first_line(error)})", install) from error
    except torch.OutOfMemoryError as error:
        place = "set dtype=bfloat16, another device, or device_map=auto"
        raise _unusable(name, f"it does not fit the device ({first_line(error)})", place) from error
    except OSError as error:
        raise _unusable(name, first_line(error), remedy if is_local else _NOT_FOUND) from error
    except Exception as error:  # readers of JSON, tokenizers, templates and weights raise anything on damaged files
        raise _unusable(name, first_line(error), remedy) from error


def first_line(error: BaseException) -> str:
    """The first line of a message (two where it ends in a colon), with the error's kind if that is not known well."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])[:300]
    return text if text and isinstance(error, (OSError, ImportError)) else f"{type(error).__name__}: {text}"


def check_folder(folder: Path, name: str) -> int | None:
    """Look at the files of a local checkpoint; reads headers only, and executes nothing. CheckpointError naming the
    file and the remedy.

    Returns how many numbers its weights are; ``None`` for a model that no adapter covers, which is refused by its type.
    """
    pointers = sorted(path.name for path in folder.iterdir() if _is_lfs_pointer(path))
    if pointers:
        problem = f"in {str(folder)!r} are git-LFS pointers instead of files ({_some(pointers)})"
        raise _unusable(name, problem, "run `git lfs pull` there, or download the files")
    config = _config(folder, name)
    if not is_known(config.get("model_type")):
        return None
    for part, settings in {"config.json": config, "its text_config": config.get("text_config")}.items():
        if isinstance(settings, dict) and settings.get("return_dict") is False:
            raise _unusable(name, f"{part} says return_dict=false, which leaves its parts no names", "set it to true")
    for file in _SETTINGS:
        if (folder / file).is_file():
            _read_json(folder / file, name)
    stored = {key: kind for path in _weight_files(folder, name) for key, kind in _stored(path, name).items()}
    odd = [key for key, (_, dtype) in stored.items() if dtype not in _FLOATS and not _NEVER_READ.search(key)]
    if odd and "quantization_config" not in config:
        problem = f"{len(odd)} weights are stored as {stored[odd[0]][1]} without a quantization_config: {_some(odd)}"
        raise _unusable(name, problem, "save them in floating point, or add the configuration of their quantiser")
    sizes = [size for size, _ in stored.values()]
    for key, depth in _depths(config):
        if depth > len(sizes):
            problem = f"config.json says {key}={depth}, but only {len(sizes)} tensors are stored"
            raise _unusable(name, problem, "set it right")
    return sum(sizes)


def check_size(config: Any, num_stored: int, name: str) -> None:
    """Refuse a configuration of a far larger model than is stored, before memory is taken for what is missing;
    CheckpointError naming both sizes."""
    expected = sum(parameter.numel() for parameter in meta_model(config).parameters())
    if expected > 2 * num_stored:
        problem = f"config.json describes a model of {expected:,} weights, but only {num_stored:,} are stored"
        raise _unusable(name, problem, "set it right, or download the weights again")


def check_keys(report: Mapping[str, Collection[Any]], name: str, *, quantised: bool) -> None:
    """Refuse a model whose weights were not exactly those of its checkpoint; CheckpointError listing weights that are
    missing, left over, or of another shape.

    Args:
        report: of ``from_pretrained(output_loading_info=True)``; tied weights are not missing there.
        name: what the user calls the checkpoint.
        quantised: whether the checkpoint is.
    """
    unexpected = [key for key in report["unexpected_keys"] if not _NEVER_READ.search(key)]
    if quantised:
        unexpected = [key for key in unexpected if not _QUANTISATION_STATE.search(key)]
    shapes = [f"{key} (stored {list(a)}, expected {list(b)})" for key, a, b in report["mismatched_keys"]]
    found = [
        f"{len(keys)} {what}: {_some(keys)}"
        for keys, what in (
            (sorted(report["missing_keys"], key=_natural), "are missing"),
            (sorted(unexpected, key=_natural), "are left over"),
            (sorted(shapes, key=_natural), "have another shape"),
        )
        if keys
    ]
    if found:
        raise CheckpointError(
            f"cannot load {name!r}: its weights do not fit its config.json: {'; '.join(found)}. Missing ones would be "
            "random numbers. Set config.json right (num_hidden_layers and the like), download the weights again, or "
            "save the model anew by transformers' save_pretrained()"
        )


def check_generation(config: Any, name: str) -> None:
    """Refuse special tokens that are no tokens; CheckpointError naming the setting."""
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, key, None)
        for token in value if isinstance(value, (list, tuple)) else [value]:
            if token is not None and (isinstance(token, bool) or not isinstance(token, int)):
                problem = f"generation_config.json says {key}={value!r}, which is no number of a token"
                raise _unusable(name, problem, "set it right")


def check_processor(processor: Any, adapter: ModelAdapter, name: str) -> None:
    """Let the processor prepare one prompt with one image, or one context, and the vision tower encode it;
    CheckpointError if a part is missing or broken, or its tokens or images are not the model's."""
    needed = ("tokenizer", "image_processor") if adapter.has_tower else ("tokenizer",)
    parts = [part for part in needed if getattr(processor, part, None) is None]
    if parts:
        problem = f"its processor ({type(processor).__name__}) has no {' and no '.join(parts)}"
        files = "processor_config.json (or preprocessor_config.json), tokenizer.json, tokenizer_config.json"
        raise _unusable(name, problem, f"add {files}")
    if not getattr(processor, "chat_template", None):
        raise _unusable(name, "it has no chat template", "add chat_template.jinja of the original checkpoint")
    images = int(adapter.has_tower)
    if processor.tokenizer.pad_token_id is None:
        raise _unusable(name, "its tokenizer has no padding token", "set pad_token in tokenizer_config.json")
    with explained(name):
        question = "What is this, in three words?"
        prompt = chat_prompt(processor, question if adapter.has_tower else with_context("A text.", question), images)
        image = Image.new("RGB", (64, 64), (128, 128, 128))
        batch = processor(images=[image] * images, text=[prompt], padding=True, return_tensors="pt")
        ids = batch["input_ids"]
        largest, rows = int(ids.max()), adapter.dims.vocab_size
        is_visual = adapter.visual_token_mask(ids)
    if not bool(is_visual.any()):
        what = "image token" if images else "context"
        remedy = "take processor, tokenizer and chat template of the checkpoint that the weights are from"
        raise _unusable(name, f"its processor puts no {what} of the model into a prompt ({prompt!r})", remedy)
    if largest >= rows:
        remedy = "take the tokenizer of the checkpoint that the weights are from"
        raise _unusable(name, f"its tokenizer gives token {largest}, but the model has {rows} tokens", remedy)
    if images:
        _check_tower(batch, int(is_visual.sum()), adapter, name)


@torch.inference_mode()
def _check_tower(batch: Mapping[str, Any], num_tokens: int, adapter: ModelAdapter, name: str) -> None:
    encode = adapter.multimodal.get_image_features
    names, weight = inspect.signature(encode).parameters, next(adapter.vision_tower.parameters())
    if not adapter.casts_pixels and weight.dtype != torch.float32:
        raise UnsupportedModelError(
            f"{type(adapter.model).__name__} takes pixels in the dtype of its weights ({weight.dtype}), but its "
            "processor gives float32; use model.dtype=float32"
        )
    given = {key: value.to(weight.device) for key, value in batch.items() if key in names}
    with explained(name, remedy=_OTHER_IMAGES):
        encoded = encode(**given, return_dict=True)
        num_features = sum(part[..., 0].numel() for part in encoded.pooler_output)
    if num_features != num_tokens:
        problem = f"its processor makes room for {num_tokens} visual tokens where its vision tower gives {num_features}"
        raise _unusable(name, problem, _OTHER_IMAGES)


def _config(folder: Path, name: str) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            remedy = "load the base model, merge the adapter (merge_and_unload) and save that by save_pretrained()"
            raise _unusable(name, f"{str(folder)!r} holds a peft adapter, not a model", remedy)
        return {}
    return _read_json(path, name)


def _weight_files(folder: Path, name: str) -> list[Path]:
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    if (folder / _INDEX).is_file():
        weights = _read_json(folder / _INDEX, name).get("weight_map")
        if not isinstance(weights, dict) or not weights or not all(isinstance(file, str) for file in weights.values()):
            raise _unusable(name, f"{_INDEX} has no `weight_map` of files", "download it again")
        files = sorted({folder / file for file in weights.values()})
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            problem = f"of {len(files)} files of weights {len(missing)} are missing: {_some(missing)}"
            raise _unusable(name, problem, "download them")
        return files
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickled:
        raise _unusable(
            name,
            f"its weights are pickled ({_some(pickled)}), and reading those can run code",
            "convert them to safetensors where you trust them: load with transformers, then save_pretrained()",
        )
    raise _unusable(name, f"{str(folder)!r} has no weights ({_WEIGHTS} or {_INDEX})", "add them")


def _stored(path: Path, name: str) -> dict[str, tuple[int, str]]:
    """Each tensor of a file: how many numbers, and of what kind."""
    if path.stat().st_size == 0:
        raise _unusable(name, f"{path.name} is empty", "download it again")
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            return {key: (math.prod(part.get_shape()), part.get_dtype()) for key, part in slices.items()}
    except (OSError, SafetensorError) as error:
        raise _unusable(name, f"{path.name} is truncated or damaged ({error})", "download it again") from error


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _unusable(name, f"{path.name} is not JSON ({first_line(error)})", "download it again") from error
    if not isinstance(data, dict):
        raise _unusable(name, f"{path.name} must be a JSON object, but is {type(data).__name__}", "download it again")
    return data


def _depths(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Numbers of layers that a configuration names: building so many modules can take forever."""
    for key, value in config.items():
        if key in _DEPTHS and isinstance(value, int):
            yield key, value
        elif isinstance(value, dict):
            yield from _depths(value)


def _is_lfs_pointer(path: Path) -> bool:
    if not path.is_file() or path.stat().st_size > _LFS_MAX_BYTES:
        return False
    with open(path, "rb") as file:
        return file.read(len(_LFS)) == _LFS


def _unusable(name: str, problem: str, remedy: str) -> CheckpointError:
    return CheckpointError(f"cannot load {name!r}: {problem}; {remedy}")


def _some(names: Collection[str]) -> str:
    shown = list(names)[:_NUM_SHOWN]
    rest = len(names) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "")


def _natural(text: str) -> list[tuple[int, str]]:
    """Layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]
