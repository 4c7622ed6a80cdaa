"""Train one variant of the pocket model on rendered shards, within a wall-clock budget.

    python experiments/pocket/train.py --variant deep --data DATA --out OUT --minutes 9

One stage: every parameter from scratch, answers' cross-entropy plus the tower's patch and presence labels, plus, for
variants with taps, labels read from decoder states. Resumable (``--resume``); ``--init-from`` starts from exported
weights, which ``--num-layers`` may stretch to a deeper model.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from model import build_model, build_processor, build_tokenizer, export, load_weights, stretch
from network import AuxiliaryHeads, TrainingNetwork
from optim import build_optimizers
from safetensors.torch import load_file, save_file
from shards import PREFIX, SHARD_FAMILIES
from torch import Tensor

TAPS: dict[str, tuple[int, ...]] = {"deep": (6, 9), "shallow": (2, 5), "stretched": (), "describing": (), "plain": ()}
"""Decoder layers after which auxiliary heads read the text states, per variant."""

Cast = AbstractContextManager[object]


class Rows:
    """Rows of all shards found so far, in one growing buffer on the device."""

    def __init__(self, directory: Path, split: str, device: str, capacity: int):
        self.directory, self.split, self.device, self.capacity = directory, split, device, capacity
        self.seen: set[Path] = set()
        self.tensors: dict[str, Tensor] = {}
        self.count = 0

    def refresh(self, max_shards: int) -> None:
        """Load up to ``max_shards`` new shards."""
        new = sorted(set(self.directory.glob(f"{self.split}-*-?????.npz")) - self.seen)[:max_shards]
        for path in new:
            if self.count >= self.capacity:
                return
            with np.load(path) as shard:
                arrays = {name: torch.from_numpy(shard[name]) for name in shard.files}
            if not self.tensors:
                self.tensors = {
                    name: torch.zeros(self.capacity, *array.shape[1:], dtype=array.dtype, device=self.device)
                    for name, array in arrays.items()
                }
            rows = min(len(arrays["tokens"]), self.capacity - self.count)
            for name, array in arrays.items():
                self.tensors[name][self.count : self.count + rows] = array[:rows].to(self.device)
            self.count += rows
            self.seen.add(path)

    def batch(self, step: int, size: int, seed: int) -> dict[str, Tensor]:
        """A random batch that depends on (seed, step) and the rows loaded."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        index = torch.randint(self.count, (size,), generator=generator).to(self.device)
        return {name: tensor[index] for name, tensor in self.tensors.items()}

    def batches(self, size: int) -> Iterator[dict[str, Tensor]]:
        """All full batches in order."""
        for start in range(0, self.count - size + 1, size):
            yield {name: tensor[start : start + size] for name, tensor in self.tensors.items()}


