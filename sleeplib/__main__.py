"""The command line: ``python -m sleeplib`` or ``sleeplib``."""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from . import experiments, records, runs, tasks


def list_presets(args):
    """Print every preset and which of its runs are recorded."""
    for name, experiment in experiments.PRESETS.items():
        done = len([r for r in records.load_records(name, out=args.out) if r["status"] == "done"])
        wanted = len(experiment.passes) * len(experiment.seeds)
        print(f"{name:22} {done:2} of {wanted:2} runs recorded   {experiment.about}")


def sample(args):
    """Print one sequence of a task and what is asked."""
    task = tasks.TASKS[args.task]()
    batch = task.batch(1, np.random.default_rng(args.seed), split=args.split)
    for start in range(0, batch.inputs.shape[1], task.window):
        window = slice(start, start + task.window)
        print(f"{start:5}  {' '.join(task.vocab[i] for i in batch.inputs[0, window])}")
    asked = batch.labels[0] >= 0
    print("asked  " + " ".join(task.vocab[i] for i in batch.labels[0, asked]))


def run(args):
    """Train one preset with one N and one seed."""
    settings = {}
    for text in args.set:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set wants KEY=VALUE; got {text!r}")
        settings[key] = value
    if settings and args.out is None:
        raise ValueError("--set changes the preset: give --out, so that the preset's own records stay apart")
    experiment = experiments.get(args.preset).replace(settings)
    record = runs.run(
        experiment,
        args.passes,
        args.seed,
        args.device,
        args.out,
        resume=args.resume,
        stop_after=args.stop_after,
        keep=args.keep,
        pieces=args.pieces,
    )
    print(summary(record))
    if record["status"].startswith("interrupted"):
        return 130
    return 1 if record["status"].startswith("failed") else 0


def summary(record):
    """One line on a run."""
    scores = ", ".join(f"{k} {v:.3f}" for k, v in record["final"].items() if k in ("loss", "token", "exact"))
    where = f"{record['preset']} N={record['passes']} seed={record['seed']}"
    return f"{where}: {record['status']}; {scores}; {record['seconds']:.0f} s on {record['device']}"


