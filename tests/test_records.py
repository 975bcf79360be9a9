"""Records: written whole or not at all, read as they were written."""

import errno
import json
import os
import platform
import resource
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import patch

import pytest

import sleeplib as sl
from sleeplib import records


def record(passes=1, seed=0, **changes):
    whole = dict.fromkeys(records.KEYS) | dict(preset="p", passes=passes, seed=seed, status="done")
    return whole | changes


def files(folder):
    return sorted(p.name for p in folder.rglob("*") if p.is_file())


def test_a_record_lies_where_the_contract_says(tmp_path):
    path = records.save_record(record(4, 2), tmp_path)
    assert path == tmp_path / "p" / "N4-seed2.json" and files(tmp_path) == ["N4-seed2.json"]
    assert records.load_record(path) == record(4, 2) == json.loads(path.read_text())
    assert records.record_path("p", 4, 2) == records.data_dir() / "results" / "p" / "N4-seed2.json"


def test_records_come_by_passes_and_seed(tmp_path):
    for passes, seed in ((10, 0), (2, 1), (2, 0), (1, 0)):
        records.save_record(record(passes, seed), tmp_path)
    found = [(r["passes"], r["seed"]) for r in sl.load_records("p", out=tmp_path)]
    assert found == [(1, 0), (2, 0), (2, 1), (10, 0)]
    assert [r["seed"] for r in sl.load_records("p", 2, out=tmp_path)] == [0, 1]
    assert sl.load_records("never run", out=tmp_path) == []


@pytest.mark.parametrize("keys", [{"extra": 1}, None])
def test_missing_and_unknown_keys_are_refused(tmp_path, keys):
    bad = record() | keys if keys else {k: v for k, v in record().items() if k != "curve"}
    with pytest.raises(ValueError, match="record: missing or unknown keys .'(extra|curve)'."):
        records.save_record(bad, tmp_path)
    assert files(tmp_path) == []


@pytest.mark.parametrize("content", ["{", "[]", '{"preset": "p"}', ""])
def test_a_file_that_is_no_record_is_refused(tmp_path, content):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "N1-seed0.json").write_text(content)
    with pytest.raises(ValueError, match="^path: .*N1-seed0.json is not"):
        sl.load_records("p", out=tmp_path)


def test_final_scores_are_those_of_finished_runs(tmp_path):
    for seed, status in ((0, "done"), (1, "stopped after step 3"), (2, "done")):
        records.save_record(
            record(seed=seed, status=status, final={"exact": seed / 4, "token": 1.0}), out=tmp_path
        )
    assert records.final_scores("p", 1, out=tmp_path) == {0: 0.0, 2: 0.5}
    assert records.final_scores("p", 1, (1, 2), tmp_path, key="token") == {2: 1.0}
    assert records.final_scores("p", 2, out=tmp_path) == {}


def test_a_table_has_a_column_a_seed_and_a_dash_where_nothing_was_run(tmp_path):
    for seed, score in ((0, 0.5), (2, 0.75)):
        records.save_record(record(4, seed, final={"exact": score}), tmp_path)
    arms = {"asleep": ("p", 4, tmp_path), "awake, too": ("p", 1, tmp_path)}
    assert records.score_table(arms, (0, 1, 2)).split("\n") == [
        "seed           0     1     2    mean",
        "asleep      0.50     -  0.75    0.62",
        "awake, too     -     -     -    not run yet",
    ]
    short = records.score_table({"N": arms["asleep"]}, (0, 2)).split("\n")
    assert short == ["seed     0     2    mean", "N     0.50  0.75    0.62"]


def refuse(code):
    return OSError(code, os.strerror(code))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_record_and_nothing_else(tmp_path, call):
    records.save_record(record(), tmp_path)
    with (
        patch.object(records.os, call, side_effect=refuse(errno.ENOSPC)),
        pytest.raises(
            OSError, match="record not written, nothing changed: No space left on device.*N1-seed0"
        ),
    ):
        records.save_record(record(status="new"), tmp_path)
    assert files(tmp_path) == ["N1-seed0.json"]
    assert sl.load_records("p", out=tmp_path) == [record()]


