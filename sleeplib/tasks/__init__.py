"""The three tasks of the paper: what is read, what is asked, and an independent solver for each."""

from .base import Batch, Task, score
from .depo import Depo
from .gsm_infinite import GSMInfinite, Problem, solve_text
from .loader import stream
from .rollouts import khop_walk, rule110_history, rule110_rollout
from .rule110 import Rule110

TASKS = {"rule110": Rule110, "depo": Depo, "gsm_infinite": GSMInfinite}

__all__ = [
    "TASKS",
    "Batch",
    "Depo",
    "GSMInfinite",
    "Problem",
    "Rule110",
    "Task",
    "khop_walk",
    "rule110_history",
    "rule110_rollout",
    "score",
    "solve_text",
    "stream",
]
