"""What can be scored without reading the context."""

import random
from collections import Counter
from functools import lru_cache
from itertools import product

import numpy as np

from .language import WORDS
from .problem import draw_bare, draw_until

MODES = ("forward", "reverse")
LEVELS = ("medium", "hard")
SAMPLE, BUDGET = 300, 4800  # most held-out problems, for each mode and op count and in all


def target_words(task, problem):
    """What should be answered, in words of the closed vocabulary."""
    steps = [*WORDS.findall(problem.solution), "<answer>"] if task.solution else []
    return [*steps, str(problem.answer)]


def sample_targets(task):
    """For each (mode, op count) what should be answered in a fixed sample of the test split, in words."""
    draw, cells = random.Random(13), {}
    counts = range(task.ops[0], task.ops[1] + 1)
    sample = min(SAMPLE, BUDGET // (len(task.modes) * len(counts)))
    for mode, ops in product(task.modes, counts):
        cells[mode, ops] = []
        for _ in range(sample):
            cell = dict(level=draw.choice(task.levels), theme=draw.choice(task.themes))
            bare = draw_until(draw_bare, draw, task, "test", mode=mode, ops=ops, **cell)
            cells[mode, ops].append(target_words(task, bare))
    return cells


@lru_cache
def estimate_chance(task):
    """See :meth:`GSMInfinite.chance`."""
    cells = {}
    for cell, found in sample_targets(task).items():
        words = Counter(word for target in found for word in target)
        share = np.array(list(words.values())) / words.total()
        best = float(share.max())
        loss = float(-(share * np.log(share)).sum())
        cells[cell] = dict(loss=loss, token=best, exact=0.0 if task.solution else best)
    return gather(task, cells)


def gather(task, cells):
    """The keys of a score from the loss, token and exact of each (mode, op count)."""
    counts = range(task.ops[0], task.ops[1] + 1)

    def mean(key, members):
        return float(np.mean([cells[member][key] for member in members]))

    result = {key: mean(key, cells) for key in ("loss", "token", "exact")}
    for ops in counts:
        groups = {f"{ops}": [(mode, ops) for mode in task.modes]}
        groups |= {f"{mode}-{ops}": [(mode, ops)] for mode in task.modes}
        for name, members in groups.items():
            result |= {f"{key}/{name}": mean(key, members) for key in ("loss", "exact")}
    return result
