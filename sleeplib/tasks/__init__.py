"""The three tasks of the paper: what is read, what is asked, and an independent solver for each."""

from .base import Batch
from .rule110 import Rule110

TASKS = {"rule110": Rule110}

__all__ = ["TASKS", "Batch", "Rule110"]
