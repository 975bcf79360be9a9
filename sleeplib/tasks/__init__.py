"""The three tasks of the paper: what is read, what is asked, and an independent solver for each."""

from .base import Batch
from .depo import Depo
from .gsm_infinite import GSMInfinite, Problem, solve_text
from .rule110 import Rule110
from .stream import stream

TASKS = {"rule110": Rule110, "depo": Depo, "gsm_infinite": GSMInfinite}

__all__ = ["TASKS", "Batch", "Depo", "GSMInfinite", "Problem", "Rule110", "solve_text", "stream"]
