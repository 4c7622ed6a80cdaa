"""Accuracy of Smol-LLaVA by greedy generation with the Hugging Face model, and the gate that it has to pass.

    python -m experiments.smol_llava.evaluate --num-samples 40 --split test --out outputs/accuracy.json

The gate: with its image a mean of .7 or more over the nine families that it was taught (eight or more were asked for;
whole answers, formats of the benchmarks), and on a grey image a mean at chance.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import transformers
from transformers import AutoProcessor, LlavaForConditionalGeneration

from dop_search.data.rendered import rendered_samples
from dop_search.data.rendered.scenes import SPLITS
from dop_search.data.samples import score_answer
from dop_search.models.loading import checkpoint_source
from dop_search.utils.files import write_text_atomic
from dop_search.utils.progress import default_progress
from experiments.pocket.evaluate import IMAGES, SEED, chance, predict, with_image
from experiments.smol_llava.words import FAMILIES


def main() -> None:
    """Answer, count, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smol_llava")
    parser.add_argument("--num-samples", type=int, default=100, help="per family")
    parser.add_argument("--split", choices=SPLITS, default="search")
    parser.add_argument("--image", choices=IMAGES, nargs="+", default=["true", "blank"])
    parser.add_argument("--batch-size", type=int, default=10)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    source = checkpoint_source(args.model)
    processor = AutoProcessor.from_pretrained(source)
    model = LlavaForConditionalGeneration.from_pretrained(source, dtype=torch.float32).eval()
    results = {"split": args.split, "seed": SEED, "num_samples_per_family": args.num_samples, "accuracy": {}}
    families = tuple(FAMILIES)
    with default_progress().task("answers", total=len(families) * args.num_samples * len(args.image)) as advance:
        for image in args.image:
            right = dict.fromkeys(families, 0)
            for family in families:
                samples = rendered_samples(args.split, args.num_samples, SEED, [family])
                results.setdefault("chance", {})[family] = round(chance(samples), 4)
                shown = with_image(samples, image)
                for start in range(0, len(shown), args.batch_size):
                    batch = shown[start : start + args.batch_size]
                    answers = predict(model, processor, batch, max_new_tokens=8)
                    right[family] += sum(score_answer(a, s) for a, s in zip(answers, batch, strict=True))
                    advance(len(batch))
            shares = {family: round(value / args.num_samples, 4) for family, value in right.items()}
            results["accuracy"][image] = {"mean": round(sum(shares.values()) / len(shares), 4), "families": shares}
            print(image, results["accuracy"][image], flush=True)
    results |= {"transformers": transformers.__version__, "torch": torch.__version__}
    write_text_atomic(args.out, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
