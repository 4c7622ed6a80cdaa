"""How far a strategy's output distribution is from the full model's."""

from dop_search.divergence.engine import Divergence, DivergenceEngine, kl_divergence
from dop_search.divergence.memory import Memory
from dop_search.divergence.teacher import Teacher, TeacherSample, make_teacher

__all__ = ["Divergence", "DivergenceEngine", "Memory", "Teacher", "TeacherSample", "kl_divergence", "make_teacher"]
