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


def score(logits, batch):
    """Score logits (B, T, vocab) against a batch.

    Returns
    -------
    dict of str to float
        ``loss`` (nats per label), ``token`` (accuracy per label), ``exact`` (rows all right), and with groups
        ``loss/<group>`` and ``exact/<group>``, over the labels of that group.
    """
    if logits.shape[:2] != batch.labels.shape:
        raise ValueError(f"logits {tuple(logits.shape)} do not fit labels {tuple(batch.labels.shape)}")
    logits, labels = logits.detach().float().cpu(), batch.labels.cpu()
    asked = labels != IGNORE
    loss = F.cross_entropy(logits[asked], labels[asked], reduction="none")
    right = logits[asked].argmax(-1) == labels[asked]
    missed = torch.zeros_like(asked)
    missed[asked] = ~right
    result = {
        "loss": loss.mean().item(),
        "token": right.float().mean().item(),
        "exact": (~missed.any(dim=1)[asked.any(dim=1)]).float().mean().item(),
    }
    if batch.groups is not None:
        groups = batch.groups.cpu()[asked]
        for group in groups.unique().tolist():
            member = groups == group
            result[f"loss/{group}"] = loss[member].mean().item()
            result[f"exact/{group}"] = right[member].float().mean().item()
    return result
