"""The command line: what it prints, and that bad input is one line and exit code 2."""

import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from test_training import TINY

import sleeplib as sl
from sleeplib import __main__ as command_line
from sleeplib import checkpoints, records, reproduce, runs, threads
from sleeplib.checkpoints import save_checkpoint
from sleeplib.flops import training_flops


def call(capsys, *argv):
    """Exit code, standard output, standard error."""
    try:
        code = command_line.main(list(argv))
    except SystemExit as end:
        code = end.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def tiny_run(tmp_path, *rest, **settings):
    argv = ["run", "rule110-quick", "--passes", "2", "--device", "cpu", "--out", str(tmp_path), *rest]
    for key, value in (TINY | {"train.steps": "4"} | settings).items():
        argv += ["--set", f"{key}={value}"]
    return argv


def test_list_names_every_preset(capsys, tmp_path):
    code, out, err = call(capsys, "list", "--out", str(tmp_path))
    assert code == 0 and not err
    names, abouts = out.splitlines()[::2], out.splitlines()[1::2]
    known = sl.experiments.PRESETS | sl.experiments.PRETRAINED
    assert [line.split()[0] for line in names] == list(known)
    assert names[0].split() == ["rule110-quick", "9", "to", "do"]
    assert [line.strip() for line in abouts] == [e.about for e in known.values()]


def test_the_queue_knows_what_is_done_begun_and_to_do_and_what_it_costs(capsys, tmp_path):
    quick, here = sl.experiments.get("rule110-quick"), records.processor().rpartition(",")[0]
    assert reproduce.core_hours(tmp_path) == {}
    done = dict.fromkeys(records.KEYS) | dict(preset=quick.name, passes=2, status="done", final={})
    done["config_hash"] = quick.config_hash()
    for seed, seconds, device in (
        (0, 3600, f"{here}, 1 thread"),
        (1, 3600, f"{here}, 2 threads"),
        (2, 9, "abacus, 1 thread"),
    ):
        records.save_record(done | dict(seed=seed, seconds=seconds, device=device), tmp_path)
    assert reproduce.core_hours(tmp_path)[quick.name, 2] == (1.5, True)  # another machine's do not count
    hours, measured = reproduce.core_hours(tmp_path)[quick.name, 4]
    ratio = training_flops(quick, 4) / training_flops(quick, 2)
    assert hours == pytest.approx(ratio / np.median([1, 1 / 2])) and not measured
    trainer = sl.Trainer(quick, 4, 1, "cpu")
    trainer.step = 200
    with patch.object(trainer, "snapshot", lambda: ({"x": torch.zeros(1)}, {"step": 200})):
        save_checkpoint(trainer, records.record_path(quick.name, 4, 1, tmp_path).with_suffix(".safetensors"))
    records.save_record(done | dict(passes=1, seed=2, status="failed: loss is not finite"), tmp_path)
    runs = reproduce.runs_of(quick, tmp_path)
    assert runs[1, 2][0] == "failed"  # it would fail again
    assert runs[4, 1] == ("begun", 200) and runs[2, 1] == ("done", 800) and runs[4, 0] == ("to do", 0)
    assert list(runs)[:4] == [(4, 0), (2, 0), (1, 0), (4, 1)]
    out = call(capsys, "list", "--out", str(tmp_path))[1]
    assert "3 done, 1 failed, 1 begun, 4 to do core-hours N=1 ~" in out and "N=2 1.5, N=4 ~" in out
    lines = []
    with patch.object(reproduce.subprocess, "Popen", return_value=SimpleNamespace(wait=lambda: 3)):
        codes = reproduce.reproduce("rule110", seeds=[1], jobs=1, out=tmp_path, say=lines.append)[1]
        with patch.object(reproduce.torch.cuda, "is_available", return_value=True):
            reproduce.reproduce("rule110", seeds=[1], out=tmp_path, say=lines.append)
    assert codes == [3, 3, 3] and len(lines) == 8
    names = quick.name, f"{quick.name}-long"
    rest = sum(reproduce.core_hours(tmp_path)[name, 1][0] for name in names)
    left = rest + hours * 0.75  # of 800 steps 200 are done
    left, rest = left / len(threads.cores()), rest / len(threads.cores())  # one run at a time has them all
    assert lines[0] == f"rule110-quick: 3 runs to make, 1 at a time, about {left:.1f} hours left"
    end = f"1 of 3: rule110-quick N=4 seed=1 stopped with code 3; about {rest:.1f} hours left"
    assert lines[1].endswith(end)
    # What a run took on this CPU says nothing of a GPU.
    assert lines[4] == "rule110-quick: 3 runs to make, 1 at a time, hours unknown"
    reproduce.reproduce("gsm_infinite", "ring16", out=tmp_path, jobs=1, say=lines.append)
    assert lines[8] == "gsm_infinite-ring16: 0 runs to make, 1 at a time, about 0.0 hours left"
    with pytest.raises(ValueError, match="^scale: no task has presets called huge"):
        reproduce.reproduce("rule110", "huge")


