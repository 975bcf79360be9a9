"""Rule 110: read a few rings of cells, then say what the first cell of each becomes after t steps."""

import dataclasses
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from ..checks import integer
from .base import IGNORE, Batch, ContextTask, check_batch_request
from .rollouts import rule110_rollout

HELD_OUT = 8  # one ring in HELD_OUT belongs to the test split
SAMPLE, BUDGET = 1_000_000, 10**9  # rings that chance is estimated from; limit on rings times steps


def _in_split(rows, width, split):
    """Which packed rings (uint64) belong to a split, by a fixed hash of the cells."""
    if width < 8:
        return np.ones(rows.shape, dtype=bool)
    with np.errstate(over="ignore"):
        mixed = (rows + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
        mixed ^= mixed >> np.uint64(29)
        mixed *= np.uint64(0x94D049BB133111EB)
    return ((mixed >> np.uint64(40)) % np.uint64(HELD_OUT) == 0) == (split == "test")


@dataclass(frozen=True)
class Rule110(ContextTask):
    """The automaton task of section 6.1.

    A ring is `width` tokens, one for each cell.  After `strings` rings the model is asked for the first cell
    of each after `steps` steps, teacher-forced.  With two rings of four cells and one step::

        position   0 1 2 3   4 5 6 7   8         9
        input      0 1 1 0   1 0 0 1   <answer>  1        0 1 1 0 becomes 1 1 1 0
        label      . . . .   . . . .   1         1        1 0 0 1 becomes 1 0 1 1

    Parameters
    ----------
    width : int
        Cells in a ring, 3 to 63; also the window L.
    strings : int
        Rings in a sequence.
    steps : int
        Steps t of the rollout.

    Notes
    -----
    Rings are split by a hash of their cells: one in eight is never seen in training.  There are too few rings
    of fewer than eight cells to split; of those both splits draw from all.

    Chapter: 11_rule110
    """

    width: int = 24
    strings: int = 4
    steps: int = 32

    def __post_init__(self):
        for name, low, high in (("width", 3, 63), ("strings", 1, 1000), ("steps", 0, 100_000)):
            object.__setattr__(self, name, integer(name, getattr(self, name), low, high))

    @property
    def vocab(self):
        """The tokens: two kinds of cell, the mark before the answers, padding."""
        return ("0", "1", "<answer>", "<pad>")

    @property
    def window(self):
        """L, tokens between naps: one ring."""
        return self.width

    @property
    def context(self):
        """Tokens of rings, before the mark that asks."""
        return self.strings * self.width

    @property
    def length(self):
        """T, tokens in a sequence."""
        return self.context + self.strings

    def batch(self, count, rng, split="train"):
        """Draw `count` sequences.

        Parameters
        ----------
        count : int
            B.
        rng : numpy.random.Generator
        split : {"train", "test"}

        Returns
        -------
        Batch
        """
        count, context = check_batch_request(count, rng, split), self.context
        rows = self._rings(count * self.strings, rng, split)
        cells = (rows[:, None] >> np.arange(self.width, dtype=np.uint64)) & np.uint64(1)
        answers = (rule110_rollout(rows, self.width, self.steps) & np.uint64(1)).reshape(count, self.strings)
        inputs = np.empty((count, self.length), dtype=np.int64)
        inputs[:, :context] = cells.reshape(count, context)
        inputs[:, context] = self.vocab.index("<answer>")
        inputs[:, context + 1 :] = answers[:, :-1]
        labels = np.full_like(inputs, IGNORE)
        labels[:, context:] = answers
        return Batch(torch.from_numpy(inputs), torch.from_numpy(labels))

    def _rings(self, count, rng, split):
        """Draw packed rings (count,) of one split, uniformly."""
        share = 1 / HELD_OUT if split == "test" else 1 - 1 / HELD_OUT
        found, missing = [], count
        while missing > 0:
            rows = rng.integers(0, 1 << self.width, int(missing / share * 1.02) + 64, dtype=np.uint64)
            rows = rows[_in_split(rows, self.width, split)][:missing]
            found.append(rows)
            missing -= rows.size
        return np.concatenate(found)

    def solve(self, inputs):
        """Answer from the visible cells alone, by the rule's truth table (not by the generator's arithmetic).

        Parameters
        ----------
        inputs : torch.Tensor of int64, shape (B, T)

        Returns
        -------
        torch.Tensor of int64, shape (B, T)
            Labels, -100 where nothing is asked.

        Raises
        ------
        TypeError, ValueError
            If `inputs` are not tokens of this task.
        """
        inputs, context = self._check_inputs(inputs), self.context
        cells = inputs[:, :context].numpy().reshape(-1, self.strings, self.width)
        if (cells > 1).any() or (inputs[:, context] != self.vocab.index("<answer>")).any():
            raise ValueError(f"inputs must show cells 0 and 1, and <answer> at position {context}")
        table = {(1, 1, 1): 0, (1, 1, 0): 1, (1, 0, 1): 1, (1, 0, 0): 0}
        table |= {(0, 1, 1): 1, (0, 1, 0): 1, (0, 0, 1): 1, (0, 0, 0): 0}
        for _ in range(self.steps):
            left, right = np.roll(cells, 1, axis=-1), np.roll(cells, -1, axis=-1)
            after = np.zeros_like(cells)
            for pattern, cell in table.items():
                here = (left == pattern[0]) & (cells == pattern[1]) & (right == pattern[2])
                after[here] = cell
            cells = after
        labels = torch.full_like(inputs, IGNORE)
        labels[:, context:] = torch.from_numpy(cells[:, :, 0])
        return labels

    def chance(self):
        """Score of the best answer that ignores the context: the commoner cell, always.

        Returns
        -------
        dict of str to float
            ``loss``, ``token`` and ``exact``, over the test split: counted over all its rings up to 16 cells,
            else estimated from a fixed sample: a million rings, fewer where `steps` is above 1,000.
        """
        return dict(_chance(dataclasses.replace(self, strings=1), self.strings))


@lru_cache
def _chance(ring, strings):
    if ring.width <= 16:
        rows = np.arange(1 << ring.width, dtype=np.uint64)
        rows = rows[_in_split(rows, ring.width, "test")]
    else:
        rows = ring._rings(min(SAMPLE, BUDGET // max(ring.steps, 1)), np.random.default_rng(110), "test")
    one = float((rule110_rollout(rows, ring.width, ring.steps) & np.uint64(1)).mean())
    best = max(one, 1 - one)
    entropy = sum(-p * np.log(p) for p in (one, 1 - one) if p > 0)
    return {"loss": float(entropy), "token": best, "exact": best**strings}
