"""The library where parts of Unix, glibc or git are missing: all simulated, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RUN = """
import sleeplib as sl
from sleeplib.experiments import Experiment, TrainConfig
task = sl.tasks.Rule110(width=8, strings=2, steps=1)
model = sl.ModelConfig(vocab_size=4, d_model=16, pattern="ag", num_heads=2, mlp_size=16)
train = TrainConfig(steps=2, batch=4, eval_every=2, eval_batch=8)
record = sl.run(Experiment("tiny", task, model, train), 2, device="cpu", out="out", progress=False)
print(record["status"], record["peak_bytes"])
"""


def python(code, cwd, **environment):
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_run_where_windows_and_macos_have_less(tmp_path):
    """`resource`, affinity, mallopt, MADV_*, git and /proc are hidden after torch and NumPy are loaded."""
    hide = """
import ctypes, mmap, os, pathlib, subprocess, sys
import torch, numba, numpy
sys.modules["resource"] = None
for name in ("sched_getaffinity", "sched_setaffinity"):
    vars(os).pop(name, None)
for name in [name for name in dir(mmap) if name.startswith("MADV_")]:
    delattr(mmap, name)
honest = pathlib.Path.is_file
pathlib.Path.is_file = lambda self: not str(self).startswith("/proc") and honest(self)
ctypes.CDLL = lambda *args, **options: object()
os.environ["PATH"] = ""
"""
    assert python(hide + RUN, tmp_path) == ["done", "0"]


CALLS = """
import ctypes
calls, honest = [], ctypes.CDLL
class C:
    def __init__(self, name):
        self.c = honest(name)
    def __getattr__(self, name):
        calls.append(name)
        return getattr(self.c, name)
import torch, mmap
from sleeplib import device
ctypes.CDLL = lambda name, *rest, **options: C(name)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is tuned on Linux only")
def test_malloc_is_tuned_unless_the_user_says_no(tmp_path):
    """A kernel without large pages is simulated."""
    tune = "\ndevice.tune_malloc(2**20)\nprint(*sorted(set(calls)))"
    assert python(CALLS + tune, tmp_path, SLEEPLIB_TUNE_MALLOC="0") == []
    assert "madvise" in python(CALLS + tune, tmp_path)
    assert python(CALLS + "\ndel mmap.MADV_HUGEPAGE" + tune, tmp_path) == ["mallopt"]