@pytest.mark.parametrize("content", [b"", b"no checkpoint at all", b"\xff" * 99, b"\x02" + bytes(7) + b"{}"])
def test_a_damaged_checkpoint_does_not_stop_the_queue(capsys, tmp_path, content):
    checkpoint = records.record_path("rule110-quick", 4, 0, tmp_path).with_suffix(".safetensors")
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(content)
    assert reproduce.runs_of(sl.experiments.get("rule110-quick"), tmp_path)[4, 0] == ("to do", 0)


def test_an_installed_sleeplib_does_not_take_shipped_runs_for_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick = sl.experiments.get("rule110-quick")
    assert reproduce.runs_of(quick)[4, 0][0] == "done"
    monkeypatch.setattr(records, "checkout", lambda: None)
    assert {state for state, _ in reproduce.runs_of(quick).values()} == {"to do"}


def test_sample_prints_windows_and_what_is_asked(capsys):
    code, out, _ = call(capsys, "sample", "rule110", "--seed", "3")
    lines = out.splitlines()
    assert code == 0 and len(lines) == 6 and len(lines[0].split()) == 25
    assert lines[4].split()[1] == "<answer>" and lines[5].split()[0] == "asked" and len(lines[5].split()) == 5
    assert call(capsys, "sample", "rule110", "--seed", "3")[1] == out
    assert call(capsys, "sample", "rule110", "--seed", "3", "--split", "test")[1] != out


def test_run_writes_a_record_and_says_so(capsys, tmp_path):
    code, out, err = call(capsys, *tiny_run(tmp_path, "--seed", "5"))
    assert code == 0 and "rule110-quick N=2 seed=5: done; loss " in out
    (record,) = records.load_records("rule110-quick", out=tmp_path)
    assert record["seed"] == 5 and record["config"]["task"]["width"] == 8


def test_a_trained_model_is_kept_in_half_precision_once_the_run_is_done(capsys, tmp_path):
    keep = ("--keep", str(tmp_path / "kept"))
    assert "stopped after step 3" in call(capsys, *tiny_run(tmp_path, "--stop-after", "3", *keep))[1]
    assert not (tmp_path / "kept").exists()
    assert call(capsys, *tiny_run(tmp_path, "--resume", *keep))[0] == 0
    model = sl.HybridLM.from_checkpoint(tmp_path / "kept" / "rule110-quick" / "N2-seed0")
    assert model.head.weight.dtype == torch.float16
    task = sl.tasks.Rule110(width=8, strings=2, steps=6)
    batch = task.batch(4, np.random.default_rng(0), split="test")
    assert sl.evaluate(model.float(), task, batch, passes=2).keys() == task.chance().keys()


def test_run_in_pieces(capsys, tmp_path):
    assert "stopped after step 3" in call(capsys, *tiny_run(tmp_path, "--stop-after", "3"))[1]
    code, out, _ = call(capsys, *tiny_run(tmp_path, "--stop-after", "3", "--resume"))
    assert code == 0 and ": done; " in out


def test_a_failed_run_exits_with_1(capsys, tmp_path):
    code, out, _ = call(capsys, *tiny_run(tmp_path, **{"train.adamw_lr": "1e38"}))
    assert code == 1 and ": failed: " in out


