"""IVC-Prune (ICLR 2026, arXiv 2602.03060): tokens whose values the question resembles, and those at special positions.

At the door of a middle layer the values of all rows are compared, ``softmax(v vᵀ / √d)``, mean over heads. Seeds are
the visual tokens that the question resembles most; value tokens those that question and seeds resemble most; position
tokens those whose rotary cosines, or sines, are largest on average, where rotation is nearest to the identity or to a
quarter turn: the decoder's own coordinates.

Published for LLaVA are shares of all tokens (1 %, 20 %, 5 % + 5 %), and what is kept is their union. Here the number of
kept tokens is given: value tokens, and a quarter as many positions of each kind, are added until they are as many. With
the published number the published set results.

Not reproduced: keys of layers below, which the released code takes out of the cache after the prefill (all but those of
layer 0); fixed shares of Qwen2.5-VL (10 % + 10 % positions of 50 % kept).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dop_search.pruning.in_decoder.base import StageRanking, StageSample, StageSelector, best_first
from dop_search.selectors.base import with_rest
from dop_search.strategy.operations import ModelDims


@dataclass(frozen=True)
class IvcPruneSelector(StageSelector):
    """Its stage is the layer below the one from which tokens are missing, whose values it compares.

    Args:
        seed_share: seeds among all visual tokens.
        positions_per_value: position tokens of each kind per value token.
        skipped_text: text tokens right after the image that do not count as the question.
    """

    name = "ivc_prune"
    seed_share: float = 0.01
    positions_per_value: float = 0.25
    skipped_text: int = 2

    def rank(self, sample: StageSample, num_kept: int, memory: Any) -> StageRanking:
        seeds, by_value = self.by_value(sample)
        by_cos, by_sin = (best_first(part.mean(dim=1)) for part in _turned(sample))
        chosen = seeds[:num_kept]
        for count in range(1, len(by_value) + 1):
            each = round(count * self.positions_per_value)
            # the last step may not fit whole: its value token comes before its positions
            more = with_rest(with_rest(with_rest(chosen, by_value[:count]), by_cos[:each]), by_sin[:each])
            chosen = more[:num_kept]
            if len(more) >= num_kept:
                break
        return StageRanking(with_rest(chosen, by_value))

    def by_value(self, sample: StageSample) -> tuple[Any, Any]:
        """Places of the seeds, best first, and of all candidates by what question and seeds resemble."""
        values, question = sample.values(), sample.text_after()
        if int(question.sum()) > self.skipped_text:
            question &= question.cumsum(0) > self.skipped_text
        asked = _resembled(values, sample.text)[question]
        seeds = best_first(asked.mean(dim=0)[sample.candidates])[: self.num_seeds(len(sample.candidates))]
        rows = sample.candidates[torch.from_numpy(seeds).to(sample.candidates.device)]
        resembled = torch.cat([_resembled(values, rows), asked]).mean(dim=0)
        return seeds, best_first(resembled[sample.candidates])

    def num_seeds(self, num_candidates: int) -> int:
        """Seeds among so many visual tokens."""
        return max(1, round(self.seed_share * num_candidates))

    def rank_flops(self, dims: ModelDims, num_text: int, num_rows: int, num_candidates: int, num_kept: int) -> int:
        """See base class: values of all rows, and those of text and seeds compared with them."""
        compared = num_text + self.num_seeds(num_candidates)
        return 2 * dims.kv_width * num_rows * (dims.hidden_size + compared)


def _turned(sample: StageSample) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the candidates' rotation against the sample's first row, which does not depend on padding.

    Halves are alike but for the sign of the sine, which is plain in the second.
    """
    cos, sin = (part[:, part.shape[1] // 2 :].float() for part in (sample.cos, sample.sin))
    rows = sample.candidates
    return cos[rows] * cos[0] + sin[rows] * sin[0], sin[rows] * cos[0] - cos[rows] * sin[0]


def _resembled(values: Tensor, rows: Tensor) -> Tensor:
    """How much some rows resemble each: ``[len(rows), num_rows]`` float32 of values ``[kv_heads, num_rows, dim]``."""
    scores = values.index_select(1, rows) @ values.transpose(1, 2)
    return (scores.float() * values.shape[2] ** -0.5).softmax(dim=-1).mean(dim=0)
