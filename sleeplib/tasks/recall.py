"""Recall: pairs are read, window after window; then some are asked for, the newest and the oldest alike."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from ..checks import integer
from .base import IGNORE, Batch, ContextTask, check_batch_request


@dataclass(frozen=True)
class Recall(ContextTask):
    """How long does a memory last?  Each window shows some pairs; groups say how many naps ago one was read.

    With two windows of two pairs, and two questions::

        position   0  1  2  3   4  5  6  7   8  9  10 11
        input      k7 v0 k2 v3  k5 v3 k0 v1  k0 v1 k7 v0      a key, then its value
        label      .  .  .  .   .  .  .  .   v1 .  v0 .
        group      .  .  .  .   .  .  .  .   1  .  2  .       naps since it was read

    Parameters
    ----------
    pairs, windows : int
        Pairs in a window, and windows before the questions; a window has ``2 * pairs`` tokens.
    queries : int
        Pairs that are asked for, at most a window of them.
    keys, values : int
        Kinds of key and of value.  No key occurs twice in a sequence.

    Notes
    -----
    Not a task of the paper.  There is nothing to work out: it measures memory alone.  Both splits draw from
    all sequences, which are too many to meet one twice, unless the settings are tiny: each sequence gives its
    keys new values.

    Chapter: 15_argument
    """

    pairs: int = 2
    windows: int = 8
    queries: int = 2
    keys: int = 128
    values: int = 16

    def __post_init__(self):
        for name, low, high in (("pairs", 1, 1000), ("windows", 1, 10_000), ("values", 2, 10_000)):
            object.__setattr__(self, name, integer(name, getattr(self, name), low, high))
        shown = self.pairs * self.windows
        object.__setattr__(self, "queries", integer("queries", self.queries, 1, self.pairs))
        object.__setattr__(self, "keys", integer("keys", self.keys, shown, 1_000_000))

    @property
    def vocab(self):
        """The tokens: keys, then values."""
        return (*(f"k{i}" for i in range(self.keys)), *(f"v{i}" for i in range(self.values)))

    @property
    def window(self):
        """L, tokens between naps."""
        return 2 * self.pairs

    @property
    def context(self):
        """Tokens of pairs, before the questions."""
        return self.windows * self.window

    @property
    def length(self):
        """T, tokens in a sequence."""
        return self.context + 2 * self.queries

    def batch(self, count, rng, split="train"):
        """Draw `count` sequences by a numpy Generator; returns a :class:`Batch` with groups."""
        count, shown = check_batch_request(count, rng, split), self.pairs * self.windows
        order = rng.permuted(np.broadcast_to(np.arange(self.keys), (count, self.keys)), axis=1)
        pairs = np.empty((count, shown, 2), dtype=np.int64)
        pairs[..., 0] = order[:, :shown]
        pairs[..., 1] = self.keys + rng.integers(0, self.values, (count, shown))
        asked = rng.permuted(np.broadcast_to(np.arange(shown), (count, shown)), axis=1)[:, : self.queries]
        questions = np.take_along_axis(pairs, asked[..., None], axis=1)
        inputs = np.concatenate((pairs, questions), axis=1).reshape(count, self.length)
        labels, groups = np.full_like(inputs, IGNORE), np.full_like(inputs, IGNORE)
        labels[:, self.context :: 2] = questions[..., 1]
        groups[:, self.context :: 2] = self.windows - asked // self.pairs
        return Batch(*map(torch.from_numpy, (inputs, labels, groups)))

    def solve(self, inputs):
        """Labels from the visible tokens (B, T) alone; raise ValueError if a key was never shown."""
        inputs = self._check_inputs(inputs)
        labels = torch.full_like(inputs, IGNORE)
        for row, answers in zip(inputs.tolist(), labels):
            shown = dict(zip(row[: self.context : 2], row[1 : self.context : 2]))
            for position in range(self.context, self.length, 2):
                if row[position] not in shown:
                    raise ValueError(f"inputs: {self.vocab[row[position]]} is asked for and was not shown")
                answers[position] = shown[row[position]]
        return labels

    def chance(self):
        """Score of a guess that gives all values equal odds: dict of str to float."""
        loss, token = math.log(self.values), 1 / self.values
        scores = {"loss": loss, "token": token, "exact": token**self.queries}
        for group in range(1, self.windows + 1):
            scores |= {f"loss/{group}": loss, f"exact/{group}": token}
        return scores
