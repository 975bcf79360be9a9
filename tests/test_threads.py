"""How many threads a run takes, who may say so, and that nothing is left changed."""

import os
import subprocess
import sys
import time

import pytest
import torch

import sleeplib as sl
from sleeplib import threads


@pytest.fixture(autouse=True)
def nobody_has_said(monkeypatch):
    """As if PyTorch had four threads by itself and the environment said nothing."""
    for name in ("OMP_NUM_THREADS", "SLEEPLIB_THREADS"):
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    monkeypatch.setattr(threads, "DEFAULT", 4)
    monkeypatch.setattr(threads, "free_cores", lambda: 4)
    yield
    torch.set_num_threads(before)


def probe_that_takes(seconds):
    """A probe whose time depends on the number of threads; it keeps what it saw."""
    seen = []

    def probe():
        seen.append(torch.get_num_threads())
        time.sleep(seconds[seen[-1]])

    return probe, seen


@pytest.mark.parametrize(
    "seconds, best",
    [
        ({1: 0.03, 2: 0.015, 4: 0.008}, 4),
        ({1: 0.008, 2: 0.03, 4: 0.1}, 1),
        ({1: 0.04, 2: 0.01, 4: 0.0099}, 2),  # nearly the fastest, and fewer
    ],
)
def test_the_fewest_that_are_nearly_the_fastest_are_taken(seconds, best):
    probe, seen = probe_that_takes(seconds)
    with threads.chosen(None, probe) as choice:
        assert choice.count == torch.get_num_threads() == best
    assert torch.get_num_threads() == 4 and set(seen) == {1, 2, 4}


def test_a_number_is_taken_as_it_is_and_given_back_after_an_error():
    probe, seen = probe_that_takes({})
    with pytest.raises(KeyError), threads.chosen(3, probe) as choice:
        assert choice.count == torch.get_num_threads() == 3
        raise KeyError
    assert torch.get_num_threads() == 4 and not seen


@pytest.mark.parametrize("how", ["OMP_NUM_THREADS", "SLEEPLIB_THREADS", "set_num_threads"])
def test_what_the_user_has_said_stays(how, monkeypatch):
    if how == "set_num_threads":
        torch.set_num_threads(2)
    else:
        monkeypatch.setenv(how, "keep" if how == "SLEEPLIB_THREADS" else "4")
    probe, seen = probe_that_takes({})
    wanted = torch.get_num_threads()
    with threads.chosen(None, probe) as choice:
        assert choice.count == wanted
    assert not seen


def test_a_run_without_a_setting_tries_and_leaves_nothing_behind(tmp_path, monkeypatch):
    tried = []
    honest = threads.chosen

    def chosen(count, probe=None):
        tried.append((count, probe))
        return honest(count, probe)

    monkeypatch.setattr(threads, "chosen", chosen)
    experiment = sl.experiments.get("rule110-quick").replace(
        {"train.steps": 2, "train.batch": 4, "train.warmup": 2, "train.eval_batch": 8, "task.width": 8}
    )
    record = sl.run(experiment, 2, out=tmp_path, progress=False, device="cpu")
    ((count, probe),) = tried
    assert record["status"] == "done" and count is None and torch.get_num_threads() == 4
    trainer = probe.__self__
    weights = [p.detach().clone() for p in trainer.model.parameters()]
    probe()
    assert all(p.grad is None for p in trainer.model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(weights, trainer.model.parameters()))


def test_only_as_many_as_there_are_free_cores_are_tried(monkeypatch):
    monkeypatch.setattr(threads, "free_cores", lambda: 1)
    probe, seen = probe_that_takes({1: 0, 2: 0, 4: 0})
    with threads.chosen(None, probe) as choice:
        assert choice.count == 1
    assert not seen and torch.get_num_threads() == 4
    monkeypatch.undo()
    assert 0 <= threads.free_cores() <= os.cpu_count()


def test_free_are_those_of_the_cores_that_are_ours(monkeypatch):
    """Ours is one core of four, and busy."""
    monkeypatch.undo()
    times = iter(("cpu  60 0 0 340 0\ncpu0 0 0 0 100 0\ncpu3 60 0 0 40 0\n",
                  "cpu  70 0 0 370 0\ncpu0 0 0 0 110 0\ncpu3 70 0 0 40 0\n"))  # fmt: skip
    monkeypatch.setattr(threads, "cores", lambda: [3])
    monkeypatch.setattr(threads.Path, "read_text", lambda self: next(times))
    assert threads.free_cores(0) == 0


def test_a_machine_that_becomes_busy_gets_one_thread():
    with threads.chosen(4) as choice:
        for seconds in (1.0, 0.9, 5.0, 1.0, 5.0, 5.0):  # an evaluation now and then is no reason
            choice.step_took(seconds)
            assert choice.count == torch.get_num_threads() == 4
        choice.step_took(5.0)
        assert choice.count == torch.get_num_threads() == 1


SLEEPS = "import torch, threading, sleeplib; print('sleeplib-team' in str(threading.enumerate()))"
SAYINGS = [("SLEEPLIB_THREADS", "keep"), ("OMP_WAIT_POLICY", "active"), ("", "")]


@pytest.mark.skipif(sys.platform != "linux", reason="GNU OpenMP is asked on Linux only")
@pytest.mark.parametrize("name, value", SAYINGS)
def test_workers_are_told_to_sleep_soon_unless_the_user_says_no(name, value):
    env = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    env |= {name: value} if name else {}
    done = subprocess.run([sys.executable, "-c", SLEEPS], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(not name)
