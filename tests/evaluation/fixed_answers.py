"""A model of lmms-eval that says what a test wants, and what is right or wrong for a row of each benchmark."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lmms_eval.api.model import lmms


class FixedAnswers(lmms):
    """Answers row ``doc_id`` by ``answer(row, doc_id)``; remembers the prompts."""

    is_simple = True

    def __init__(self, answer: Callable[[dict[str, Any], int], str]) -> None:
        super().__init__()
        self.answer = answer
        self.prompts: list[str] = []
        self.num_media: list[int] = []

    def generate_until(self, requests):
        answers = []
        for request in requests:
            prompt, _options, doc_to_visual, doc_id, task, split = request.args
            row = self.task_dict[task][split][doc_id]
            self.prompts.append(prompt)
            self.num_media.append(len(doc_to_visual(row)))
            answers.append(self.answer(row, doc_id))
        return answers

    def loglikelihood(self, requests):
        raise NotImplementedError

    def generate_until_multi_round(self, requests):
        raise NotImplementedError

    def clean(self) -> None:
        pass


def right_answer(benchmark: str, row: dict[str, Any]) -> str:
    if benchmark in ("scienceqa", "ai2d"):
        return "ABCDE"[int(row["answer"])]
    if benchmark == "ocrbench":
        return row["answer"][0]
    if benchmark == "hallusionbench":
        return "Yes" if row["gt_answer"] == "1" else "No"
    return str(row["answer"])


def wrong_answer(benchmark: str, row: dict[str, Any]) -> str:
    right = right_answer(benchmark, row)
    if right.lower() in ("yes", "no") and benchmark in ("pope", "mme", "hallusionbench"):
        return "No" if right.lower() == "yes" else "Yes"
    if right in tuple("ABCD") and benchmark in ("scienceqa", "ai2d", "mmbench_en", "mmbench_cn"):
        return "ABCD"["ABCD".index(right) - 1]
    return "99" if right != "99" else "98"
