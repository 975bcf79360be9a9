"""The check of a GPU, as far as it goes without one."""

import json
import subprocess
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

import sleeplib as sl
from sleeplib import __main__ as command_line
from sleeplib import gpu_check

KEYS = {"machine", "versions", "commit", "dirty", "backends", "captured", "tests", "presets", "not done"}
KEYS |= {"wrong", "minutes", "seconds", "status"}


def whole(path):
    """The file; nothing else lies beside it."""
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    return json.loads(path.read_text())


def fresh(tmp_path, device="cpu"):
    """A check that has not begun, and what it says."""
    said = []
    with patch.object(gpu_check, "describe", lambda device: {}):
        return gpu_check._Check(torch.device(device), tmp_path / "check.json", 10.0, said.append), said


def test_a_dry_run_writes_what_it_found(tmp_path, capsys):
    path = tmp_path / "check.json"
    assert command_line.main(["gpu-check", "--device", "cpu", "--out", str(path)]) == 0
    found, out = whole(path), capsys.readouterr().out
    assert found.keys() == KEYS and found["status"] == "done" and found["wrong"] == found["not done"] == []
    errors = [row["error"] for row in found["backends"] if "error" in row]
    assert len(errors) == 8 and 0 < max(errors) < 1e-5  # two backends, two rules, two precisions
    assert found["backends"][-1] == {"backend": "fla", "skipped": "fla runs on CUDA only"}
    assert found["captured"]["error"] == 0 and not found["captured"]["captured"]
    assert found["tests"] == "not run: a dry run" and "0 wrong, 0 not done" in out
    for row, passes in zip(found["presets"], (1, 2), strict=True):
        assert (row["preset"], row["passes"], row["parts"], row["note"]) == ("rule110-quick", passes, 1, "")
        assert row["seconds"] > 0 and row["predicted_bytes"] > 2**20
        assert any(
            line.split()[:4] == [row["preset"], str(passes), "float32", "eager"] for line in out.split("\n")
        )


