"""Task scores of full and pruned models."""

from dop_search.evaluation.accuracy import answer_questions, correct_answers

__all__ = ["answer_questions", "correct_answers"]