def answer_logits(network: TrainingNetwork, states: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [N, vocabulary], target ids [N] and positions [N, 2] of all answer tokens."""
    positions = batch["answer"].nonzero()
    selected = states[positions[:, 0], positions[:, 1] - 1]
    logits = F.linear(selected, network.model.lm_head.weight).float()
    return logits, batch["tokens"][positions[:, 0], positions[:, 1]].long(), positions


@torch.no_grad()
def teacher_forced_accuracy(
    network: TrainingNetwork, rows: Rows, size: int, cast: Cast, cut_from: int | None = None
) -> dict[str, float]:
    """Share of questions with every answer token right given the true ones before it, per family."""
    right = torch.zeros(len(SHARD_FAMILIES), device=rows.device)
    total = torch.zeros(len(SHARD_FAMILIES), device=rows.device)
    for batch in rows.batches(size):
        with cast:
            states, _ = network(network.vision(batch["image"]), batch, (), cut_from)
            logits, target, positions = answer_logits(network, states, batch)
        wrong = (logits.argmax(-1) != target).float()
        question = positions[:, 0] * 128 + batch["segment"][positions[:, 0], positions[:, 1]].long()
        unique, inverse = question.unique(return_inverse=True)
        errors = torch.zeros(len(unique), device=rows.device).index_add_(0, inverse, wrong)
        family = torch.zeros(len(unique), dtype=torch.long, device=rows.device)
        family[inverse] = batch["family"][positions[:, 0], positions[:, 1]].long()
        right.index_add_(0, family, (errors == 0).float())
        total.index_add_(0, family, torch.ones_like(errors))
    return {name: (right[i] / total[i]).item() for i, name in enumerate(SHARD_FAMILIES) if total[i] > 0}


def save_checkpoint(
    path: Path,
    modules: dict[str, torch.nn.Module],
    optimizers: dict[str, torch.optim.Optimizer],
    step: int,
    elapsed_s: float,
) -> None:
    """Weights and optimizer state in one safetensors file, replaced atomically."""
    tensors = {f"{m}.{k}": v.detach().clone() for m, module in modules.items() for k, v in module.state_dict().items()}
    for name, optimizer in optimizers.items():
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"{name}/{index}/{key}": value.detach().clone() for key, value in state.items()}
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"step": str(step), "elapsed_s": str(elapsed_s)})
    partial.replace(path)


def load_checkpoint(
    path: Path, modules: dict[str, torch.nn.Module], optimizers: dict[str, torch.optim.Optimizer]
) -> tuple[int, float]:
    """Restore what ``save_checkpoint`` wrote; returns (step, elapsed seconds)."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    for name, module in modules.items():
        module.load_state_dict({k[len(name) + 1 :]: v for k, v in tensors.items() if k.startswith(name + ".")})
    for name, optimizer in optimizers.items():
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith(name + "/"):
                _, index, field = key.split("/")
                state.setdefault(int(index), {})[field] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(metadata["step"]), float(metadata["elapsed_s"])


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=sorted(TAPS), required=True)
    parser.add_argument("--data", type=Path, required=True, help="directory of shards; new ones are picked up")
    parser.add_argument("--out", type=Path, required=True, help="where the model directory and the curve go")
    parser.add_argument("--checkpoint", type=Path, default=None, help="default: OUT/checkpoint.safetensors")
    parser.add_argument("--minutes", type=float, required=True, help="wall-clock budget; the schedule ends with it")
    parser.add_argument("--batch-size", type=int, default=96, help="scenes per step")
    parser.add_argument("--max-scenes", type=int, default=250_000)
    parser.add_argument("--max-held", type=int, default=1024, help="scenes of the search split that accuracies are of")
    parser.add_argument("--min-scenes", type=int, default=4096, help="wait for so many before the first step")
    parser.add_argument("--muon-lr", type=float, default=0.01)
    parser.add_argument("--adamw-lr", type=float, default=2e-3)
    parser.add_argument("--vision-weight", type=float, default=0.5)
    parser.add_argument("--tap-weight", type=float, default=0.2)
    parser.add_argument("--decay-share", type=float, default=0.6, help="share of the budget with falling rates")
    parser.add_argument("--warm-up-steps", type=int, default=200)
    parser.add_argument("--eval-every-s", type=float, default=20.0)
    parser.add_argument("--save-every-s", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--init-from", type=Path, default=None, help="exported model.safetensors to start from")
    parser.add_argument("--num-layers", type=int, default=12, help="decoder layers; with --init-from: 12 to 24")
    parser.add_argument("--skip-profile", action="store_true", help="no accuracies with the image cut off")
    parser.add_argument("--resume", action="store_true")
    return parser.parse_args()


def rate_factor(step: int, progress: float, args: argparse.Namespace) -> float:
    """Share of the full learning rate: rising over the first steps, falling to .02 over the last part of the time."""
    return min(1.0, (step + 1) / args.warm_up_steps, max(0.02, (1 - progress) / args.decay_share))


def losses(
    network: TrainingNetwork, heads: AuxiliaryHeads, batch: dict[str, Tensor], args: argparse.Namespace, cast: Cast
) -> tuple[Tensor, Tensor, Tensor]:
    """The weighted total, the answers' cross-entropy and the tower's loss."""
    with cast:
        vision = network.vision(batch["image"])
        states, tapped = network(vision, batch, heads.taps)
        logits, target, _ = answer_logits(network, states, batch)
    answer_loss = F.cross_entropy(logits, target)
    vision_loss = heads.vision_loss(vision, batch["patches"], batch["presence"])
    total = answer_loss + args.vision_weight * vision_loss
    if heads.taps:
        total = total + args.tap_weight * heads.tap_loss(tapped, batch["middle"], batch["late"])
    return total, answer_loss, vision_loss


def wait_for_rows(rows: Rows, held: Rows, min_scenes: int) -> None:
    """Until the renderers have written so many training scenes; the search split comes first."""
    while rows.count < min(min_scenes, rows.capacity):
        rows.refresh(8)
        time.sleep(0.2)
    held.refresh(2)


def write_profile(network: TrainingNetwork, held: Rows, args: argparse.Namespace, cast: Cast) -> None:
    """``final.json``: accuracies, and those with the image cut off from each layer on."""
    final = teacher_forced_accuracy(network, held, args.batch_size, cast)
    profile = {
        str(layer): teacher_forced_accuracy(network, held, args.batch_size, cast, cut_from=layer)
        for layer in range(args.num_layers)
    }
    (args.out / "final.json").write_text(json.dumps({"accuracy": final, "cut_from": profile}, indent=1) + "\n")
    print(args.variant, "final", sum(final.values()) / len(final), json.dumps(final), flush=True)
    print(args.variant, "cut", {k: round(sum(v.values()) / len(v), 3) for k, v in profile.items()}, flush=True)


def main() -> None:
    args = parse_args()
    torch.set_float32_matmul_precision("high")
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    processor = build_processor(tokenizer)
    if args.init_from is None:
        model = build_model(tokenizer, args.seed, args.num_layers)
    else:
        model = stretch(load_weights(tokenizer, args.init_from), tokenizer, args.num_layers)
    model.to(args.device).train()
    heads = AuxiliaryHeads(128, 192, TAPS[args.variant]).to(args.device)
    network = TrainingNetwork(model, tokenizer(PREFIX).input_ids, args.compile).to(args.device)
    muon, adamw = build_optimizers(model, heads, args.muon_lr, args.adamw_lr)
    optimizers: dict[str, torch.optim.Optimizer] = {"muon": muon, "adamw": adamw}
    modules: dict[str, torch.nn.Module] = {"model": model, "heads": heads}
    checkpoint = args.checkpoint or args.out / "checkpoint.safetensors"
    step, earlier_s = 0, 0.0
    if args.resume and checkpoint.exists():
        step, earlier_s = load_checkpoint(checkpoint, modules, optimizers)
    cast: Cast = torch.autocast("cuda", torch.bfloat16) if args.device == "cuda" else nullcontext()
    rows = Rows(args.data, "train", args.device, args.max_scenes)
    held = Rows(args.data, "search", args.device, args.max_held)
    wait_for_rows(rows, held, args.min_scenes)
    description = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in _PATHS}
    description |= {"taps": list(heads.taps)}
    if args.init_from is not None:
        description["initial_weights"] = args.init_from.parent.name
    begin, budget_s = time.monotonic() - earlier_s, args.minutes * 60
    next_eval, next_save = earlier_s + args.eval_every_s, earlier_s + args.save_every_s
    with (args.out / "curve.jsonl").open("a" if args.resume else "w") as curve:
        while (elapsed := time.monotonic() - begin) < budget_s:
            factor = rate_factor(step, elapsed / budget_s, args)
            muon.param_groups[0]["lr"], adamw.param_groups[0]["lr"] = args.muon_lr * factor, args.adamw_lr * factor
            loss, answer_loss, vision_loss = losses(
                network, heads, rows.batch(step, args.batch_size, args.seed), args, cast
            )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in (muon, adamw):
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step += 1
            if step % 20 == 0 and rows.count < rows.capacity:
                rows.refresh(6)
            if elapsed >= next_eval:
                next_eval = elapsed + args.eval_every_s
                if not math.isfinite(answer_loss.item()):
                    raise FloatingPointError(
                        f"the loss is {answer_loss.item()} at step {step}; lower --muon-lr or --adamw-lr"
                    )
                accuracy = teacher_forced_accuracy(network, held, args.batch_size, cast)
                record = {
                    "seconds": round(elapsed, 1),
                    "step": step,
                    "scenes": rows.count,
                    "loss": round(answer_loss.item(), 4),
                    "vision_loss": round(vision_loss.item(), 4),
                    "mean": round(sum(accuracy.values()) / len(accuracy), 4),
                    "families": {k: round(v, 3) for k, v in accuracy.items()},
                }
                curve.write(json.dumps(record) + "\n")
                curve.flush()
                print(args.variant, json.dumps(record), flush=True)
            if elapsed >= next_save:
                next_save = elapsed + args.save_every_s
                export(model, processor, args.out, {**description, "steps": step, "finished": False})
                save_checkpoint(checkpoint, modules, optimizers, step, elapsed)
    finished = {"steps": step, "scenes": rows.count, "finished": True, "torch": torch.__version__}
    export(model, processor, args.out, {**description, **finished})
    if not args.skip_profile:
        write_profile(network, held, args, cast)


_PATHS = ("data", "out", "checkpoint", "device", "init_from")

if __name__ == "__main__":
    main()
