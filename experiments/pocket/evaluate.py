"""Accuracy of a packaged pocket model on the test split, by greedy generation with the Hugging Face model.

    python experiments/pocket/evaluate.py deep --num-samples 100 --image true

Adds one column to ``results.json``. ``--image blank`` shows a grey square, ``--image shuffled`` the image of another
question of the same family: what is right then is guessed, and should be near chance. ``--long-answers`` adds the
families with answers of 64 tokens and more, which the mean leaves out.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from dop_search.data.rendered import FAMILIES, LONG_FAMILIES, rendered_samples
from dop_search.data.rendered.questions import QUESTION_FAMILIES
from dop_search.data.samples import Sample, score_answer
from dop_search.models.pocket import POCKET_VARIANTS, pocket_path
from dop_search.models.prompts import model_inputs
from dop_search.utils.files import write_text_atomic
from dop_search.utils.progress import default_progress

IMAGES = ("true", "blank", "shuffled")
RESULTS = Path(__file__).parent / "results.json"
SEED = 0


def with_image(samples: Sequence[Sample], image: str) -> list[Sample]:
    """The samples with their own images, with grey ones, or each with the image of the next sample."""
    if image == "true":
        return list(samples)
    if image == "blank":
        return [replace(s, image=Image.new("RGB", s.image.size, (128, 128, 128))) for s in samples]
    following = [*samples[1:], samples[0]]
    return [replace(s, image=other.image) for s, other in zip(samples, following, strict=True)]


def chance(samples: Sequence[Sample]) -> float:
    """What the best constant guess gets that sees the question's form but no image, and no less than uniform guessing.

    Only ``relation`` has several forms: yes or no, left or right, above or below.
    """
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for sample in samples:
        stem = sample.question.splitlines()[0]
        form = next((form for form in ("left or to the right", "above or below") if form in stem), "")
        answers[form][sample.answers[0]] += 1
    majority = sum(max(counter.values()) for counter in answers.values()) / len(samples)
    accepted = {answer for answer in QUESTION_FAMILIES[samples[0].family].answers if answer}
    return max(majority, 1 / len(accepted) if accepted else 0.0)


@torch.inference_mode()
def predict(model: Any, processor: Any, samples: Sequence[Sample], max_new_tokens: int = 96) -> list[str]:
    """Greedy answers."""
    inputs = model_inputs(processor, samples, model.device)
    generated = model.generate(**inputs, max_new_tokens=max_new_tokens)[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(generated, skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", choices=POCKET_VARIANTS)
    parser.add_argument("--num-samples", type=int, default=100, help="per family")
    parser.add_argument("--image", choices=IMAGES, default="true")
    parser.add_argument("--long-answers", action="store_true", help=f"also {', '.join(LONG_FAMILIES)}")
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    processor = AutoProcessor.from_pretrained(pocket_path(args.variant))
    model = LlavaForConditionalGeneration.from_pretrained(pocket_path(args.variant)).eval()
    right, levels = {}, {}
    what = f"{args.variant}, {args.image} image"
    families = (*FAMILIES, *LONG_FAMILIES) if args.long_answers else FAMILIES
    with default_progress().task(what, total=len(families) * args.num_samples) as advance:
        for family in families:
            samples = rendered_samples("test", args.num_samples, SEED, [family])
            shown = with_image(samples, args.image)
            right[family] = 0
            for start in range(0, len(shown), args.batch_size):
                batch = shown[start : start + args.batch_size]
                answers = predict(model, processor, batch)
                right[family] += sum(score_answer(a, s) for a, s in zip(answers, batch, strict=True))
                advance(len(batch))
            levels[family] = chance(samples)
    accuracy = {family: right[family] / args.num_samples for family in families}
    mean, mean_chance = (round(sum(its[f] for f in FAMILIES) / len(FAMILIES), 4) for its in (accuracy, levels))
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    results.setdefault("accuracy", {}).setdefault(args.variant, {})[args.image] = {
        "split": "test",
        "seed": SEED,
        "num_samples_per_family": args.num_samples,
        "mean": mean,
        "mean_chance": mean_chance,
        "families": {f: round(accuracy[f], 4) for f in families},
        "chance": {f: round(levels[f], 4) for f in families},
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
    write_text_atomic(args.out, json.dumps(results, indent=1) + "\n")
    print(what, "mean", mean, accuracy)


if __name__ == "__main__":
    main()
