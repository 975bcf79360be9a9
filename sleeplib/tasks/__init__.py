"""The three tasks of the paper: what is read, what is asked, and an independent solver for each."""

from .base import Batch
from .depo import Depo
from .rule110 import Rule110

TASKS = {"rule110": Rule110, "depo": Depo}

__all__ = ["TASKS", "Batch", "Depo", "Rule110"]
