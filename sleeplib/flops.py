"""What a training step costs: counted from the shapes, checked against PyTorch's own counter."""

import numpy as np

from .algorithm import awake_chunks
from .experiments import get


def training_flops(experiment, passes):
    """Floating-point operations of one training step: three times the products of a forward pass.

    A token costs two operations a matrix entry and pass; attention adds its scores and sums, a fast weight
    its read, its write and its output.  Norms, gates and convolutions are left out, and so is what follows
    the last write before a window is dropped.  `experiment` is an Experiment or a preset's name, `passes` is
    N; windows with labels are read once.

    Chapter: 11_rule110
    """
    experiment = get(experiment)
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