def test_a_disk_that_fills_up_while_writing(tmp_path):
    """No mock: the kernel itself refuses to write more than a page."""
    records.save_record(record(), tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="record not written, nothing changed: File too large"):
            records.save_record(record(curve=[0] * 10_000), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(tmp_path) == ["N1-seed0.json"] and sl.load_records("p", out=tmp_path) == [record()]


def test_an_interrupt_while_writing_leaves_no_half_file(tmp_path):
    with patch.object(records.os, "fsync", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        records.save_record(record(), tmp_path)
    assert files(tmp_path) == []


def test_a_record_that_is_not_json_is_not_written(tmp_path):
    with pytest.raises(TypeError):
        records.save_record(record(final={"loss": object()}), tmp_path)
    assert files(tmp_path) == []


def test_where_a_run_came_from():
    commit, dirty = records.commit()
    assert commit is None or len(commit) == 40 and isinstance(dirty, bool)
    with patch.object(records.subprocess, "run", side_effect=FileNotFoundError("git")):
        assert records.commit() == ("unknown: git", None)
    assert {"python", "torch", "numpy", "numba", "sleeplib"} <= set(records.versions())
    assert "thread" in records.processor()


def test_git_that_refuses_is_recorded_with_its_reason():
    said = "fatal: detected dubious ownership in repository\nTo add an exception ...\n"
    with patch.object(records.subprocess, "run", return_value=SimpleNamespace(returncode=128, stderr=said)):
        assert records.commit() == ("unknown: fatal: detected dubious ownership in repository", None)


def git(folder, *args):
    who = ["-c", "user.name=x", "-c", "user.email=x"]
    subprocess.run(["git", "-C", folder, *who, *args], check=True, capture_output=True)


def test_the_commit_is_never_that_of_a_surrounding_repository(tmp_path, monkeypatch):
    """Installed below somebody's repository, copied into it without a .git, and as a checkout of its own."""
    inner = tmp_path / "inner"
    (inner / "sleeplib").mkdir(parents=True)
    (inner / "sleeplib" / "records.py").write_text("")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "theirs")
    monkeypatch.setattr(records, "__file__", str(inner / "sleeplib" / "records.py"))
    monkeypatch.chdir(tmp_path)
    (inner / "pyproject.toml").write_text('name = "another"')
    assert records.commit() == (None, None) and records.checkout() is None
    assert records.results_dir() == tmp_path / "sleeplib-results"
    assert records.data_dir() == inner / "sleeplib" / "data"
    (inner / "pyproject.toml").write_text('[project]\nname = "sleeplib"\n')
    assert records.commit() == ("unknown: the checkout is no repository of its own", None)
    git(inner, "init")
    git(inner, "add", ".")
    git(inner, "commit", "-m", "ours")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    commit, dirty = records.commit()
    assert len(commit) == 40 and dirty is False
    (inner / "sleeplib" / "records.py").write_text("changed")
    assert records.commit() == (commit, True) and records.results_dir() == inner / "data" / "results"


def test_an_installed_package_reads_the_shipped_records_and_its_users_own(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "__file__", str(tmp_path / "site" / "sleeplib" / "records.py"))
    monkeypatch.chdir(tmp_path)
    shipped, own = records.data_dir() / "results", tmp_path / "sleeplib-results"
    for seed, out in ((0, shipped), (1, shipped), (1, own), (2, None)):
        records.save_record(record(1, seed, command=f"{out == shipped}"), out)
    assert [(r["seed"], r["command"]) for r in sl.load_records("p")] == [
        (0, "True"),
        (1, "False"),
        (2, "False"),
    ]
    assert len(sl.load_records("p", out=shipped)) == 2
    assert not any("site" in path.parts for path in own.rglob("*"))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_record_is_strict_json(tmp_path, number):
    with pytest.raises(ValueError, match="^record: .*not JSON compliant"):
        records.save_record(record(final={"loss": number}), tmp_path)
    assert files(tmp_path) == []
    path = records.save_record(record(seconds=0.5), tmp_path)
    path.write_text(path.read_text().replace("0.5", "NaN"))
    with pytest.raises(ValueError, match="^path: .* is not JSON: NaN is no JSON number"):
        records.load_record(path)


def test_what_a_killed_writer_left_is_removed_and_a_living_ones_file_stays(tmp_path):
    path = records.save_record(record(), tmp_path)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    mark = f".{path.name}.{platform.node()}-"
    stray, living, other, far = (
        path.with_name(name)
        for name in (
            f"{mark}{dead.pid}.abc",
            f"{mark}{os.getppid()}.abc",
            f".x{mark}1.abc",
            f".{path.name}.far-1.x",
        )
    )
    for file in (stray, living, other, far):
        file.write_text("half")
    records.save_record(record(), tmp_path)
    assert not stray.exists() and living.exists() and other.exists() and far.exists()


def test_a_new_name_is_forced_to_the_disk_where_folders_can_be(tmp_path):
    synced, honest = [], os.fsync

    def fsync(handle):
        synced.append(os.path.isdir(f"/proc/self/fd/{handle}"))
        if synced[-1]:
            raise refuse(errno.EINVAL)  # some file systems refuse; the file is there all the same
        return honest(handle)

    with patch.object(records.os, "fsync", fsync):
        assert records.load_record(records.save_record(record(), tmp_path)) == record()
    assert synced == [False, True]


def test_a_kept_model_is_found_by_its_short_name():
    root = records.data_dir() / "checkpoints"
    assert records.kept_model_path("depo-quick/N4-seed0") == root / "depo-quick" / "N4-seed0"
    with pytest.raises(
        ValueError, match="^name: 'depo-quick' is ambiguous; write one of depo-quick/N1-seed0, "
    ):
        records.kept_model_path("depo-quick")
    for name in ("depo-quack", "../checkpoints/depo-quick/N4-seed0", ""):
        with pytest.raises(
            FileNotFoundError, match="^name: .* is no folder, and no model .*; these .*depo-quick/N1-seed0"
        ):
            records.kept_model_path(name)


def test_a_preset_with_one_kept_model_needs_no_more_than_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "data_dir", lambda: tmp_path)
    folder = tmp_path / "checkpoints" / "p" / "N4-seed0"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert records.kept_model_path("p") == folder


def test_every_shipped_record_is_one():
    for path in [p for name in ("results", "reruns") for p in (records.data_dir() / name).rglob("*.json")]:
        found = records.load_record(path)
        out = path.parent.parent
        assert path == records.record_path(found["preset"], found["passes"], found["seed"], out)
        experiment = sl.experiments.get(found["preset"])
        assert found["config_hash"] == experiment.config_hash(), f"{path}: the preset has changed since"
        steps = [entry["step"] for entry in found["curve"]]
        assert steps == sorted(steps) and (found["status"] != "done" or found["final"])