def shares(jobs):
    """The processor cores in `jobs` shares; none where the system cannot bind a thread to cores."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return [set(cores[i::jobs]) for i in range(jobs)] if len(cores) >= jobs else []


def take_a_share(left):
    """Bind this thread, and the processes that it starts, to cores of its own: none moves, none waits."""
    if left:
        os.sched_setaffinity(0, left.pop())


def reproduce(args):
    """Run every N and seed of a task's presets that has no finished record yet, `jobs` at a time."""
    name = f"{args.task}-{args.scale}"
    chosen = [e for n, e in experiments.PRESETS.items() if n == name or n.startswith(f"{name}-")]
    jobs = args.jobs or (1 if torch.cuda.is_available() else os.cpu_count())
    # Separate processes with one thread each waste less than threads that wait for one another.
    threads = str(max(1, os.cpu_count() // jobs))
    environment = os.environ | {"OMP_NUM_THREADS": threads}
    commands = []
    for experiment in chosen:
        found = records.load_records(experiment.name, out=args.out)
        finished = {(r["passes"], r["seed"]) for r in found if r["status"] == "done"}
        for seed in experiment.seeds if args.seeds is None else args.seeds:
            for n in sorted(experiment.passes, reverse=True):
                if (n, seed) not in finished or args.again:
                    command = [sys.executable, "-m", "sleeplib", "run", experiment.name, "--resume"]
                    command += ["--passes", str(n), "--seed", str(seed)]
                    for option in ("out", "keep"):
                        command += [f"--{option}", value] if (value := getattr(args, option)) else []
                    commands.append(command)
    with ThreadPoolExecutor(jobs, initializer=take_a_share, initargs=(shares(jobs),)) as pool:
        futures = [pool.submit(subprocess.run, command, env=environment) for command in commands]
        try:
            codes = [future.result().returncode for future in futures]
        except KeyboardInterrupt:  # the runs in hand save their checkpoints and stop by themselves
            pool.shutdown(cancel_futures=True)
            raise
    for experiment in chosen:
        for record in records.load_records(experiment.name, out=args.out):
            print(summary(record))
    return int(any(codes))


def scorecard(args):
    """Print the paper's claims beside what the records show."""
    from .scorecard import scorecard as judge_all

    for row in judge_all(args.out):
        print(f"Figure {row['figure']}: {row['claim']}: {row['verdict'].upper()}")
        print(f"    paper  {row['paper']}")
        print(f"    ours   {row['ours']}  ({row['scale']}; seeds: {row['seeds']}; {row['device']})")


def bench(args):
    """Time the kernels and a training step beside transformers' implementations."""
    from .bench import main

    return main(repeats=args.repeats)


def doctor(args):
    """Say what this machine has and whether sleeplib works on it."""
    from .kernels import gated_delta_rule

    print(json.dumps(records.versions() | {"processor": records.processor()}, indent=1))
    cuda = torch.cuda.is_available()
    print(f"cuda: {torch.cuda.get_device_name() if cuda else 'none, the CPU is used'}")
    for name in ("fla", "triton", "transformers", "ipywidgets", "seaborn"):
        try:
            __import__(name)
            print(f"{name}: found")
        except ImportError:
            print(f"{name}: not installed (optional)")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 9, 2, 4, generator=generator) for _ in range(3))
    g, beta = -torch.rand(2, 9, 2, generator=generator), torch.rand(2, 9, 2, generator=generator)
    k = k / k.norm(dim=-1, keepdim=True)
    slow = gated_delta_rule(q, k, v, g=g, beta=beta, backend="reference")[0]
    for device in ["cpu"] + ["cuda"] * cuda:
        tensors = dict(g=g.to(device), beta=beta.to(device))
        fast = gated_delta_rule(*(x.to(device) for x in (q, k, v)), **tensors, backend="chunked")[0].cpu()
        error = (slow - fast).abs().max().item()
        print(f"chunked on {device} against the reference: {'ok' if error < 1e-4 else f'off by {error}'}")
        if error >= 1e-4:
            return 1


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line."""

    def error(self, message):
        """Exit with code 2."""
        self.exit(2, f"{self.prog}: {message} (--help says more)\n")


def parser():
    """Build the parser of the command line."""
    top = Parser(prog="sleeplib", description="Language models that sleep.")
    commands = top.add_subparsers(dest="command", required=True)

    def add(name, function):
        command = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        command.set_defaults(function=function)
        return command

    for name, function in (("list", list_presets), ("scorecard", scorecard)):
        add(name, function).add_argument("--out", help="folder of the records (default: data/results)")
    p = add("sample", sample)
    p.add_argument("task", choices=tasks.TASKS)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--split", choices=("train", "test"), default="train")
    p = add("run", run)
    p.add_argument("preset")
    p.add_argument("--passes", type=int, required=True, help="N, sleep passes")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="auto")
    p.add_argument("--resume", action="store_true", help="go on from the run's checkpoint, if there is one")
    p.add_argument("--stop-after", type=int, metavar="STEPS", help="stop after so many steps more")
    p.add_argument("--pieces", type=int, default=1, help="parts of a batch, read one by one: less memory")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="such as train.steps=300")
    p.add_argument("--out", help="folder of the records (default: data/results)")
    p = add("reproduce", reproduce)
    p.add_argument("task", choices=tasks.TASKS)
    p.add_argument("--scale", choices=("quick", "small", "paper", "ablation"), default="quick")
    p.add_argument("--seeds", type=int, nargs="+", help="default: those of the preset")
    p.add_argument("--jobs", type=int, help="runs at a time (default: one a core, or one on a GPU)")
    p.add_argument("--again", action="store_true", help="also the runs that have a finished record")
    p.add_argument("--out", help="folder of the records (default: data/results)")
    for command in (commands.choices["run"], p):
        command.add_argument("--keep", metavar="FOLDER", help="save trained models there, in half precision")
    p = add("bench", bench)
    p.add_argument("--repeats", type=int, default=9)
    add("doctor", doctor)
    return top


def main(argv=None):
    """Run the command line and return its exit code; bad input is one line and code 2."""
    args = parser().parse_args(argv)
    try:
        return args.function(args) or 0
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"sleeplib: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
