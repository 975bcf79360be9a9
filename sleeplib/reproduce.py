"""A queue that anyone can run: the missing runs of a task, one niced process a core, resumable."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import product
from queue import SimpleQueue
from statistics import median

import torch

from . import records
from .checkpoints import steps_done
from .checks import integer
from .experiments import PRESETS
from .flops import training_flops
from .model import ModelConfig
from .tasks import TASKS
from .threads import cores


def runs_of(experiment, out=None, seeds=None):
    """What has become of every run of a preset: ``{(N, seed): (state, steps)}``.

    They are in the order in which they are made: seed by seed, and the longest first.  A state is "done",
    "failed" (it diverged, and would again), "to do", or "begun": a checkpoint waits to be resumed, or a
    process is working on it.
    """
    out = records.results_dir() if out is None else out  # what was shipped is not what was made here
    found = {(r["passes"], r["seed"]): r for r in records.own_records(experiment, out)}
    ended = {key: r for key, r in found.items() if r["status"].split(":")[0] in ("done", "failed")}
    wanted = product(experiment.passes, experiment.seeds if seeds is None else seeds)
    runs = {}
    for n, seed in sorted({*wanted, *(ended if seeds is None else ())}, key=lambda key: (key[1], -key[0])):
        if (n, seed) in ended:
            runs[n, seed] = ended[n, seed]["status"].split(":")[0], experiment.train.steps
            continue
        steps = steps_done(records.record_path(experiment.name, n, seed, out).with_suffix(".safetensors"))
        runs[n, seed] = "begun" if steps else "to do", steps
    return runs


def core_hours(out=None):
    """How long each run takes on this processor: ``{(preset, N): (core-hours, whether measured)}``.

    A measured cost is the median over finished runs of this preset and N.  Where there are none, it is
    estimated: what the run's operations take at the median speed of the task's runs that were finished here.
    No estimate is made for a task without any, or for a rival of sleep.  With a GPU the dict is empty.
    """
    here, took, speeds, work = records.processor().rpartition(",")[0], {}, {}, {}
    if torch.cuda.is_available():
        return {}
    for name, e in PRESETS.items():
        if type(e.model) is ModelConfig:  # counting a rival's operations means running it
            work |= {(name, n): training_flops(e, n) * e.train.steps for n in e.passes}
        for r in records.own_records(e, out):
            if r["status"] == "done" and str(r["device"]).rpartition(",")[0] == here:
                threads = int(re.search(r"(\d+) thread", r["device"])[1])
                took.setdefault((name, r["passes"]), []).append(r["seconds"] * threads / 3600)
        for n in e.passes:
            hours = took.get((name, n), ()) if (name, n) in work else ()
            speeds.setdefault(type(e.task), []).extend(work[name, n] / h for h in hours)
    costs = {key: (median(hours), True) for key, hours in took.items()}
    for key in work.keys() - took.keys():
        if speed := speeds[type(PRESETS[key[0]].task)]:
            costs[key] = work[key] / median(speed), False
    return costs


def shares(jobs):
    """The processor cores in `jobs` shares; none if these are fewer, or a thread cannot be bound to cores."""
    own = cores() if hasattr(os, "sched_setaffinity") else []
    return [set(own[i::jobs]) for i in range(jobs)] if len(own) >= jobs else []


def pin_to_cores(left):
    """Bind this thread and the processes that it starts to a share of its own: none moves or waits."""
    if left:
        with suppress(OSError):  # without it a run is slower, and nothing else
            os.sched_setaffinity(0, left.pop())


def reproduce(task, scale="quick", *, seeds=None, jobs=None, overwrite=False, out=None, keep=None, say=print):
    """Run every N and seed of ``<task>-<scale>`` and its variants that has no record of its end yet.

    At most `jobs` run at a time (if absent, one a core, or one if there is a GPU), for `seeds` (if absent the
    presets'); `overwrite`, `out` and `keep` are as in :func:`sleeplib.run`.  A run that was stopped goes on
    from there.  The processes are niced: anyone working on the machine goes first.  `say` is told, line by
    line, what is done and how many hours are left.  Returns the experiments and the exit codes.
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
    costs, left, commands = core_hours(out), {}, {}
    for e in chosen:
        for (n, seed), (state, steps) in runs_of(e, out, seeds).items():
            if state in ("done", "failed") and not overwrite or n not in e.passes:
                continue
            command = [*nice, sys.executable, "-m", "sleeplib", "run", e.name, "--resume"]
            command += ["--passes", str(n), "--seed", str(seed)] + ["--overwrite"] * overwrite
            for option, value in (("--out", out), ("--keep", keep)):
                command += [option, str(value)] if value else []
            cost, _ = costs.get((e.name, n), (None, False))
            left[e.name, n, seed] = cost and cost * (1 - steps * (state == "begun") / e.train.steps)
            commands[e.name, n, seed] = command
    total = len(commands)

    def hours():
        known = [cost for cost in left.values() if cost is not None]
        if left and not known:
            return "hours unknown"
        text = f"about {sum(known) / min(jobs * threads, len(cores())):.1f} hours left"
        return text + f" and {len(left) - len(known)} runs never timed here" * (len(known) < len(left))

    say(f"{name}: {total} runs to make, {jobs} at a time, {hours()}")
    running, codes, stopped, one = [], [], threading.Event(), threading.Lock()
    ended = SimpleQueue()  # unlike as_completed it holds no lock when a signal comes

    def finish(key, command):
        try:
            ended.put((key, make(command), None))
        except BaseException as error:
            ended.put((key, None, error))

    def make(command):
        # A group of its own: else Ctrl-C in a terminal would reach it, then the signal that is sent below.
        with one:  # none begins once the running ones have been told to stop
            if stopped.is_set():
                return 128 + signal.SIGINT
            process = subprocess.Popen(command, env=environment, process_group=0)
            running.append(process)
        code = process.wait()
        with one:
            running.remove(process)
        return code

    def stop():
        """Stop all runs: each ends its step and saves a checkpoint; told twice, it stops at once."""
        stopped.set()  # first: a second signal may come while the lock is waited for
        with one:
            for process in running if os.name == "posix" else ():  # elsewhere Ctrl-C has reached them
                process.terminate()

    with _stopped_by_signals(), ThreadPoolExecutor(jobs, None, pin_to_cores, (shares(jobs),)) as pool:
        try:
            for key, command in commands.items():
                pool.submit(finish, key, command)
            for _ in commands:
                key, code, error = ended.get()
                if error:
                    raise error
                preset, n, seed = key
                codes.append(code)
                del left[key]
                how = "done" if not codes[-1] else f"stopped with code {codes[-1]}"
                clock = time.strftime("%H:%M")
                say(f"{clock}  {len(codes)} of {total}: {preset} N={n} seed={seed} {how}; {hours()}")
            return chosen, codes
        except BaseException:
            stop()
            try:
                pool.shutdown(cancel_futures=True)
            except KeyboardInterrupt:
                stop()
            raise


@contextmanager
def _stopped_by_signals():
    """Let SIGTERM and a closing terminal do what Ctrl-C does; only the main thread may set that up."""

    def interrupt(number, frame):
        raise KeyboardInterrupt(number)  # which, for the exit code

    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                before[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
