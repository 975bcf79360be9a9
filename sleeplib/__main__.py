"""The command line: ``python -m sleeplib`` or ``sleeplib``."""

import argparse
import os
import re
import signal
import sys
from collections import Counter

import numpy as np

from . import checks, experiments, processes, records, runs, tasks
from .doctor import examine
from .gpu_check import gpu_check as check_gpu
from .reproduce import core_hours, runs_of
from .reproduce import reproduce as reproduce_all
from .scorecard import scorecard as judge_all
from .scorecard import to_json

OUT = "data/results of a checkout, else ./sleeplib-results"
SCALES = "what follows the task in a preset's name, like quick, rate, ablation, rival, taught, small, paper"
STATES = ("done", "failed", "begun", "to do")
EXIT = {"failed": 1, "interrupted": 130, "terminated": 143}  # the last two as a shell reports signals


def list_presets(args):
    """Print every preset: how many runs are done, begun or to do, and core-hours for each N as measured here.

    A ~ marks an estimate, made from the speed of the task's other runs.
    """
    costs = core_hours(args.out)
    for name, experiment in (experiments.PRESETS | experiments.PRETRAINED).items():
        found = Counter(state for state, _ in runs_of(experiment, args.out).values())
        counts = ", ".join(f"{found[state]} {state}" for state in STATES if found[state])
        known = [(n, *costs[name, n]) for n in experiment.passes if (name, n) in costs]
        hours = [f"N={n} {'' if measured else '~'}{cost:.2g}" for n, cost, measured in known]
        print(f"{name:24} {counts:22} {'core-hours ' * bool(hours)}{', '.join(hours)}")
        print(f"    {experiment.about}")


def sample(args):
    """Print one sequence of a task and the answers that are asked for."""
    task = tasks.TASKS[args.task]()
    rng = np.random.default_rng(checks.integer("seed", args.seed, 0, 2**64 - 1))
    batch = task.batch(1, rng, split=args.split)
    for start in range(0, batch.inputs.shape[1], task.window):
        window = slice(start, start + task.window)
        print(f"{start:5}  {' '.join(task.vocab[i] for i in batch.inputs[0, window])}")
    asked = batch.labels[0] >= 0
    print("asked  " + " ".join(task.vocab[i] for i in batch.labels[0, asked]))


def run(args):
    """Train one preset with one N and one seed."""
    settings = dict(text.partition("=")[::2] for text in args.set)
    if wrong := [text for text in args.set if "=" not in text]:
        raise ValueError(f"--set wants KEY=VALUE; got {wrong[0]!r}")
    if settings and args.out is None:
        raise ValueError("--set changes the preset: give --out, so that the preset's own records stay apart")
    experiment = experiments.get(args.preset).replace(settings)
    names = "passes seed device out resume overwrite stop_after keep micro_batches threads"
    record = runs.run(experiment, **{name: getattr(args, name) for name in names.split()})
    if processes.first():
        print(summary(record))
    return EXIT.get(record["status"].split()[0].rstrip(":"), 0)


def summary(record):
    """Sum up a run in one line."""
    scores = ", ".join(f"{k} {v:.3f}" for k, v in record["final"].items() if k in ("loss", "token", "exact"))
    where = f"{record['preset']} N={record['passes']} seed={record['seed']}"
    return f"{where}: {record['status']}; {scores}; {record['seconds']:.0f} s on {record['device']}"


def reproduce(args):
    """Run every N and seed of a task's presets that has not ended yet, `jobs` at a time."""
    names = "task scale seeds jobs overwrite out keep"
    chosen, codes = reproduce_all(**{name: getattr(args, name) for name in names.split()})
    for experiment in chosen:
        for record in records.own_records(experiment, args.out):
            print(summary(record))
    return int(any(codes))


def scorecard(args):
    """Print the paper's claims beside what the records show."""
    rows = judge_all(args.out)
    if args.json:
        print(to_json(rows))
        return
    for row in rows:
        print(f"Figure {row['figure']}: {row['claim']}: {row['verdict'].upper()}")
        print(f"    paper  {row['paper']}")
        print(f"    ours   {row['ours']}  ({row['scale']}; seeds: {row['seeds']}; {row['device']})")
        if row["whole"]:
            print(f"    steps  {row['steps']}; from first to last {row['whole']}")
            print(f"    runs   {len(row['commands'])}, such as: {row['commands'][0]}")


