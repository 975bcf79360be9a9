"""All runs of a task's presets, several at a time, each in a process and on cores of its own."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import torch

from . import records
from .checks import integer
from .experiments import PRESETS
from .threads import cores


def shares(jobs):
    """The processor cores in `jobs` shares; none where the system cannot bind a thread to cores."""
    own = cores() if hasattr(os, "sched_setaffinity") else []
    return [set(own[i::jobs]) for i in range(jobs)] if len(own) >= jobs else []


def pin_to_cores(left):
    """Bind this thread, and the processes that it starts, to a share of its own: none moves, none waits."""
    if left:
        os.sched_setaffinity(0, left.pop())


def reproduce(task, scale="quick", *, seeds=None, jobs=None, overwrite=False, out=None, keep=None):
    """Run every N and seed of ``<task>-<scale>`` and its variants that has no finished record yet.

    At most `jobs` at a time (if absent one a core, or one on a GPU), for `seeds` (if absent the presets');
    `overwrite`, `out` and `keep` as in :func:`sleeplib.run`.  Returns the experiments and the exit codes.
    """
    name = f"{task}-{scale}"
    chosen = [e for n, e in PRESETS.items() if n == name or n.startswith(f"{name}-")]
    if jobs is None:
        jobs = 1 if torch.cuda.is_available() else len(cores())
    # Separate processes with one thread each waste less than threads that wait for one another.
    threads = max(1, len(cores()) // integer("jobs", jobs, 1))
    environment, commands = os.environ | {"OMP_NUM_THREADS": str(threads)}, []
    for experiment in chosen:
        found = records.load_records(experiment.name, out=out or records.results_dir())
        finished = {(r["passes"], r["seed"]) for r in found if r["status"] == "done" and not overwrite}
        for seed, n in product(experiment.seeds if seeds is None else seeds, sorted(experiment.passes)[::-1]):
            if (n, seed) in finished:
                continue
            command = [sys.executable, "-m", "sleeplib", "run", experiment.name, "--resume"]
            command += ["--passes", str(n), "--seed", str(seed)] + ["--overwrite"] * overwrite
            for option, value in (("--out", out), ("--keep", keep)):
                command += [option, str(value)] if value else []
            commands.append(command)
    with ThreadPoolExecutor(jobs, initializer=pin_to_cores, initargs=(shares(jobs),)) as pool:
        futures = [pool.submit(subprocess.run, command, env=environment) for command in commands]
        try:
            return chosen, [future.result().returncode for future in futures]
        except KeyboardInterrupt:  # the runs in hand save their checkpoints and stop by themselves
            pool.shutdown(cancel_futures=True)
            raise
