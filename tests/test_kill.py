"""Runs that are killed at any moment, and what their records say in the end.

``python tests/test_kill.py --kills 50 --terms 20`` is the long form: it prints how often the record of a run
that was killed (-9) or terminated again and again was that of a run left alone, to the bit, and what was lost
or left over.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest

from sleeplib import __main__ as command_line

VARY = ("seconds", "peak_bytes", "commit", "dirty")  # the rest of a record is the same to the bit
SETTINGS = {
    "task.width": 8,
    "task.steps": 1,
    "model.d_model": 16,
    "model.pattern": "ag",
    "model.num_heads": 2,
    "model.mlp_size": 16,
    "train.steps": 40,
    "train.batch": 4,
    "train.eval_batch": 8,
    "train.eval_every": 20,
    "train.save_every": 2,  # so that many signals fall into a save
}


def child(out):
    """The command line, in a process of its own; what it says goes to a file."""
    sys.stdout = sys.stderr = open(out.with_suffix(".txt"), "a")
    argv = ["run", "rule110-quick", "--passes", "2", "--device", "cpu", "--threads", "1", "--resume"]
    argv += ["--out", str(out), "--keep", str(out / "kept")]
    for key, value in SETTINGS.items():
        argv += ["--set", f"{key}={value}"]
    sys.exit(command_line.main(argv))


def start(out):
    """A new process that needs not load torch again: forked from a server that has done so once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sleeplib.__main__"])
    process = context.Process(target=child, args=(out,))
    process.start()
    return process


def stamp(file):
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def read(out):
    """The record as far as it must be the same, and the names of all files."""
    record = json.loads((out / "rule110-quick" / "N2-seed0.json").read_text())
    files = sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())
    return {key: value for key, value in record.items() if key not in VARY}, files


def trial(out, signals, dice):
    """Run to the end, stopped by each signal in turn; return how many fell into the run."""
    hits, file = 0, out / "rule110-quick" / "N2-seed0.safetensors"
    for number in [*signals, None]:
        before = stamp(file)
        process = start(out)
        if number:
            while process.is_alive() and stamp(file) in (0, before):
                time.sleep(0.001)  # until it has made a step: before that there is little to lose
            process.join(dice.uniform(0, 0.3))
            if process.is_alive():
                os.kill(process.pid, number)
                hits += 1
        process.join(120)
        said = out.with_suffix(".txt").read_text()
        assert process.exitcode in ((0, -number, 128 + number) if number else (0,)), said
        assert "Traceback" not in said, said
    return hits


@pytest.mark.skipif(sys.platform == "win32", reason="no forkserver, and no signals of this kind")
def test_killed_and_terminated_runs_end_as_if_left_alone(tmp_path):
    trial(tmp_path / "whole", [], None)
    signals = [signal.SIGKILL] * 4 + [signal.SIGTERM] * 2
    dice = random.Random(0)
    dice.shuffle(signals)
    assert trial(tmp_path / "killed", signals, dice) >= 1
    assert read(tmp_path / "killed") == read(tmp_path / "whole")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    for name, count in (("kills", 50), ("terms", 20), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=count)
    args = parser.parse_args()
    dice = random.Random(args.seed)
    signals = [signal.SIGKILL] * args.kills + [signal.SIGTERM] * args.terms
    dice.shuffle(signals)
    hits = runs = same = lost = stray = 0
    with tempfile.TemporaryDirectory() as folder:
        trial(Path(folder) / "whole", [], None)
        wanted, files = read(Path(folder) / "whole")
        while signals:
            out = Path(folder) / str(runs)
            hits += trial(out, [signals.pop() for _ in range(min(5, len(signals)))], dice)
            runs += 1
            try:
                record, found = read(out)
            except (OSError, ValueError):
                lost += 1
                continue
            same += record == wanted
            stray += len(set(found) - set(files))
    print(
        f"{hits} signals in {runs} runs: {same} records the same to the bit, {lost} lost, {stray} stray files"
    )
    return int(same != runs or lost or stray)


if __name__ == "__main__":
    sys.exit(main())
