"""What a task must be to be trained on: the protocol, checked by drawing a little and scoring it."""

import numpy as np
import torch

from .base import IGNORE, SPLITS

MEMBERS = ("vocab_size", "window", "length", "batch", "score", "chance")  # solve is optional


def check_task(task, count=8):
    """Raise unless `task` can be trained on: draw small batches, look at them, and score them.

    Parameters
    ----------
    task : object
        With ``vocab_size``, ``window``, ``length``, ``batch(count, rng, split)``, ``score(logits, batch)``
        and ``chance()``, as :class:`Rule110` has them.
    count : int
        Sequences to draw of each split.

    Raises
    ------
    TypeError, ValueError
        Says in words what is missing or does not fit.

    Notes
    -----
    Chapter: 11_rule110
    """

    def demand(right, what, error=ValueError):
        if not right:
            raise error(f"task: {what}")

    for name in MEMBERS:
        demand(hasattr(task, name), f"{type(task).__name__} has no {name}", TypeError)
    for name in MEMBERS[:3]:
        value = getattr(task, name)
        whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value >= 1
        demand(whole, f"{name} must be an int of at least 1; got {value!r}")
    vocab, chance, awake = task.vocab_size, task.chance(), []
    for split in SPLITS:
        batch, again = (task.batch(count, np.random.default_rng(0), split=split) for _ in range(2))
        for name in ("inputs", "labels"):
            x, shape = getattr(batch, name, None), (count, task.length)
            found = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
            what = f"{name} must be an int64 tensor of shape (count, length) = {shape}; got {found}"
            demand(isinstance(x, torch.Tensor) and x.dtype == torch.int64 and x.shape == shape, what)
            demand(torch.equal(x, getattr(again, name)), f"{name} must follow from rng; two draws differ")
        inputs, labels = batch.inputs, batch.labels
        asked = labels != IGNORE
        for name, x in (("inputs", inputs), ("labels", labels[asked])):
            demand(x.numel(), f"labels are {IGNORE} everywhere: nothing is asked")
            low, high = int(x.min()), int(x.max())
            wanted = f"{name} must lie in 0 .. {vocab - 1}" + f", or be {IGNORE}" * (name == "labels")
            demand(low >= 0 and high < vocab, f"{wanted}; got {low} .. {high}")
        given = (inputs[asked] == labels[asked]).all()
        demand(not given, "labels repeat the token read at their place; they must say what follows it")
        awake += torch.stack([(c != IGNORE).any(1) for c in labels.split(task.window, 1)], 1).tolist()
        groups = getattr(batch, "groups", None)
        demand(groups is None or groups.shape == labels.shape, "groups must be None or as labels")
        scores = task.score(torch.zeros(int(asked.sum()), vocab), batch)
        for name, found in (("score", scores), ("chance", chance)):
            missing = {"loss", "token", "exact"} - set(found)
            demand(not missing, f"{name} must give {', '.join(sorted(missing))}; got {', '.join(found)}")
    same = all(row == awake[0] for row in awake)
    demand(same, f"labels: rows disagree about which windows of {task.window} tokens are asked something")
