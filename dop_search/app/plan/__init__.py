"""What a search would hold and compute, known before anything is loaded: ``dop-search … plan=true``."""

from dop_search.app.plan.plan import Plan, Stage, make_plan
from dop_search.app.plan.show import show_plan

__all__ = ["Plan", "Stage", "make_plan", "show_plan"]
