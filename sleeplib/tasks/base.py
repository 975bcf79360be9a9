"""What all tasks share: the batch and the score."""

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F

from ..checks import integer

IGNORE = -100
SPLITS = ("train", "test")


class Batch(NamedTuple):
    """Sequences and what is asked of them.

    Parameters
    ----------
    inputs : torch.Tensor of int64, shape (B, T)
        Tokens.
    labels : torch.Tensor of int64, shape (B, T)
        The answer wanted at each position, -100 where nothing is asked.
    groups : torch.Tensor of int64, shape (B, T), or None
        What scores are split by: hops, operations, naps.

    Notes
    -----
    Chapter: 11_rule110
    """

    inputs: torch.Tensor
    labels: torch.Tensor
    groups: torch.Tensor | None = None


@runtime_checkable
class Task(Protocol):
    """What a trainer asks of a task; any object with these members will do.

    A task draws sequences of tokens and says at which positions an answer is wanted.  The sequence is cut
    into windows; a model sleeps on a window where nothing is asked, and answers where something is.

    Attributes
    ----------
    vocab : tuple of str
        The text of each token.
    vocab_size : int
        ``len(vocab)``; the model's must be the same.
    window : int
        L, tokens between naps.
    length : int
        T, tokens in a sequence, the same in every batch.

    Notes
    -----
    The rules:

    - A batch is a function of `count`, of the state of `rng` and of `split` alone, so that every N reads the
      same.  What is in "test" is never in "train", or the task says why.
    - ``labels[b, t]`` is the answer wanted once ``inputs[b, : t + 1]`` has been read, -100 where nothing is
      asked.  It must not be visible there: ``inputs`` may show it at ``t + 1`` at the earliest.
    - All rows are asked something in the same windows, and every batch in the same windows as the first one.
    - ``groups``, if not None, holds an integer for each label: what scores are split by.
    - `score` and `chance` have the same keys: loss, token, exact, and exact/<group>, loss/<group>.
    - ``solve(inputs)``, which gives labels from the visible tokens alone, is not needed for training.  Write
      one all the same: it tells a wrong generator from a hard task.
    - To be kept in a run record a task is a frozen dataclass whose fields are plain data.

    Chapter: 11_rule110
    """

    vocab: tuple
    vocab_size: int
    window: int
    length: int

    def batch(self, count, rng, split="train"):
        """Draw `count` sequences of "train" or "test" by a numpy Generator, as a :class:`Batch`."""

    def score(self, logits, batch):
        """Score logits (B, T, vocab), or (labels, vocab), on a batch: dict of str to float."""

    def chance(self):
        """The score of an answer that uses little of the context or none of it: dict of str to float."""


class ContextTask:
    """What the tasks of the book share: `context` tokens are read, then something is asked.

    Notes
    -----
    Chapter: 11_rule110
    """

    @property
    def vocab_size(self):
        """How many tokens there are."""
        return len(self.vocab)

    def score(self, logits, batch):
        """Score logits (B, T, vocab), or only those of labels (labels, vocab), on a batch.

        ``loss``, ``token`` and ``exact`` (all labels right).  With groups also ``exact/<group>``, over whole
        answers, and ``loss/<group>``, over tokens.
        """
        return score(logits, batch)

    def check_asked(self, position):
        """Raise ValueError if a stream was read in part only, or too far, for a question at this point.

        Parameters
        ----------
        position : int
            Tokens read so far: ``state.position``, or ``sleeper.state.position``.  Those that lie in the
            window of the question itself may still be missing.
        """
        windows = self.context // self.window
        if not windows * self.window <= integer("position", position, 0) < self.length:
            raise ValueError(
                f"position: {position} tokens were read; the question comes after {self.context}, so sleep "
                f"on {windows} windows of {self.window} first"
            )

    def _check_inputs(self, inputs):
        """Return `inputs` as an int64 tensor on the CPU, and raise unless they are tokens (B, T)."""
        try:
            inputs = torch.as_tensor(inputs).to_dense().cpu()
        except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:  # the last by device meta
            raise TypeError(f"inputs must be an int64 tensor; got {type(inputs).__name__}") from error
        if inputs.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
            raise TypeError(f"inputs must be an int64 tensor; got {inputs.dtype}")
        if inputs.ndim != 2 or inputs.shape[1] != self.length:
            raise ValueError(f"inputs must have shape (B, {self.length}); got {tuple(inputs.shape)}")
        if inputs.numel() and not 0 <= inputs.min() <= inputs.max() < self.vocab_size:
            raise ValueError(f"inputs must hold tokens 0 .. {self.vocab_size - 1}")
        return inputs.long()


def check_batch_request(count, rng, split):
    """Return `count` as an int; raise unless a batch can be drawn with these arguments."""
    count = integer("count", count, 1, 10_000_000)
    if not isinstance(rng, np.random.Generator):
        raise TypeError(f"rng must be a numpy Generator; got {type(rng).__name__}")
    if split not in SPLITS:
        raise ValueError(f"split must be 'train' or 'test'; got {split!r}")
    return count


def check_pair(name, values):
    """Return two ints as a tuple, or raise an error that names the argument."""
    if not isinstance(values, (tuple, list)) or len(values) != 2:
        raise TypeError(f"{name} must be 2 ints; got {values!r}")
    return tuple(integer(name, value) for value in values)


def score(logits, batch):
    """Score logits against a batch.

    Parameters
    ----------
    logits : torch.Tensor, shape (B, T, vocab) or (labels, vocab)
        For every position, or only for those with a label, row by row.
    batch : Batch

    Returns
    -------
    dict of str to float
        ``loss`` (nats per label), ``token`` (accuracy per label), ``exact`` (rows all right), and with groups
        ``loss/<group>`` over the labels of that group and ``exact/<group>`` over its answers.  Neighbouring
        labels of one group are one answer, right if all of them are.

    Notes
    -----
    Chapter: 11_rule110
    """
    logits, labels = logits.detach().float().cpu(), batch.labels.cpu()
    asked = labels != IGNORE
    if logits.shape[:-1] not in (labels.shape, (int(asked.sum()),)):
        raise ValueError(f"logits {tuple(logits.shape)} do not fit labels {tuple(labels.shape)}")
    logits = logits if logits.ndim == 2 else logits[asked]
    loss = F.cross_entropy(logits, labels[asked], reduction="none")
    right = logits.argmax(-1) == labels[asked]
    missed = torch.zeros_like(asked)
    missed[asked] = ~right
    result = {
        "loss": loss.mean().item(),
        "token": right.float().mean().item(),
        "exact": (~missed.any(dim=1)[asked.any(dim=1)]).float().mean().item(),
    }
    if batch.groups is not None:
        groups = batch.groups.cpu()
        before = torch.roll(torch.where(asked, groups, IGNORE), 1, dims=1)
        before[:, 0] = IGNORE
        first = asked & (groups != before)  # where an answer begins
        answer = first.flatten().cumsum(0)[asked.flatten()] - 1  # the number of each label's answer
        wrong = torch.zeros(int(first.sum())).index_add_(0, answer, (~right).float()) > 0
        for group in groups[first].unique().tolist():
            result[f"loss/{group}"] = loss[groups[asked] == group].mean().item()
            result[f"exact/{group}"] = (~wrong[groups[first] == group]).float().mean().item()
    return result
