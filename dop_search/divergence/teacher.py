"""What the full model said: its greedy answers and its log-probabilities where it said them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dop_search.data.samples import Sample, ValidationSet, alike_batches, no_answer
from dop_search.divergence.encoding import EncodedSample, encode, full_states
from dop_search.divergence.footprint import Footprint, num_patches, tower_bytes
from dop_search.divergence.memory import Memory, count_told, empty_caches, free_bytes, is_out_of_memory, release_all
from dop_search.models.adapter import ModelAdapter
from dop_search.models.generation import end_tokens, plain_generation
from dop_search.models.loading import LoadedModel
from dop_search.models.prompts import image_tokens_checked, model_inputs, sample_prompt
from dop_search.pruning.choosing import Chooser, inputs_from_file, inputs_to_file
from dop_search.selectors import Selector
from dop_search.utils.errors import CacheError, MemoryLimitError, NumericalError
from dop_search.utils.files import write_atomic

FORMAT = "dop_search.teacher"
VERSION = 4
Progress = Callable[[int, int], None]
_TENSORS = ("embeds", "position_ids", "visual")


@dataclass(frozen=True, eq=False)
class TeacherSample:
    """One sample with the full model's view of its answer.

    Attributes:
        id: the sample's id.
        encoded: what the decoder receives.
        answer_ids: teacher-forced answer tokens, end-of-sequence included where the model said it.
        log_probs: ``[num_answer_tokens, vocab_size]`` float32 log-probabilities of the full model.
    """

    id: str
    encoded: EncodedSample
    answer_ids: tuple[int, ...]
    log_probs: Tensor

    def __post_init__(self) -> None:
        count_told(self)

    @property
    def nbytes(self) -> int:
        """Host memory that it takes."""
        return self.encoded.nbytes + self.log_probs.nbytes


@dataclass(frozen=True)
class Teacher:
    """The full model on a validation set. Its tensors are in host memory; what is computed with them is moved.

    Attributes:
        samples: in the order of the validation set.
        fingerprint: names everything that they depend on.
        selector: what ranked the visual tokens; strategies with another selector cannot be scored.
    """

    samples: tuple[TeacherSample, ...]
    fingerprint: str
    selector: Selector

    @property
    def nbytes(self) -> int:
        """Host memory that it takes."""
        return sum(sample.nbytes for sample in self.samples)


def teacher_fingerprint(
    loaded: LoadedModel, data: ValidationSet, selector: Selector, max_new_tokens: int, answers: str
) -> str:
    """Names everything that the teacher depends on."""
    parts = [
        FORMAT,
        VERSION,
        loaded.fingerprint,
        data.fingerprint,
        f"{selector!r}, version {selector.version}",
        max_new_tokens,
        answers,
        torch.__version__.split("+")[0],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def make_teacher(
    loaded: LoadedModel,
    data: ValidationSet,
    selector: Selector,
    *,
    max_new_tokens: int = 16,
    answers: str = "teacher",
    batch_size: int = 16,
    memory: Memory = "auto",
    cache_dir: Path | None = None,
    answer_ids: Sequence[Sequence[int]] | None = None,
    on_progress: Progress | None = None,
) -> Teacher:
    """Ask the full model, or read its answers from the cache.

    Args:
        loaded: the full model.
        data: validation samples.
        selector: ranks the visual tokens.
        max_new_tokens: longest answer, in tokens.
        answers: ``"teacher"`` (the model's own greedy answers, label-free) or ``"ground_truth"``.
        batch_size: most samples per generation call.
        memory: GiB on the decoder's device, weights included, or ``auto``; a call takes fewer samples where need be.
        cache_dir: where the teacher is kept by fingerprint; ``None`` keeps nothing.
        answer_ids: the answers, where a teacher of the same model, data and ``answers`` has them already: they do not
            depend on the selector.
        on_progress: called with (done, total) samples.

    Raises:
        CacheError: if the cached file is corrupt or foreign.
        NumericalError: if the full model's logits are not finite.
    """
    fingerprint = teacher_fingerprint(loaded, data, selector, max_new_tokens, answers)
    path = None if cache_dir is None else cache_dir / f"teacher-{fingerprint}.safetensors"
    if path is not None and path.exists():
        return _read(path, fingerprint, data, loaded.adapter, selector)
    observed: dict[int, TeacherSample] = {}
    for batch in alike_batches(data.samples, batch_size):
        if answer_ids is None:
            ids = _answer_ids(loaded, [data.samples[index] for index in batch], max_new_tokens, answers, memory)
        else:
            ids = [list(answer_ids[index]) for index in batch]
        for index, answer in zip(batch, ids, strict=True):
            observed[index] = _observe(loaded, data.samples[index], answer, selector)
            if on_progress is not None:
                on_progress(len(observed), len(data))
    teacher = Teacher(tuple(observed[index] for index in range(len(data))), fingerprint, selector)
    if path is not None:
        write_atomic(path, lambda temporary: _write(temporary, teacher))
    return teacher


def _answer_ids(
    loaded: LoadedModel, batch: Sequence[Sample], max_new_tokens: int, answers: str, memory: Memory
) -> list[list[int]]:
    end = end_tokens(loaded)
    if answers == "ground_truth":
        own = loaded.processor.tokenizer.eos_token_id
        last = [own] if own in end else end[:1]
        return [[*annotated_ids(loaded, sample)[:max_new_tokens], *last] for sample in batch]
    return [cut_at_end(row, end) for row in generate_ids(loaded, batch, max_new_tokens, memory)]


@torch.inference_mode()
def generate_ids(
    loaded: LoadedModel, batch: Sequence[Sample], max_new_tokens: int, memory: Memory = "auto"
) -> list[list[int]]:
    """Greedy answers of the model as it is, without the prompt; may end in padding. MemoryLimitError if not even one
    sample fits.

    Plainly greedy, see :func:`plain_generation`: what a checkpoint ships besides (penalties, suppressed tokens) is no
    part of the output distribution that strategies are compared by. A batch whose keys and values do not fit
    ``memory`` is split.
    """
    inputs = model_inputs(loaded.processor, batch, loaded.adapter.device)
    length, free = inputs["input_ids"].shape[1], free_bytes(loaded.adapter, memory)
    footprint, tower, config = Footprint.of(loaded.adapter), 0, loaded.model.config
    if "pixel_values" in inputs:
        patches = num_patches(inputs["pixel_values"].numel() // len(batch), loaded.adapter)
        tower = tower_bytes(config, loaded.adapter.tower_width, patches, footprint.element)
    together = footprint.generated_together(free, length, max_new_tokens, tower)
    if len(batch) <= together:
        try:
            return _generate(loaded, inputs, max_new_tokens)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            message = str(error).splitlines()[0]
        together = (len(batch) + 1) // 2
        if len(batch) == 1 and not release_all():
            raise MemoryLimitError(
                f"generating the answer to one prompt of {length} tokens does not fit the memory of "
                f"{loaded.adapter.device} ({message}); load the model in half precision or with model.quantization"
            )
        empty_caches(loaded.adapter.device)
    del inputs
    parts = [batch[start : start + together] for start in range(0, len(batch), together)]
    return [row for part in parts for row in generate_ids(loaded, part, max_new_tokens, memory)]


def _generate(loaded: LoadedModel, inputs: dict[str, Tensor], max_new_tokens: int) -> list[list[int]]:
    model: Any = loaded.model
    with plain_generation(loaded), image_tokens_checked():
        output = model.generate(**inputs, max_new_tokens=max_new_tokens)
    rows: list[list[int]] = output[:, inputs["input_ids"].shape[1] :].tolist()
    return rows


def annotated_ids(loaded: LoadedModel, sample: Sample) -> list[int]:
    """The first annotated answer as it follows the prompt, which decides whether there is a space in front of it;
    DataError if no answer is known."""
    if not sample.answers:
        raise no_answer(f"the sample {sample.id!r}")
    tokenizer = loaded.processor.tokenizer
    prompt = sample_prompt(loaded.processor, sample)
    answer = sample.answers[0] if prompt[-1:].isspace() else " " + sample.answers[0]
    before, both = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, prompt + answer))
    if both[: len(before)] == before:
        return list(both[len(before) :])
    return list(tokenizer(answer, add_special_tokens=False)["input_ids"])  # the prompt's last token takes part of it


def cut_at_end(ids: Sequence[int], end: Sequence[int]) -> list[int]:
    """The answer up to and including its first end-of-sequence token."""
    for index, token in enumerate(ids):
        if token in end:
            return list(ids[: index + 1])
    return list(ids)


@torch.inference_mode()
def _observe(loaded: LoadedModel, sample: Sample, answer: list[int], selector: Selector) -> TeacherSample:
    inputs = model_inputs(loaded.processor, [sample], loaded.adapter.device)
    encoded = encode(loaded.adapter, inputs, answer, selector).to_host()
    hidden = full_states(loaded.adapter, encoded)[encoded.prompt_length - 1 :]
    logits = loaded.adapter.logits(hidden).float()
    if not bool(torch.isfinite(logits).all()):
        raise NumericalError(
            f"the full model's logits for sample {sample.id!r} are not finite (dtype {loaded.model.dtype}); "
            "load the model with dtype=bfloat16 or float32"
        )
    return TeacherSample(sample.id, encoded, tuple(answer), logits.log_softmax(dim=-1).cpu())


def _write(path: Path, teacher: Teacher) -> None:
    tensors: dict[str, Tensor] = {}
    facts: list[dict[str, Any]] = []
    for index, sample in enumerate(teacher.samples):
        encoded = sample.encoded
        tensors |= {f"{index}.{name}": getattr(encoded, name).contiguous() for name in _TENSORS}
        tensors[f"{index}.ranking"] = torch.from_numpy(np.ascontiguousarray(encoded.ranking))
        tensors[f"{index}.log_probs"] = sample.log_probs.contiguous()
        for layer, features in enumerate(encoded.deepstack):
            tensors[f"{index}.deepstack.{layer}"] = features.contiguous()
        fact: dict[str, Any] = {
            "id": sample.id,
            "answer_ids": sample.answer_ids,
            "prompt_length": encoded.prompt_length,
            "deepstack": len(encoded.deepstack),
            "images": encoded.images,
        }
        if encoded.chooser is not None:
            kept, fact["selector_inputs"] = inputs_to_file(encoded.chooser.inputs)
            tensors |= {f"{index}.{name}": tensor for name, tensor in kept.items()}
        facts.append(fact)
    metadata = {"format": FORMAT, "fingerprint": teacher.fingerprint, "samples": json.dumps(facts)}
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:  # a full disk, in words only
        raise OSError(str(error)) from error


def _read(path: Path, fingerprint: str, data: ValidationSet, adapter: ModelAdapter, selector: Selector) -> Teacher:
    remedy = "delete it, or choose another cache_dir, and run again"
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT or metadata.get("fingerprint") != fingerprint:
                raise CacheError(f"{str(path)!r} belongs to another model, data set or version; {remedy}")
            facts = json.loads(metadata["samples"])
            if tuple(fact["id"] for fact in facts) != data.ids:
                raise CacheError(f"{str(path)!r} holds other samples than the validation set; {remedy}")
            samples = tuple(_read_sample(file, index, fact, adapter, selector) for index, fact in enumerate(facts))
    except SafetensorError as error:
        raise CacheError(f"{str(path)!r} is corrupt ({error}); {remedy}") from error
    return Teacher(samples, fingerprint, selector)


def _read_sample(
    file: Any, index: int, fact: dict[str, Any], adapter: ModelAdapter, selector: Selector
) -> TeacherSample:
    encoded = EncodedSample(
        **{name: file.get_tensor(f"{index}.{name}") for name in _TENSORS},
        prompt_length=fact["prompt_length"],
        ranking=file.get_tensor(f"{index}.ranking").cpu().numpy(),
        deepstack=tuple(file.get_tensor(f"{index}.deepstack.{layer}") for layer in range(fact["deepstack"])),
        images=tuple(fact["images"]),
    )
    if "selector_inputs" in fact:
        names = set(file.keys())
        inputs = inputs_from_file(
            fact["selector_inputs"],
            lambda name: file.get_tensor(f"{index}.{name}") if f"{index}.{name}" in names else None,
        )
        encoded = replace(encoded, chooser=Chooser(adapter, selector, inputs))
    return TeacherSample(fact["id"], encoded, tuple(fact["answer_ids"]), file.get_tensor(f"{index}.log_probs"))
