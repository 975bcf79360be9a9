"""What all tasks share: the batch and the score."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

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
        What scores are split by (hops, operations).

    Notes
    -----
    Chapter: 11_rule110
    """

    inputs: torch.Tensor
    labels: torch.Tensor
    groups: torch.Tensor | None = None


def check_batch_request(count, rng, split):
    """Raise unless a batch can be drawn with these arguments."""
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"count must be an int of at least 1; got {count!r}")
    if not isinstance(rng, np.random.Generator):
        raise TypeError(f"rng must be a numpy Generator; got {type(rng).__name__}")
    if split not in SPLITS:
        raise ValueError(f"split must be 'train' or 'test'; got {split!r}")


def check_ints(name, values, count):
    """Return `values` as a tuple of `count` ints, or raise an error that names the argument."""
    if not isinstance(values, (tuple, list)) or len(values) != count:
        raise TypeError(f"{name} must be {count} ints; got {values!r}")
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be {'an int' if count == 1 else f'{count} ints'}; got {value!r}")
    return tuple(values)


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
