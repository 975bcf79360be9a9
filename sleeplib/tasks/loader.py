"""Batches drawn ahead by worker processes."""

import signal
from itertools import count as count_from

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..checks import integer


def _leave_ctrl_c_to_the_run(worker):
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Steps(IterableDataset):
    """The batches of a run from one step on; each of W workers draws every W-th."""

    def __init__(self, task, count, seed, start, split):
        self.task, self.count, self.seed, self.start, self.split = task, count, seed, start, split

    def __iter__(self):
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        for step in count_from(self.start + first, stride):
            yield self.task.batch(self.count, np.random.default_rng([*self.seed, step]), split=self.split)


def stream(task, count, seed, *, start=0, split="train", workers=0):
    """Draw batches without end, ahead of time if there are workers.

    Parameters
    ----------
    task : Task
    count : int
        B.
    seed : int or sequence of int
        Batch number `step` comes from ``numpy.random.default_rng([*seed, step])`` (an int is a sequence of
        one), whatever `workers` is.
    start : int
        Step of the first batch.
    split : {"train", "test"}
    workers : int
        Processes that draw ahead; with 0 a batch is drawn when it is asked for.

    Returns
    -------
    iterator of Batch

    Raises
    ------
    ValueError, TypeError
        If `workers` or `start` is not an int of at least 0.

    Notes
    -----
    Chapter: 13_gsm_infinite
    """
    start, workers = integer("start", start, 0), integer("workers", workers, 0)
    seed = tuple(seed) if np.ndim(seed) else (seed,)
    steps = _Steps(task, count, seed, start, split)
    loader = DataLoader(steps, batch_size=None, num_workers=workers, worker_init_fn=_leave_ctrl_c_to_the_run)
    return iter(loader)