def bench(args):
    """Time the kernels and a training step beside transformers' implementations, or the paper's Figure 6."""
    from .bench import main
    from .throughput import figure6

    if args.dry_run and not args.figure6:
        raise ValueError("--dry-run goes with --figure6")
    return figure6(args.dry_run) if args.figure6 else main(repeats=args.repeats)


def doctor(args):
    """Say what this machine has and whether sleeplib works on it."""
    fine = True
    for line, good in examine():
        print(line)
        fine &= good
    return int(not fine)


def gpu_check(args):
    """Check a GPU in some ten minutes: backends, a captured step, tests; time and memory of small presets."""
    report = check_gpu(args.device, args.out, args.minutes)
    return int(bool(report["wrong"]))


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line and exits with code 2."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help says more)\n")


def parser():
    """Build the parser of the command line."""
    top = Parser(prog="sleeplib", description="Language models that sleep.")
    commands = top.add_subparsers(dest="command", required=True)

    def add(name, function):
        said = function.__doc__
        command = commands.add_parser(name, help=said.splitlines()[0], description=said)
        command.set_defaults(function=function)
        return command

    add("list", list_presets)
    p = add("scorecard", scorecard)
    p.add_argument("--json", action="store_true", help="for programs: with the command of every run")
    p = add("sample", sample)
    p.add_argument("task", choices=tasks.TASKS)
    p.add_argument("--split", choices=("train", "test"), default="train")
    p = add("run", run)
    p.add_argument("preset", help="its name; `sleeplib list` shows all")
    p.add_argument("--passes", type=int, required=True, help="N, sleep passes")
    p.add_argument("--device", default="auto", help="cpu, cuda or auto: a GPU if there is one")
    p.add_argument("--resume", action="store_true", help="go on from the run's checkpoint, if there is one")
    p.add_argument("--stop-after", type=int, metavar="STEPS", help="stop after this many more steps")
    parts = "read a batch in so many parts, to save memory (default: as few as fit a GPU)"
    p.add_argument("--micro-batches", type=int, help=parts)
    p.add_argument("--threads", type=int, help="for PyTorch (default: as many as help, by trial)")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="such as train.steps=300")
    p = add("reproduce", reproduce)
    p.add_argument("task", choices=tasks.TASKS)
    p.add_argument("--scale", default="quick", help=SCALES)
    p.add_argument("--seeds", type=int, nargs="+", help="default: those of the preset")
    p.add_argument("--jobs", type=int, help="runs at a time (default: one a core, or one on a GPU)")
    p = add("bench", bench)
    p.add_argument("--repeats", type=int, default=9, help="how often each kernel is timed (default: 9)")
    p.add_argument("--figure6", action="store_true", help="throughput at the paper's Figure 6, on one GPU")
    p.add_argument("--dry-run", action="store_true", help="of --figure6: predicted cost, a small shape")
    add("doctor", doctor)
    p = add("gpu-check", gpu_check)
    p.add_argument("--device", default="cuda", help="cpu: a dry run at a small shape")
    p.add_argument("--out", default="gpu-check.json", metavar="FILE", help="default: ./gpu-check.json")
    p.add_argument("--minutes", type=float, default=10, help="begin nothing new after so many (default: 10)")
    for names, flag, options in (
        ("sample run", "--seed", dict(type=int, default=0)),
        ("run reproduce", "--overwrite", dict(action="store_true", help="train again what is finished")),
        ("run reproduce", "--keep", dict(metavar="FOLDER", help="for trained models, in half precision")),
        ("list scorecard run reproduce", "--out", dict(help=f"folder of the records (default: {OUT})")),
    ):
        for name in names.split():
            commands.choices[name].add_argument(flag, **options)
    return top


def main(argv=None):
    """Run the command line and return its exit code; bad input is one line and code 2."""
    args = parser().parse_args(argv)
    try:
        code = args.function(args) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read has seen enough; and nothing must fail at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"sleeplib: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if not isinstance(error, MemoryError) and not re.search(
            "tried to allocate|out of memory", text, re.I
        ):
            raise
        what = next(iter(text.splitlines()), "no word from the system")
        hint = "; more --micro-batches make a step smaller" if args.function is run else ""
        print(f"sleeplib: out of memory ({what}){hint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        return 128 + next(iter(stop.args), signal.SIGINT)


if __name__ == "__main__":
    sys.exit(main())
