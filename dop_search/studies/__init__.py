"""Studies: tables that answer a question about operation pruning, measured row by row and resumable."""

from dop_search.studies.registry import STUDIES, run_study
from dop_search.studies.results import ResultFile
from dop_search.studies.workbench import Workbench

__all__ = ["STUDIES", "ResultFile", "Workbench", "run_study"]
