"""GSM-Infinite: the generator, and a solver that reads its text."""

from .problem import Problem
from .solver import solve_text
from .task import GSMInfinite

__all__ = ["GSMInfinite", "Problem", "solve_text"]
