"""How many threads work on a CPU, and how they wait for one another.

PyTorch's OpenMP workers spin while they wait.  Beside any other busy process that costs a factor of 10 and
more: a worker that spins keeps the one it waits for from running.  On a quiet machine a worker that does
not spin loses half a core.  So on import the workers are told to sleep soon; a run looks at how many cores
are free, tries on a few sequences how many threads help, and lets those spin.  If the machine becomes busy it
falls back to one.
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


def free_cores(seconds=0.1):
    """How many cores were idle just now, rounded; all of this process's where the system does not say."""
    try:
        before, _, after = (_ticks(), time.sleep(seconds), _ticks())
    except OSError:
        return len(cores())
    idle, total = (b - a for a, b in zip(before, after))
    return round(len(cores()) * idle / total) if total else len(cores())  # a container may hide them


def _ticks():
    """Ticks that the cores of this process have spent idle or waiting for a disk, and all of their ticks."""
    lines = (line.split() for line in Path("/proc/stat").read_text().splitlines())
    own = {f"cpu{core}" for core in cores()}
    times = [[int(n) for n in numbers] for name, *numbers in lines if name in own]
    return sum(t[3] + t[4] for t in times), sum(map(sum, times))


def sleep_soon():
    """Tell the workers of GNU OpenMP to sleep after a short wait; return whether that worked.

    How long they spin is set by ``OMP_WAIT_POLICY`` before PyTorch is loaded, and by nothing later, except
    that they spin only briefly while there are more threads than cores.  So one more team is made, which
    sleeps.  Nothing is done where OMP_WAIT_POLICY or GOMP_SPINCOUNT is set, or SLEEPLIB_THREADS=keep.
    """
    said = "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ
    if said or _asleep or os.environ.get("SLEEPLIB_THREADS") == "keep":
        return bool(_asleep)
    try:
        maps = Path("/proc/self/maps").read_text().splitlines()
        gomp = ctypes.CDLL(next(line.split()[-1] for line in maps if "libgomp" in line))
        start, nothing = gomp.GOMP_parallel, ctypes.cast(gomp.omp_get_thread_num, ctypes.c_void_p)
    except (OSError, StopIteration, AttributeError):  # another system, another OpenMP
        return False
    start.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    made, enough = threading.Event(), threading.Event()

    def team():
        start(nothing, None, (os.cpu_count() or 1) + 1, 0)
        made.set()
        enough.wait()

    thread = threading.Thread(target=team, name="sleeplib-team", daemon=True)
    thread.start()
    _asleep.append((thread, enough))
    return made.wait(timeout=5)


def spin():
    """Let workers wait as long as OpenMP would have it; return whether :func:`sleep_soon` had said not to."""
    told = bool(_asleep)
    while _asleep:
        thread, enough = _asleep.pop()
        enough.set()
        thread.join()
    return told


class Choice:
    """How many threads work, and what happens when the machine becomes busy."""

    def __init__(self, count):
        self.count, self.best, self.slow = count, float("inf"), 0

    def step_took(self, seconds):
        """Fall back to one thread after three steps in a row that took over three times the best."""
        self.best = min(self.best, seconds)
        self.slow = self.slow + 1 if seconds > 3 * self.best else 0
        if self.slow == 3 and self.count > 1:
            self.count = 1
            torch.set_num_threads(1)


@contextmanager
def chosen(count, probe=None, repeats=3):
    """Let PyTorch use `count` threads in a ``with`` block; yield a :class:`Choice`.

    None tries 1, 2, 4, ... up to the number of cores that are free and takes the fewest that are nearly the
    fastest, unless the user has set a number by OMP_NUM_THREADS or :func:`torch.set_num_threads`, or has
    set SLEEPLIB_THREADS=keep.  What is timed is `probe`, a callable without arguments; without it nothing is
    tried.  It is timed `repeats` times, the counts in turn; the shortest time of each counts.  Several
    threads may spin where as many cores are free.
    """
    before, told = torch.get_num_threads(), False
    keep = os.environ.get("SLEEPLIB_THREADS") == "keep" or "OMP_NUM_THREADS" in os.environ
    try:
        if count is None and probe is not None and before == DEFAULT and not keep:
            most = min(before, max(1, free_cores()))
            counts = [*(2**i for i in range(most.bit_length()) if 2**i < most), most]
            best = dict.fromkeys(counts, float("inf"))
            if most > 1:
                told = spin()
                probe()  # compiles what there is to compile
            for tried in counts * repeats * (most > 1):
                torch.set_num_threads(tried)
                began = time.perf_counter()
                probe()
                best[tried] = min(best[tried], time.perf_counter() - began)
            count = next(n for n in counts if best[n] <= 1.05 * min(best.values()))
        if count is not None:
            torch.set_num_threads(count)
            told = told or (count > 1 and free_cores() >= count and spin())
        yield Choice(torch.get_num_threads())
    finally:
        torch.set_num_threads(before)
        if told:
            sleep_soon()


_asleep = []  # the team that makes others sleep soon: its thread, and the event that ends it
