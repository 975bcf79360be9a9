"""What is drawn for scoring, and the score of a model on it."""

import numpy as np
import torch

from .algorithm import awake_chunks, sleep_forward
from .checks import integer
from .tasks.base import IGNORE

TEST = 1  # the stream of random numbers of held-out data; it does not depend on N


def held_out(task, count, seed, split="test"):
    """Sequences for scoring, fixed by the seed; `split` "train" draws new ones from the training split."""
    return task.batch(count, np.random.default_rng([seed, TEST]), split=split)


@torch.no_grad()
def evaluate(model, task, batch, *, passes, eviction="hard", chunk=256):
    """Score a model on a batch, asleep and awake as in training, at the precision of its weights.

    Parameters
    ----------
    model : HybridLM
    task : Rule110
        Any task of :mod:`sleeplib.tasks`, or one of your own; its ``score`` is returned.
    batch : Batch
    passes : int
        N; need not be the N of training.
    eviction : {"hard", "keys", "sliding"}
    chunk : int
        Sequences at a time.

    Notes
    -----
    What lies before the first question is read without logits, and only the logits at labels are kept: with
    3,301 tokens and a vocabulary of 1,160, those of all positions would take 15 MB a sequence.

    Chapter: 11_rule110
    """
    device, chunk = next(model.parameters()).device, integer("chunk", chunk, 1)
    options = dict(window=task.window, passes=passes, eviction=eviction)
    awake = awake_chunks(batch.labels, task.window)
    if not any(awake):
        raise ValueError("batch: its labels ask for nothing, they are -100 everywhere")
    begin = awake.index(True) * task.window
    logits = []
    for inputs, labels in zip(batch.inputs.to(device).split(chunk), batch.labels.split(chunk), strict=True):
        state, before = None, (inputs[:, :begin], labels[:, :begin])
        if begin:
            state = sleep_forward(model, *before, return_logits=False, **options).state
        inputs, labels = inputs[:, begin:], labels[:, begin:]
        out = sleep_forward(model, inputs, labels, state=state, **options)
        logits.append(out.logits[(labels != IGNORE).to(device)].float().cpu())
    return task.score(torch.cat(logits), batch)