def test_an_interrupted_check_leaves_whole_what_it_has_found(tmp_path):
    path = tmp_path / "check.json"
    with patch.object(gpu_check._Check, "captured", side_effect=KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            gpu_check.gpu_check("cpu", path, say=lambda line: None)
    found = whole(path)
    assert found["status"] == "interrupted" and len(found["backends"]) == 9 and found["presets"] == []


def test_time_that_is_over_is_said(tmp_path):
    said = []
    found = gpu_check.gpu_check("cpu", tmp_path / "check.json", minutes=0, say=said.append)
    assert found["not done"][0] == "backend reference" and "rule110-quick N=2 eager" in found["not done"]
    assert all(f"not done, the time is over: {what}" in said for what in found["not done"])
    assert whole(tmp_path / "check.json") == found and found["backends"] == found["presets"] == []
    check, said = fresh(tmp_path)
    check.longest["captured step"] = 1e9  # what takes longer than what is left is not begun
    check.part("a captured step", "captured step", None)
    assert check.report["not done"] == ["a captured step"]


def test_a_part_that_breaks_off_leaves_the_others(tmp_path):
    with patch.object(gpu_check._Check, "preset", lambda *args: None):
        with patch.object(gpu_check, "_run", side_effect=ImportError("no such\nkernel")):
            found = gpu_check.gpu_check("cpu", tmp_path / "check.json", say=lambda line: None)
    assert found["wrong"][0] == "backend reference: ImportError: no such kernel" and len(found["wrong"]) == 2
    assert found["captured"]["error"] == 0 and found["status"] == "done"


def test_what_is_wrong_is_said_and_exits_with_1(tmp_path, capsys):
    def off(found, truth):
        return "dg", 0.5

    path = tmp_path / "check.json"
    with patch.object(gpu_check, "_worst", off), patch.object(gpu_check._Check, "preset", lambda *args: None):
        assert command_line.main(["gpu-check", "--device", "cpu", "--out", str(path)]) == 1
    wrong = whole(path)["wrong"]
    assert "chunked, gated_delta_rule, float64, T = 70: dg is off by 0.5" in wrong and len(wrong) == 9
    assert "WRONG: a captured step: dg is off by 0.5" in capsys.readouterr().out


def test_an_error_is_seen_in_any_tensor():
    """Else no backend could be found wrong."""
    truth = {"o": torch.ones(3), "dq": torch.full((3,), 100.0)}
    assert gpu_check._worst({"o": torch.ones(3), "dq": torch.tensor([100.0, 100, 101])}, truth) == (
        "dq",
        0.01,
    )
    assert gpu_check._worst(truth | {"o": torch.tensor([1, 1, torch.nan])}, truth)[0] == "o"


def test_what_does_not_fit_is_tried_in_more_parts(tmp_path):
    small = sl.experiments.get("rule110-quick").replace({"train.batch": 4, "model.pattern": "ag"})
    check, said = fresh(tmp_path)
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate much")
    lost = RuntimeError("operation failed due to a previous error during capture")
    lost.__context__ = full
    with patch.object(gpu_check, "in_turn", side_effect=[lost, full, [0.5]]):
        check.preset(small, 1, "eager")
    with patch.object(gpu_check, "in_turn", side_effect=full):
        check.preset(small, 1, "eager")
        check.preset(small, 1, "captured")
    with patch.object(gpu_check, "in_turn", side_effect=RuntimeError("an illegal address")):
        check.preset(small, 1, "eager")
    notes = [(row["parts"], row["seconds"], row["note"]) for row in check.report["presets"]]
    assert notes[0] == (4, 0.5, "does not fit, in 4 parts it does")
    assert notes[1] == (4, None, "does not fit")
    assert notes[2] == (2, None, "does not fit, 2 parts would")
    assert notes[3] == (1, None, "failed: RuntimeError: an illegal address")
    assert check.report["wrong"] == [f"rule110-quick N=1 eager: {notes[3][2]}"]
    sizes = [row["predicted_bytes"] for row in check.report["presets"]]
    assert sizes[0] < sizes[2]


def test_on_a_gpu_every_quick_and_small_preset_is_measured_and_its_tests_are_run(tmp_path):
    check, said = fresh(tmp_path, "cuda")
    todo = [(e.name, passes, how) for e, passes, how in check.todo()]
    names = [name for name in sl.experiments.PRESETS if name.endswith(("-quick", "-small"))]
    assert {name for name, *_ in todo} == set(names) and len(names) == 7
    assert [t for t in todo if t[2] == "captured"] == todo[-9:]  # what must be compiled comes last
    for code, line, wrong in ((0, "17 passed", 0), (1, "1 failed", 1)):
        done = SimpleNamespace(returncode=code, stdout=f"FAILED x\n{line}\n", stderr="")
        with patch.object(subprocess, "run", return_value=done) as run:
            check.tests()
        assert run.call_args.args[0][1:6] == ["-m", "pytest", "-q", "-m", "cuda"]
        assert said[-1] == f"pytest -m cuda: {line}" and len(check.report["wrong"]) == wrong
    with patch.object(subprocess, "run", side_effect=subprocess.TimeoutExpired("pytest", 240)):
        check.tests()
    assert said[-1].startswith("pytest -m cuda: broken off after 240 s")
    assert check.report["not done"] == ["pytest -m cuda"]


@pytest.mark.parametrize(
    "names, argv",
    [
        ("device must be", []),
        ("--device cpu makes a dry run", ["--device", "cuda"]),
        ("minutes must be", ["--device", "cpu", "--minutes", "-1"]),
        ("is a folder", ["--device", "cpu", "--out", "."]),
        ("out cannot be written", ["--device", "cpu", "--out", "/dev/null/below.json"]),
    ],
)
def test_a_bad_call_is_one_line(tmp_path, capsys, monkeypatch, names, argv):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command_line.main(["gpu-check", *argv]) == 2
    said = capsys.readouterr()
    assert not said.out and len(said.err.splitlines()) == 1 and names in said.err
    assert not list(tmp_path.iterdir())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_prediction_is_near_the_peak_of_a_step_on_a_gpu():
    from sleeplib import device, flops, training

    experiment = sl.experiments.get("rule110-quick")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    trainer = sl.Trainer(experiment, 2, 0, "cuda", 1)
    trainer.forward_backward(training.training_batch(experiment.task, experiment.train, 0, 0))
    peak = device.peak_bytes(trainer.device) - before
    assert 0.7 < peak / flops.training_bytes(experiment, 2) < flops.EAGER
