"""How many threads work on a CPU, and how they wait for one another.

PyTorch's OpenMP workers spin while they wait.  Beside any other busy process that costs a factor of 10 and
more: a worker that spins keeps the one it waits for from running.  So on import the workers are told to sleep
soon, and a run tries on a few sequences how many of them help.
"""

import ctypes
import os
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import torch

DEFAULT = torch.get_num_threads()  # what PyTorch chose by itself


def cores():
    """The processor cores that this process may use, by number."""
    some = hasattr(os, "sched_getaffinity")
    return sorted(os.sched_getaffinity(0)) if some else list(range(os.cpu_count() or 1))


def sleep_soon():
    """Tell the workers of GNU OpenMP to sleep after a short wait; return whether that worked.

    Its spinning is set by ``OMP_WAIT_POLICY`` before PyTorch is loaded, and by nothing later, except that it
    spins briefly while there are more threads than cores.  So one more team is made, which sleeps for good.
    Nothing is done where OMP_WAIT_POLICY or GOMP_SPINCOUNT is set, or SLEEPLIB_THREADS=keep.
    """
    said = "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ
    if said or os.environ.get("SLEEPLIB_THREADS") == "keep":
        return False
    try:
        maps = Path("/proc/self/maps").read_text().splitlines()
        gomp = ctypes.CDLL(next(line.split()[-1] for line in maps if "libgomp" in line))
        start, nothing = gomp.GOMP_parallel, ctypes.cast(gomp.omp_get_thread_num, ctypes.c_void_p)
    except (OSError, StopIteration, AttributeError):  # another system, another OpenMP
        return False
    start.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    made = threading.Event()

    def team():
        start(nothing, None, (os.cpu_count() or 1) + 1, 0)
        made.set()
        threading.Event().wait()

    threading.Thread(target=team, name="sleeplib-team", daemon=True).start()
    return made.wait(timeout=5)


@contextmanager
def chosen(count, probe=None, repeats=3):
    """Let PyTorch use `count` threads in a ``with`` block; yield how many it uses.

    None tries 1, 2, 4, ... up to the number of cores and takes the fewest that are nearly the fastest, unless
    the user has said a number by OMP_NUM_THREADS or :func:`torch.set_num_threads`, or has set
    SLEEPLIB_THREADS=keep.  What is timed is `probe`, a callable without arguments; without it nothing is
    tried.  It is timed `repeats` times, the counts in turn; the shortest time of each counts.
    """
    before = torch.get_num_threads()
    keep = os.environ.get("SLEEPLIB_THREADS") == "keep" or "OMP_NUM_THREADS" in os.environ
    try:
        if count is None and probe is not None and before > 1 and before == DEFAULT and not keep:
            counts = [*(2**i for i in range(before.bit_length()) if 2**i < before), before]
            probe()  # compiles what there is to compile
            best = dict.fromkeys(counts, float("inf"))
            for tried in counts * repeats:
                torch.set_num_threads(tried)
                began = time.perf_counter()
                probe()
                best[tried] = min(best[tried], time.perf_counter() - began)
            count = next(n for n in counts if best[n] <= 1.05 * min(best.values()))
        if count is not None:
            torch.set_num_threads(count)
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
