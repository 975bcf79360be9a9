"""Records: written whole or not at all, read as they were written."""

import errno
import json
import os
import resource
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
        assert records.commit() == (None, None)
    assert {"python", "torch", "numpy", "numba", "sleeplib"} <= set(records.versions())
    assert "thread" in records.processor()


def test_every_shipped_record_is_one():
    for path in [p for name in ("results", "reruns") for p in (records.data_dir() / name).rglob("*.json")]:
        found = records.load_record(path)
        out = path.parent.parent
        assert path == records.record_path(found["preset"], found["passes"], found["seed"], out)
        experiment = sl.experiments.get(found["preset"])
        assert found["config_hash"] == experiment.config_hash(), f"{path}: the preset has changed since"
        steps = [entry["step"] for entry in found["curve"]]
        assert steps == sorted(steps) and (found["status"] != "done" or found["final"])
