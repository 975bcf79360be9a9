"""Text: the sequences of another task as plain text, for pretraining on the next token."""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from .base import IGNORE, Batch, ContextTask, check_batch_request

SAMPLE = 2048  # sequences that chance is estimated from


@dataclass(frozen=True)
class Text(ContextTask):
    """Every next token is a label, those of the answers too, and all is read awake, in one window.

    With a sequence of another task, whose label says that the answer is 3::

        that task's input   <pad> What is X ? X equals 3 . <answer>
        its label             .    .   .  . . .    .   . . 3
        label here           What  is  X  ? X equals 3 .  <answer> 3
        group here            0    0   0  0 0 0    0   0  0        1

    Parameters
    ----------
    of : ContextTask
        The task whose sequences are read: a frozen dataclass, and not a Text.

    Notes
    -----
    Padding is no label.  Groups are 1 at the task's own labels and 0 elsewhere, so that ``exact/1`` says how
    many answers a model gets right with the whole text in its cache.

    Chapter: 16_pretrained
    """

    of: ContextTask

    def __post_init__(self):
        if not isinstance(self.of, ContextTask) or isinstance(self.of, Text):
            raise TypeError(f"of must be a task such as GSMInfinite(...); got {self.of!r}")

    @property
    def vocab(self):
        """The tokens, those of the other task."""
        return self.of.vocab

    @property
    def length(self):
        """T, tokens in a sequence."""
        return self.of.length

    window = context = length  # nothing is slept on

    def batch(self, count, rng, split="train"):
        """Draw `count` sequences by a numpy Generator; returns a :class:`Batch` with groups."""
        inputs, own, _ = self.of.batch(check_batch_request(count, rng, split), rng, split)
        after = torch.cat((inputs[:, 1:], torch.full_like(inputs[:, :1], IGNORE)), dim=1)
        if "<pad>" in self.vocab:
            after[after == self.vocab.index("<pad>")] = IGNORE
        asked = own != IGNORE
        labels = torch.where(asked, own, after)
        return Batch(inputs, labels, torch.where(labels == IGNORE, IGNORE, asked.long()))

    def chance(self):
        """Score of a guess by how common each token is, in the text or among the answers: dict of float."""
        return dict(_chance(self))


@lru_cache
def _chance(task):
    batch = task.batch(SAMPLE, np.random.default_rng(12), "test")
    labels, groups = (x[batch.labels != IGNORE] for x in (batch.labels, batch.groups))
    logits = torch.empty(len(labels), task.vocab_size)
    for group in groups.unique().tolist():
        common = torch.bincount(labels[groups == group], minlength=task.vocab_size)
        logits[groups == group] = common.double().log().clamp(min=-math.log(1e9)).float()
    return task.score(logits, batch)
