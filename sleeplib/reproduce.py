"""A queue that anyone can run: what is missing of a task's runs, one niced process a core, resumable."""

import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import product
from statistics import median

import torch

from . import records
from .checkpoints import read_notes
from .checks import integer
from .experiments import PRESETS
from .flops import training_flops
from .tasks import TASKS
from .threads import cores


def runs_of(experiment, out=None, seeds=None):
    """What has become of every run of a preset: ``{(N, seed): (state, steps)}``.

    In the order in which they are made, seed by seed and the longest first.  A state is "done", "to do" or
    "begun": a checkpoint waits to be resumed, or a process is at it.
    """
    done = {(r["passes"], r["seed"]) for r in _finished(experiment.name, out)}
    wanted = product(experiment.passes, experiment.seeds if seeds is None else seeds)
    runs = {}
    for n, seed in sorted({*wanted, *(done if seeds is None else ())}, key=lambda key: (key[1], -key[0])):
        checkpoint = records.record_path(experiment.name, n, seed, out).with_suffix(".safetensors")
        steps = experiment.train.steps if (n, seed) in done else 0
        if not steps and checkpoint.exists():
            steps = read_notes(checkpoint)["step"]
        runs[n, seed] = "done" if (n, seed) in done else "begun" if steps else "to do", steps
    return runs


def core_hours(experiment, passes, out=None):
    """What a run takes on this processor: (core-hours, whether such runs were measured here), or None.

    Measured is the median of the finished runs of this preset and N.  Where there are none, it is what the
    run's operations take at the median speed of the task's runs that were finished here.
    """
    here = records.processor().rpartition(",")[0]

    def measured(name, n=None):
        for r in _finished(name, out):
            if str(r["device"]).rpartition(",")[0] == here and n in (None, r["passes"]):
                threads = int(re.search(r"(\d+) thread", r["device"])[1])
                yield r["passes"], r["seconds"] * threads / 3600

    if same := [hours for _, hours in measured(experiment.name, passes)]:
        return median(same), True
    speeds = []
    for other in (e for e in PRESETS.values() if type(e.task) is type(experiment.task)):
        cost = {n: training_flops(other, n) * other.train.steps for n in other.passes}
        speeds += [cost[n] / hours for n, hours in measured(other.name) if n in cost]
    if not speeds:
        return None
    return training_flops(experiment, passes) * experiment.train.steps / median(speeds), False


def _finished(name, out):
    found = records.load_records(name, out=out)
    return [r for r in found if r["status"] == "done"]


def shares(jobs):
    """The processor cores in `jobs` shares; none where the system cannot bind a thread to cores."""
    own = cores() if hasattr(os, "sched_setaffinity") else []
    return [set(own[i::jobs]) for i in range(jobs)] if len(own) >= jobs else []


def pin_to_cores(left):
    """Bind this thread, and the processes that it starts, to a share of its own: none moves, none waits."""
    if left:
        os.sched_setaffinity(0, left.pop())


def reproduce(task, scale="quick", *, seeds=None, jobs=None, overwrite=False, out=None, keep=None, say=print):
    """Run every N and seed of ``<task>-<scale>`` and its variants that has no finished record yet.

    At most `jobs` at a time (if absent one a core, or one on a GPU), for `seeds` (if absent the presets');
    `overwrite`, `out` and `keep` as in :func:`sleeplib.run`.  A run that was stopped goes on where it was.
    The processes are niced: whoever works on the machine goes first.  `say` is told, line by line, what is
    done and how many hours are left.  Returns the experiments and the exit codes.
    """
    name = f"{task}-{scale}"
    chosen = [e for n, e in PRESETS.items() if f"{n}-".startswith(f"{name}-")]
    if not any(f"{n}-".startswith(f"{other}-{scale}-") for other in TASKS for n in PRESETS):
        raise ValueError(f"scale: no task has presets called {scale}; `sleeplib list` shows them")
    if jobs is None:
        jobs = 1 if torch.cuda.is_available() else len(cores())
    # Separate processes with one thread each waste less than threads that wait for one another.
    threads = max(1, len(cores()) // integer("jobs", jobs, 1))
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}
    nice = ["nice", "-n", "10"] if shutil.which("nice") else []
    left, commands = {}, {}
    for e in chosen:
        for (n, seed), (state, steps) in runs_of(e, out, seeds).items():
            if state == "done" and not overwrite or n not in e.passes:
                continue
            command = [*nice, sys.executable, "-m", "sleeplib", "run", e.name, "--resume"]
            command += ["--passes", str(n), "--seed", str(seed)] + ["--overwrite"] * overwrite
            for option, value in (("--out", out), ("--keep", keep)):
                command += [option, str(value)] if value else []
            cost = core_hours(e, n, out)
            left[e.name, n, seed] = cost and cost[0] * (1 - steps * (not overwrite) / e.train.steps)
            commands[e.name, n, seed] = command
    total = len(commands)

    def hours():
        known = [cost for cost in left.values() if cost is not None]
        text = f"about {sum(known) / jobs:.1f} hours left" if known or not left else "hours unknown"
        return text + f" and {len(left) - len(known)} runs never timed here" * (0 < len(known) < len(left))

    say(f"{name}: {total} runs to make, {jobs} at a time, {hours()}")
    with ThreadPoolExecutor(jobs, initializer=pin_to_cores, initargs=(shares(jobs),)) as pool:
        futures = {pool.submit(subprocess.run, c, env=environment): key for key, c in commands.items()}
        codes = []
        try:
            for future in as_completed(futures):
                preset, n, seed = key = futures[future]
                codes.append(future.result().returncode)
                del left[key]
                how = "done" if not codes[-1] else f"stopped with code {codes[-1]}"
                clock = time.strftime("%H:%M")
                say(f"{clock}  {len(codes)} of {total}: {preset} N={n} seed={seed} {how}; {hours()}")
            return chosen, codes
        except KeyboardInterrupt:  # the runs in hand save their checkpoints and stop by themselves
            pool.shutdown(cancel_futures=True)
            raise
