"""sleeplib: language models that sleep.

Before its attention cache is cleared, a model makes N offline passes over the recent context and writes that
context into fast weights, by a learned local rule; then it wakes with an empty cache and answers in one pass.
"""

from . import experiments, presets, pretrained, tasks, threads
from .algorithm import evict, sleep, sleep_forward
from .evaluation import evaluate
from .interface import Sleepable
from .kernels import gated_delta_rule, gated_hebbian_rule
from .model import HybridLM, ModelConfig
from .records import load_records
from .runs import run
from .sleeper import Sleeper
from .state import LMState
from .training import Trainer

threads.sleep_soon()

__version__ = "0.1.0"

__all__ = ["HybridLM", "LMState", "ModelConfig", "Sleepable", "Sleeper", "Trainer", "evaluate", "evict"]
__all__ += ["experiments", "gated_delta_rule", "gated_hebbian_rule", "load_records", "presets", "pretrained"]
__all__ += ["run", "sleep", "sleep_forward", "tasks", "threads"]
