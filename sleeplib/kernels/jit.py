"""How every Numba kernel here is compiled, and how it is called."""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch

# Sums may be reordered and contracted to FMAs, which lets LLVM vectorise them; NaN and inf keep their
# meaning.
LOOPS = dict(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
GRAIN = 32768  # entries below which one thread does it all, as in PyTorch
PARTS = 4  # pieces of work a thread: whoever is free takes the next, so a busy core holds up nobody


@cache
def _pool():
    """Threads for the kernels, made when first needed.  They sleep between calls; OpenMP's would spin."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="sleeplib")


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork


def launch(kernel, count, *args):
    """Call ``kernel(first, last, *arrays)`` over range(count), in parts on as many threads as PyTorch uses.

    CPU tensors become arrays; floats take the first one's precision.  The parts must not depend on one
    another.
    """
    arrays = [x.detach().contiguous().numpy() for x in args if isinstance(x, torch.Tensor)]
    rest = iter(arrays)
    number = arrays[0].dtype.type
    args = [
        next(rest) if isinstance(x, torch.Tensor) else number(x) if isinstance(x, float) else x for x in args
    ]
    threads = torch.get_num_threads() if max(x.size for x in arrays) >= GRAIN else 1
    if threads == 1:
        kernel(0, count, *args)
        return
    bounds = np.linspace(0, count, min(count, PARTS * threads) + 1, dtype=int).tolist()
    parts = iter(list(zip(bounds, bounds[1:])))

    def work():
        for first, last in parts:
            kernel(first, last, *args)

    helpers = [_pool().submit(work) for _ in range(threads - 1)]
    work()
    for helper in helpers:
        if not helper.cancel():
            helper.result()