@pytest.mark.parametrize("number, wanted, word", [(2, 130, "interrupted"), (15, 143, "terminated")])
def test_a_signal_is_the_exit_code_that_a_shell_expects(capsys, tmp_path, number, wanted, word):
    honest = sl.Trainer.train_step

    def train_step(self, **options):
        signal.raise_signal(number)
        return honest(self, **options)

    with patch.object(sl.Trainer, "train_step", train_step):
        code, out, _ = call(capsys, *tiny_run(tmp_path))
    assert code == wanted and f": {word} after step 1; " in out


def test_a_finished_run_is_replaced_only_when_told_to(capsys, tmp_path):
    assert call(capsys, *tiny_run(tmp_path))[0] == 0
    code, out, err = call(capsys, *tiny_run(tmp_path, "--stop-after", "1"))
    assert code == 2 and not out and len(err.splitlines()) == 1 and "--overwrite" in err
    assert ": done; " in call(capsys, *tiny_run(tmp_path, "--stop-after", "1", "--resume"))[1]
    record = tmp_path / "rule110-quick" / "N2-seed0.json"
    before, written = record.read_bytes(), record.stat().st_mtime_ns
    again = call(capsys, *tiny_run(tmp_path, "--stop-after", "1", "--overwrite"))
    assert (
        ": stopped after step 1; " in again[1] and record.read_bytes() == before
    )  # until the new one is done
    assert ": done; " in call(capsys, *tiny_run(tmp_path, "--resume"))[1] and record.read_bytes() == before
    assert record.with_suffix(".safetensors").exists()
    assert ": done; " in call(capsys, *tiny_run(tmp_path, "--resume", "--overwrite"))[1]
    assert record.stat().st_mtime_ns != written and not record.with_suffix(".safetensors").exists()


def test_a_run_that_was_stopped_is_begun_anew_only_when_told_to(capsys, tmp_path):
    checkpoint = tmp_path / "rule110-quick" / "N2-seed0.safetensors"
    call(capsys, *tiny_run(tmp_path, "--stop-after", "3"))
    before = checkpoint.read_bytes()
    code, _, err = call(capsys, *tiny_run(tmp_path, "--stop-after", "1"))
    assert code == 2 and "stopped after step 3" in err and "--resume" in err and "--overwrite" in err
    assert checkpoint.read_bytes() == before
    assert (
        ": stopped after step 1; " in call(capsys, *tiny_run(tmp_path, "--stop-after", "1", "--overwrite"))[1]
    )


def test_a_finished_run_has_its_record_though_its_checkpoint_does_not_fit(capsys, tmp_path):
    full = OSError(28, "No space left on device")
    with patch.object(checkpoints, "write_atomically", side_effect=full):
        code, out, err = call(capsys, *tiny_run(tmp_path, "--stop-after", "2"))
        assert code == 2 and "checkpoint not written" in err and "N2-seed0.safetensors" in err
        code, out, err = call(capsys, *tiny_run(tmp_path))
    assert code == 0 and ": done; " in out and not err


