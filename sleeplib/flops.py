"""What a model costs: operations of a training step, bytes carried from window to window, parameters."""

import dataclasses
from functools import lru_cache

import numpy as np
import torch

from .algorithm import awake_chunks, sleep_forward
from .experiments import get
from .kernels import use_numba
from .model import ModelConfig


def training_flops(experiment, passes):
    """Floating-point operations of one training step: three times the products of a forward pass.

    A token costs two operations a matrix entry and pass; attention adds its scores and sums, a fast weight
    its read, its write and its output.  Norms, gates and convolutions are left out, and so is what follows
    the last write before a window is dropped.  `experiment` is an Experiment or a preset's name, `passes` is
    N; windows with labels are read once.  Those of a rival of sleep are counted as they are computed, by
    :func:`counted_flops`.

    Chapter: 11_rule110
    """
    experiment = get(experiment)
    if type(experiment.model) is not ModelConfig:
        return counted_flops(experiment, passes)
    model, task = experiment.model, experiment.task
    first, last = model.loop or (0, len(model.pattern) - 1)
    D, H, K, V = model.d_model, model.num_heads, model.K, model.V
    mlp, end = 6 * D * model.hidden, len(model.pattern) - 1
    awake = awake_chunks(task.batch(1, np.random.default_rng(0)).labels, task.window)
    total = 0
    for index, asked in enumerate(awake):
        tokens = min(task.window, task.length - index * task.window)
        asleep = not asked and tokens == task.window
        for i, kind in enumerate(model.pattern):
            if kind == "a":
                write, read = 6 * D * D, 2 * D * D + 2 * D * (tokens + 1)
            else:
                write, read = 2 * D * H * (2 * K + 2 * V + 2) + 6 * H * K * V, 2 * D * H * V
            repeats = passes if first <= i <= last and asleep else 1
            total += repeats * tokens * (write + read + mlp)
            if asleep and i == end:  # after the last write nobody reads
                total -= tokens * (read + mlp)
        total += asked * tokens * 2 * D * model.vocab_size
    return 3.0 * experiment.train.batch * total


def counted_flops(experiment, passes):
    """Floating-point operations of one training step, by PyTorch's own counter of matrix products.

    The step is made on one sequence of the batch, in plain PyTorch: a compiled loop shows no products.

    Chapter: 15_argument
    """
    experiment = get(experiment)
    return experiment.train.batch * _counted(experiment.task, experiment.model, passes)


@lru_cache
def _counted(task, config, passes):
    from torch.utils.flop_counter import FlopCounterMode  # loads half of PyTorch's compiler

    model, batch = _fresh(task, config)
    with use_numba(False), FlopCounterMode(display=False) as counter:
        sleep_forward(model, *batch[:2], window=task.window, passes=passes).loss.backward()
    return float(counter.get_total_flops())


def carried_bytes(experiment, passes):
    """Bytes that a model carries from the last window of the context to the question, for one sequence.

    Chapter: 15_argument
    """
    experiment = get(experiment)
    task = experiment.task
    model, batch = _fresh(task, experiment.model)
    begin = awake_chunks(batch.labels, task.window).index(True) * task.window
    before = (x[:, :begin] for x in batch[:2])
    with torch.no_grad():
        out = sleep_forward(model, *before, window=task.window, passes=passes, return_logits=False)
    return out.state.clone().nbytes()


def parameters(experiment):
    """How many numbers a model learns.

    Chapter: 15_argument
    """
    return sum(p.numel() for p in _fresh(get(experiment).task, get(experiment).model)[0].parameters())


def _fresh(task, config):
    """A new model, and one sequence; the global random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        model = dataclasses.replace(config, backend="reference").build()
    return model, task.batch(1, np.random.default_rng(0))
