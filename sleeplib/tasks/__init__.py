"""The tasks of the paper, one of memory alone, each with a solver of its own; and any of them as text."""

from .base import Batch, Task, score
from .depo import Depo
from .gsm_infinite import GSMInfinite, Problem, solve_text
from .loader import stream
from .recall import Recall
from .rollouts import khop_walk, rule110_history, rule110_rollout
from .rule110 import Rule110
from .text import Text

TASKS = {"rule110": Rule110, "depo": Depo, "gsm_infinite": GSMInfinite, "recall": Recall}

__all__ = [
    "TASKS",
    "Batch",
    "Depo",
    "GSMInfinite",
    "Problem",
    "Recall",
    "Rule110",
    "Task",
    "Text",
    "khop_walk",
    "rule110_history",
    "rule110_rollout",
    "score",
    "solve_text",
    "stream",
]