@pytest.mark.parametrize(
    "names, argv",
    [
        ("rule111", ["run", "rule111", "--passes", "2"]),
        ("passes", ["run", "rule110-quick", "--passes", "0"]),
        ("seed", ["run", "rule110-quick", "--passes", "1", "--seed", "-1"]),
        ("stop_after", ["run", "rule110-quick", "--passes", "1", "--stop-after", "0"]),
        ("train.stepz", ["run", "rule110-quick", "--passes", "1", "--set", "train.stepz=1"]),
        ("train.steps", ["run", "rule110-quick", "--passes", "1", "--set", "train.steps=few"]),
        ("KEY=VALUE", ["run", "rule110-quick", "--passes", "1", "--set", "train.steps"]),
        ("width", ["run", "rule110-quick", "--passes", "1", "--set", "task.width=0"]),
        ("dry-run goes with --figure6", ["bench", "--dry-run"]),
        ("device", ["run", "rule110-quick", "--passes", "1", "--device", "abacus"]),
        ("device", ["run", "rule110-quick", "--passes", "1", "--device", "cuda:99"]),
        ("--passes", ["run", "rule110-quick", "--passes", "many"]),
        ("--passes", ["run", "rule110-quick"]),
        ("micro_batches", ["run", "rule110-quick", "--passes", "1", "--micro-batches", "129"]),
        ("threads", ["run", "rule110-quick", "--passes", "1", "--threads", "0"]),
        ("train.clip", ["run", "rule110-quick", "--passes", "1", "--set", "train.clip=0"]),
        ("chess", ["sample", "chess"]),
        ("fly", ["fly"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, tmp_path, names, argv):
    argv = argv + ["--out", str(tmp_path)] * (argv[0] == "run")
    code, out, err = call(capsys, *argv)
    assert code == 2 and not out
    assert len(err.splitlines()) == 1 and names in err, err
    assert not list(tmp_path.rglob("*"))


def test_settings_keep_away_from_the_presets_own_records(capsys):
    argv = ["run", "rule110-quick", "--passes", "1", "--set", "train.steps=1"]
    code, _, err = call(capsys, *argv)
    assert code == 2 and "--out" in err


def test_a_damaged_checkpoint_and_a_full_disk_are_one_line(capsys, tmp_path):
    call(capsys, *tiny_run(tmp_path, "--stop-after", "2"))
    checkpoint = tmp_path / "rule110-quick" / "N2-seed0.safetensors"
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[:-7])
    code, _, err = call(capsys, *tiny_run(tmp_path, "--resume"))
    assert code == 2 and len(err.splitlines()) == 1 and "checkpoint: " in err and "damaged" in err
    checkpoint.write_bytes(whole)
    with patch.object(records.os, "fsync", side_effect=OSError(28, "No space left on device")):
        code, _, err = call(capsys, *tiny_run(tmp_path, "--resume"))
    assert code == 2 and len(err.splitlines()) == 1 and "No space left on device" in err
    assert checkpoint.read_bytes() == whole


def test_reproduce_runs_what_is_missing_and_nothing_twice(capsys, tmp_path):
    started = []

    def start(command, env, process_group):
        preset = command[command.index("run") + 1]
        n, seed = (int(command[command.index(flag) + 1]) for flag in ("--passes", "--seed"))
        started.append((preset, n, seed))
        assert "--resume" in command and env["OMP_NUM_THREADS"]
        return SimpleNamespace(wait=lambda: 0)

    done = dict.fromkeys(records.KEYS) | dict(preset="rule110-quick", passes=2, seed=1, status="done")
    done |= dict(final={"exact": 1.0}, seconds=1.0, device="abacus")
    done |= dict(config_hash=sl.experiments.get("rule110-quick").config_hash())
    records.save_record(done, tmp_path)
    records.save_record(done | dict(seed=2, status="stopped after step 3"), tmp_path)
    records.save_record(done | dict(passes=4, seed=2, config_hash="other settings"), tmp_path)
    with patch.object(reproduce.subprocess, "Popen", start):
        code, out, _ = call(capsys, "reproduce", "rule110", "--out", str(tmp_path), "--jobs", "1")
    assert code == 0 and "N=2 seed=1: done; exact 1.000; 1 s on abacus" in out
    quick = [("rule110-quick", n, seed) for seed in (0, 1, 2) for n in (4, 2, 1) if (n, seed) != (2, 1)]
    assert started == [*quick, ("rule110-quick-long", 1, 0)]


def test_reproduce_overwrites_only_when_told_to_and_hands_its_options_on(tmp_path):
    done = dict.fromkeys(records.KEYS) | dict(preset="rule110-quick-long", passes=1, seed=0, status="done")
    done |= dict(config_hash=sl.experiments.get("rule110-quick-long").config_hash())
    records.save_record(done, tmp_path)
    with patch.object(reproduce.subprocess, "Popen", return_value=SimpleNamespace(wait=lambda: 0)) as start:
        for overwrite in (False, True):
            start.reset_mock()
            reproduce.reproduce("rule110", jobs=1, seeds=[0], out=tmp_path, keep="kept", overwrite=overwrite)
            commands = [call.args[0] for call in start.call_args_list]
            assert len(commands) == 3 + overwrite
            for command in commands:
                assert ("--overwrite" in command) == overwrite
                assert command[-4:] == ["--out", str(tmp_path), "--keep", "kept"]
    with pytest.raises(ValueError, match="jobs must be an int of at least 1; got 0"):
        reproduce.reproduce("rule110", jobs=0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_queue_that_is_stopped_stops_its_runs(tmp_path, number):
    """The runs are told once, and the queue waits for them; what was not begun stays so."""
    code = f"""if True:
        import os, signal, subprocess, sys, threading
        from sleeplib import __main__, reproduce
        signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored, as under nohup
        run = "import signal, sys, time; got = []; signal.signal(15, lambda *_: got.append(1)); "
        run += "open(sys.argv[1], 'x').close(); [time.sleep(0.05) for _ in iter(lambda: not got, False)]; "
        run += "time.sleep(0.5); sys.exit(100 + len(got))"
        honest, made = subprocess.Popen, []
        def start(command, **options):
            if "sleeplib" not in command:
                return honest(command, **options)
            made.append(honest([sys.executable, "-c", run, f"{tmp_path}/{{len(made)}}"], **options))
            return made[-1]
        reproduce.subprocess.Popen = start
        def stop():
            while not os.path.exists("{tmp_path}/0"):
                pass
            os.kill(os.getpid(), {int(number)})
        threading.Thread(target=stop).start()
        code = __main__.main(["reproduce", "rule110", "--jobs", "1", "--out", "{tmp_path}"])
        print(code, [process.poll() for process in made])
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == f"{128 + number} [101]", done.stderr


def test_what_does_not_fit_into_memory_is_one_line(capsys, tmp_path):
    for error in (
        MemoryError("its weights take 9 GiB"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes\nat x.cpp"),
        RuntimeError("CUDA error: out of memory"),
    ):
        with patch.object(runs, "Trainer", side_effect=error):
            code, _, err = call(capsys, *tiny_run(tmp_path))
        assert (
            code == 2 and len(err.splitlines()) == 1 and "out of memory" in err and "--micro-batches" in err
        )
    with (
        patch.object(runs, "Trainer", side_effect=RuntimeError("not allocated yet")),
        pytest.raises(RuntimeError),
    ):
        call(capsys, *tiny_run(tmp_path))


def test_whoever_reads_may_stop_reading():
    command = f"{sys.executable} -m sleeplib sample rule110 | true"
    environment = {name: x for name, x in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, env=environment)
    assert done.returncode == 0 and not done.stderr


def test_cores_are_those_that_this_process_may_use(monkeypatch):
    """Affinity, and the lack of it on macOS and Windows, are simulated."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5, 3}, raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda *args: None, raising=False)
    assert threads.cores() == [3, 5] and reproduce.shares(2) == [{3}, {5}] and reproduce.shares(3) == []
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.delattr(os, "sched_setaffinity")
    assert threads.cores() == list(range(os.cpu_count())) and reproduce.shares(1) == []


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no binding of threads to cores here")
def test_jobs_share_the_cores_and_their_children_keep_to_theirs():
    ours = os.sched_getaffinity(0)
    for jobs in (1, len(ours)):
        found = reproduce.shares(jobs)
        assert len(found) == jobs and set().union(*found) == ours and sum(map(len, found)) == len(ours)
    assert reproduce.shares(len(ours) + 1) == []
    code = "import os; print(*os.sched_getaffinity(0))"
    (share,) = kept = [{min(ours)}]
    with ThreadPoolExecutor(1, initializer=reproduce.pin_to_cores, initargs=(kept,)) as pool:
        child = pool.submit(subprocess.run, [sys.executable, "-c", code], capture_output=True, text=True)
        assert {int(core) for core in child.result().stdout.split()} == share
    assert os.sched_getaffinity(0) == ours  # only that thread was bound


def test_make_reproduce_knows_every_task():
    makefile = (Path(__file__).resolve().parent.parent / "Makefile").read_text()
    assert re.search(r"^TASKS \?= (.*)$", makefile, re.MULTILINE)[1].split() == list(sl.tasks.TASKS)


def test_doctor_says_what_is_wrong(capsys, monkeypatch):
    monkeypatch.setattr(records, "results_dir", lambda: Path("/dev/null/below"))
    code, out, err = call(capsys, "doctor")
    assert code == 1 and "records cannot be written: " in out


def test_doctor_finds_this_machine_well(capsys):
    code, out, err = call(capsys, "doctor")
    assert code == 0 and "chunked on cpu against the reference: ok" in out and '"torch"' in out


def test_the_module_runs():
    command = [sys.executable, "-m", "sleeplib", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "reproduce" in done.stdout
