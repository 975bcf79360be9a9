"""Training: stopped in any way, it goes on as if it had not been; everything bad is refused by name."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_truths import tiny_experiment
from tiny import close
from torch.utils.flop_counter import FlopCounterMode

import sleeplib as sl
from sleeplib import checkpoints, evaluation, flops, muon, records, runs, training
from sleeplib.muon import Muon

SAME = ("curve", "final", "tokens", "data_hash", "config_hash", "status", "chance")
TINY = {
    "task.width": "8",
    "task.steps": "1",
    "model.d_model": "16",
    "model.pattern": "ag",
    "model.num_heads": "2",
    "model.key_size": "4",
    "model.value_size": "8",
    "model.mlp_size": "16",
    "train.batch": "4",
    "train.eval_batch": "8",
    "train.eval_every": "20",
}


def same(a, b):
    """Two records say the same, to the bit."""
    for key in SAME:
        assert a[key] == b[key], key


def train(tmp_path, experiment=None, passes=2, **options):
    return sl.run(experiment or tiny_experiment(steps=9), passes, device="cpu", out=tmp_path, **options)


def test_muon_is_pytorchs():
    """Products in bfloat16 may round otherwise where they are batched; beyond that the step is the same."""
    shapes = ((8, 8), (16, 8), (8, 16), (16, 8), (3, 8), (8, 8))
    generator = torch.Generator().manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.ones(s)) for s in shapes] for _ in range(2))
    options = dict(lr=0.1, momentum=0.9, weight_decay=0.05, adjust_lr_fn="original")
    optimizers = Muon(ours, **options), torch.optim.Muon(theirs, **options)
    for _ in range(4):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        before = [a.detach().clone() for a in ours]
        for optimizer in optimizers:
            optimizer.step()
        for a, b, old in zip(ours, theirs, before):
            change = (b - old).norm()
            assert (a - b).norm() < 0.02 * change, tuple(a.shape)
            assert change > 0.1
            with torch.no_grad():
                a.copy_(b)
        one, two = (o.state_dict()["state"] for o in optimizers)
        for index in range(len(shapes)):
            close(one[index]["momentum_buffer"], two[index]["momentum_buffer"])


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 48, 16), (1, 64, 160)])
def test_products_in_float32_round_to_those_in_bfloat16(shape):
    """What a CPU does that has no instructions for bfloat16, and what others do."""
    x, found = torch.randn(shape, generator=torch.Generator().manual_seed(0)), []
    for native in (True, False):
        with patch.object(muon, "multiplies_bfloat16", lambda device, native=native: native):
            found.append(muon.orthogonalise(x, (3.4445, -4.775, 2.0315), 5, 1e-7))
    one, two = found
    assert one.dtype == two.dtype == torch.bfloat16 and one.shape == two.shape == shape
    assert (one.float() - two.float()).norm() < 0.02 * one.float().norm()


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust", [None, "original", "match_rms_adamw"])
def test_muon_honours_the_options_of_its_base_class(adjust, nesterov):
    matrix = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    ours, theirs = (torch.nn.Parameter(matrix.clone()) for _ in range(2))
    options = dict(lr=0.1, adjust_lr_fn=adjust, nesterov=nesterov)
    for parameter, optimizer in (
        (ours, Muon([ours], **options)),
        (theirs, torch.optim.Muon([theirs], **options)),
    ):
        for _ in range(2):

            def closure(parameter=parameter, optimizer=optimizer):
                optimizer.zero_grad()
                loss = (parameter**3).sum()
                loss.backward()
                return loss

            assert optimizer.step(closure).requires_grad
    assert (ours - theirs).norm() < 0.02 * (theirs - matrix).norm()


def test_muon_leaves_a_matrix_without_gradient_alone():
    one, two = (torch.nn.Parameter(torch.eye(4)) for _ in range(2))
    optimizer = Muon([one, two], lr=0.1)
    one.grad = torch.eye(4)
    optimizer.step()
    assert torch.equal(two, torch.eye(4)) and not torch.equal(one, torch.eye(4))


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("settings", [{}, {"model.loop": "(1, 2)"}, {"model.pattern": "ajhg"}], ids=str)
def test_flops_are_those_of_the_products_that_are_computed(settings, passes):
    """PyTorch counts the projections, forward and backward; the loops it cannot see are added by hand."""
    experiment = sl.experiments.get("rule110-quick").replace({"train.batch": "8"} | settings)
    trainer, model, task = training.Trainer(experiment, passes, 0, "cpu"), experiment.model, experiment.task
    batch = training.training_batch(task, experiment.train, 0, 0)
    with FlopCounterMode(display=False) as counter:
        trainer.loss(batch.inputs, batch.labels).backward()
    hidden = 0
    for tokens, asleep in ((task.width, True), (task.width, True), (task.length - 2 * task.width, False)):
        for i, kind in enumerate(model.pattern):
            first, last = model.loop or (0, 3)
            repeats = passes if asleep and first <= i <= last else 1
            if kind == "a":
                unread = asleep and i == 3
                hidden += tokens * (repeats - unread) * 2 * model.d_model * (tokens + 1)
            else:
                hidden += tokens * repeats * 6 * model.num_heads * model.K * model.V
    counted = counter.get_total_flops()
    if "j" in model.pattern:  # the filters of a Jet layer are left out
        layer = trainer.model.layers[1].mixer.conv
        filters = layer.down.weight.numel() + layer.up.weight.numel()
        counted -= 3 * 8 * 2 * filters * (2 * task.width * passes + task.length - 2 * task.width)
    ours = flops.training_flops(experiment, passes)
    assert abs(ours - 3 * 8 * hidden - counted) < 0.02 * counted


def test_pieces_equal_one_run(tmp_path):
    """Also when a piece ends between two entries of the curve."""
    experiment = tiny_experiment(steps=9, eval_every=4, save_every=2)
    whole = train(tmp_path / "whole", experiment)
    statuses = []
    for _ in range(4):
        piece = train(tmp_path / "pieces", experiment, resume=True, stop_after=3)
        statuses.append(piece["status"])
        checkpoint = tmp_path / "pieces" / "tiny" / "N2-seed0.safetensors"
        assert checkpoint.exists() == (piece["status"] != "done")
        if piece["status"] == "done":
            break
    assert statuses == ["stopped after step 3", "stopped after step 6", "done"]
    same(piece, whole)
    assert [entry["step"] for entry in whole["curve"]] == [4, 8, 9]


def test_the_same_call_gives_the_same_record(tmp_path):
    same(train(tmp_path / "a"), train(tmp_path / "b"))


def test_seeds_differ(tmp_path):
    a, b = (train(tmp_path, seed=seed) for seed in (0, 1))
    assert a["data_hash"] != b["data_hash"] and a["curve"] != b["curve"]


def test_a_run_that_was_stopped_starts_anew_only_where_told_to(tmp_path):
    experiment = tiny_experiment(steps=4)
    train(tmp_path, experiment, stop_after=2)
    with pytest.raises(ValueError, match="^out: .* stopped after step 2; resume=True.*overwrite=True"):
        train(tmp_path, experiment)
    again = train(tmp_path, experiment, overwrite=True)
    assert again["status"] == "done" and again["tokens"] == 4 * 4 * experiment.task.length


def test_a_gpu_scores_as_many_sequences_at_a_time_as_it_trains_on():
    trainer = sl.Trainer(tiny_experiment(), 1, 0, "cpu")
    batch, parts = trainer.experiment.train.batch, 3
    seen = []

    def noted(*args, chunk=256, **options):
        seen.append(chunk)
        return {"exact": 0.0}

    with patch.object(training, "evaluate", noted):
        trainer.evaluate(trainer.test)
        trainer.device, trainer.micro_batches = torch.device("cuda"), parts
        trainer.evaluate(trainer.test)
        trainer.micro_batches = 1
        trainer.evaluate(trainer.test)
    assert seen == [256, 4 * -(-batch // parts), 4 * batch] and seen[2] < 256


def test_a_batch_that_asks_nothing_is_not_scored():
    experiment = tiny_experiment()
    batch = experiment.task.batch(2, np.random.default_rng(0))
    silent = batch._replace(labels=torch.full_like(batch.labels, -100))
    with pytest.raises(ValueError, match="^batch: its labels ask for nothing"):
        evaluation.evaluate(experiment.model.build(), experiment.task, silent, passes=1)


@pytest.mark.parametrize("where", ["between the optimizers", "in the evaluation", "in the checkpoint"])
def test_ctrl_c_finishes_the_step_and_resumes_exactly(tmp_path, where, monkeypatch):
    experiment = tiny_experiment(steps=8, eval_every=4, save_every=4)
    whole = train(tmp_path / "whole", experiment)
    calls = []

    def interrupting(honest, at):
        def call(*args, **options):
            calls.append(1)
            if len(calls) == at:
                signal.raise_signal(signal.SIGINT)
            return honest(*args, **options)

        return call

    with monkeypatch.context() as m:
        if where == "between the optimizers":
            m.setattr(Muon, "step", interrupting(Muon.step, 3))
        elif where == "in the evaluation":
            m.setattr(training, "evaluate", interrupting(evaluation.evaluate, 1))
        else:
            m.setattr(records.os, "fsync", interrupting(os.fsync, 1))
        stopped = train(tmp_path / "cut", experiment)
    wanted = 3 if where == "between the optimizers" else 4
    assert stopped["status"] == f"interrupted after step {wanted}"
    assert records.load_records("tiny", out=tmp_path / "cut") == [stopped]
    same(train(tmp_path / "cut", experiment, resume=True), whole)


def test_a_second_ctrl_c_stops_at_once_and_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    experiment = tiny_experiment(steps=8, save_every=2)
    honest = Muon.step
    steps = []

    def step(self):
        steps.append(1)
        if len(steps) == 4:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return honest(self)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(Muon, "step", step)
        train(tmp_path / "cut", experiment)
    assert signal.getsignal(signal.SIGINT) is before
    same(train(tmp_path / "cut", experiment, resume=True), train(tmp_path / "whole", experiment))


def command_line(out, *rest):
    command = [sys.executable, "-m", "sleeplib", "run", "rule110-quick", "--passes", "2", "--device", "cpu"]
    settings = TINY | {"train.steps": "150", "train.save_every": "10"}
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    return [*command, "--out", str(out), *rest]


def stop_in_the_middle(out, number):
    """Start a run, send it a signal as soon as it has a checkpoint, return its exit code."""
    process = subprocess.Popen(command_line(out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoint = out / "rule110-quick" / "N2-seed0.safetensors"
    deadline = time.monotonic() + 120
    while not checkpoint.exists():
        assert process.poll() is None and time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.002)
    process.send_signal(number)
    return process.wait(timeout=60)


@pytest.mark.slow
def test_an_interrupted_process_resumes_exactly(tmp_path):
    """Kills and terminations are in test_kill.py."""
    experiment = sl.experiments.get("rule110-quick").replace(
        TINY | {"train.steps": "150", "train.save_every": "10"}
    )
    whole = train(tmp_path / "whole", experiment)

    out = tmp_path / "interrupted"
    assert stop_in_the_middle(out, signal.SIGINT) == 130
    (record,) = records.load_records("rule110-quick", out=out)
    assert record["status"].startswith("interrupted after step ") and record["final"]
    same(train(out, experiment, resume=True), whole)
    assert not list(out.rglob("*.safetensors"))


@pytest.mark.parametrize(
    "what, rate, pattern", [("weights are", 1e38, "ag"), ("held-out scores are", 1e20, "a")]
)
def test_what_is_not_finite_is_recorded_as_a_failure(tmp_path, what, rate, pattern):
    experiment = tiny_experiment(steps=4, eval_every=2, adamw_lr=rate).replace({"model.pattern": pattern})
    record = train(tmp_path, experiment)
    assert record["status"].startswith(f"failed: {what} not finite near step ")
    assert record["final"] == {} and record["curve"] == []
    assert records.load_records("tiny", out=tmp_path) == [record]
    assert not list(tmp_path.rglob("*.safetensors"))  # nothing to go on from


@pytest.mark.parametrize("stop_after", [None, 2])
def test_activations_that_are_not_finite_are_a_failure_with_the_curve_so_far(
    tmp_path, monkeypatch, stop_after
):
    """Weights are finite; the kernels refuse what becomes of them in a step, or in the last evaluation."""
    honest = sl.Trainer.forward_backward

    def forward_backward(self, batch):
        if self.step == 3 or stop_after and self.step == 1:
            self.model.layers[0].mlp.down.weight.data.fill_(3e38)
        return honest(self, batch) if not stop_after or self.step == 0 else torch.zeros(())

    monkeypatch.setattr(sl.Trainer, "forward_backward", forward_backward)
    record = train(
        tmp_path, tiny_experiment(steps=9, eval_every=2 + 3 * bool(stop_after)), stop_after=stop_after
    )
    assert record["status"].startswith("failed: an activation was refused (g") and record["final"] == {}
    assert [entry["step"] for entry in record["curve"]] == ([] if stop_after else [2])
    assert records.load_records("tiny", out=tmp_path) == [record]


def test_an_error_that_is_no_divergence_stays_an_error(tmp_path):
    with patch.object(training, "sleep_forward", side_effect=ValueError("of another kind")):
        with pytest.raises(ValueError, match="of another kind"):
            train(tmp_path)
    trainer = sl.Trainer(tiny_experiment(steps=9), 2, 0, "cpu")
    trainer.train_step()
    with patch.object(training.Trainer, "next_batch", side_effect=ValueError("nothing drawn")):
        with pytest.raises(ValueError, match="nothing drawn"):
            trainer.run(progress=False)


# Checkpoints


def checkpoint_of(tmp_path, experiment=None, **options):
    train(tmp_path, experiment, stop_after=2, **options)
    return tmp_path / "tiny" / "N2-seed0.safetensors"


def refused(tmp_path, path, match="is damaged, or no checkpoint of a run"):
    with pytest.raises(ValueError, match=f"^checkpoint: {path} {match}") as caught:
        train(tmp_path, resume=True)
    assert "\n" not in str(caught.value)


def test_one_flipped_bit_anywhere_is_noticed(tmp_path):
    path = checkpoint_of(tmp_path)
    trainer, content = sl.Trainer(tiny_experiment(steps=9), 2, 0, "cpu"), path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    places = [*range(8), *range(8, header, 29), *range(header, len(content), 997), len(content) - 1]
    for number, place in enumerate(places):
        bad = bytearray(content)
        bad[place] ^= 1 << number % 8
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=f"^checkpoint: {path} ") as caught:
            checkpoints.load_checkpoint(trainer, path)
        assert "\n" not in str(caught.value) and trainer.step == 0
    path.write_bytes(content)
    assert checkpoints.load_checkpoint(trainer, path)["step"] == trainer.step == 2


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda t, n: n.update(step=3), r"does not fit this run at step 3: optimizer.1.0.step"),
        (lambda t, n: n.update(step=10), "step must be an int in 0 .. 9; got 10"),
        (lambda t, n: n.pop("step"), "'step'"),
        (lambda t, n: t.pop("optimizer.0.0.momentum_buffer"), ".*optimizer.0.0.momentum_buffer"),
        (lambda t, n: t.update({"model.head.weight": torch.zeros(1)}), ".*model.head.weight"),
        (lambda t, n: t.update({"optimizer.0.99.momentum_buffer": torch.zeros(1)}), ".*optimizer.0.99"),
    ],
)
def test_a_whole_file_with_a_state_that_does_not_fit_is_refused(tmp_path, monkeypatch, change, match):
    honest = sl.Trainer.snapshot

    def snapshot(self):
        tensors, notes = honest(self)
        change(tensors, notes)
        return tensors, notes

    with monkeypatch.context() as m:
        m.setattr(sl.Trainer, "snapshot", snapshot)
        path = checkpoint_of(tmp_path)
    refused(tmp_path, path, match)


@pytest.mark.parametrize("damage", ["truncated", "empty", "noise", "not ours"])
def test_a_damaged_checkpoint_is_refused(tmp_path, damage):
    path = checkpoint_of(tmp_path)
    content = path.read_bytes()
    if damage == "not ours":
        save_file({"x": torch.zeros(1)}, path)
    else:
        path.write_bytes({"truncated": content[:-9], "empty": b"", "noise": b"\xff" * 99}[damage])
    bad = path.read_bytes()
    refused(tmp_path, path)
    assert path.read_bytes() == bad  # looked at, not touched


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = checkpoint_of(tmp_path)
    (tmp_path / "tiny" / "N2-seed0.json").unlink()
    with pytest.raises(ValueError, match="checkpoint: .* another run .differs in config_hash"):
        train(tmp_path, tiny_experiment(steps=9, clip=0.5), resume=True)
    path.rename(path.with_name("N3-seed0.safetensors"))
    with pytest.raises(ValueError, match="checkpoint: .* another run .differs in passes"):
        train(tmp_path, passes=3, resume=True)


def test_a_checkpoint_holds_no_pickle(tmp_path):
    content = checkpoint_of(tmp_path).read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert json.loads(header["__metadata__"]["sleeplib"])["step"] == 2


# Records


def test_a_record_has_the_keys_of_the_contract(tmp_path):
    record = train(tmp_path)
    contract = (
        "preset passes seed config config_hash command commit dirty data_hash versions device dtype seconds "
        "peak_bytes tokens curve chance final status"
    )
    assert set(record) == set(contract.split())
    assert (tmp_path / "tiny" / "N2-seed0.json").exists()
    for entry in record["curve"]:
        assert set(entry) == {"step", "tokens", "loss", "metrics"}
        assert entry["tokens"] == entry["step"] * 4 * 18
        scores = set(record["chance"])
        assert set(entry["metrics"]) == scores
        assert set(record["final"]) == scores | {f"{name}_train_split" for name in scores}
    assert record["peak_bytes"] > 1e6 and record["seconds"] > 0 and record["dtype"] == "float32"
    assert json.loads(json.dumps(record)) == record


def test_presets_enter_their_curve_at_least_every_50_steps():
    for name in sl.experiments.PRESETS:
        if "paper" not in name:  # 97,656 steps
            assert sl.experiments.get(name).train.eval_every <= 50


def test_a_record_of_another_configuration_is_not_overwritten(tmp_path):
    train(tmp_path)
    before = (tmp_path / "tiny" / "N2-seed0.json").read_bytes()
    with pytest.raises(ValueError, match="^out: .* record of another configuration"):
        train(tmp_path, tiny_experiment(steps=10))
    assert (tmp_path / "tiny" / "N2-seed0.json").read_bytes() == before


# Nothing finished is replaced unless told to


@pytest.mark.parametrize("options", [{}, dict(stop_after=3)])
def test_a_finished_record_is_replaced_only_when_told_to(tmp_path, options, monkeypatch):
    done = train(tmp_path)
    path = tmp_path / "tiny" / "N2-seed0.json"
    before = path.read_bytes()
    with monkeypatch.context() as m:
        m.setattr(runs, "Trainer", lambda *args: pytest.fail("went to work"))
        with pytest.raises(ValueError, match="^out: .* finished run.*resume=True.*overwrite=True"):
            train(tmp_path, **options)
        (checkpoint := path.with_suffix(".safetensors")).write_bytes(b"left by a kill after the record")
        assert train(tmp_path, resume=True, **options) == done and not checkpoint.exists()
        with pytest.raises(ValueError, match="^keep: .* was not kept"):
            train(tmp_path, resume=True, keep=tmp_path / "kept")
    assert path.read_bytes() == before
    written = path.stat().st_mtime_ns
    again = train(tmp_path, overwrite=True, **options)
    assert again["status"] == ("stopped after step 3" if options else "done")
    replaced = path.stat().st_mtime_ns != written
    assert replaced != bool(options) and records.load_record(path) == (again if replaced else done)


def test_of_two_that_run_the_same_the_finished_one_stays(tmp_path):
    """While this run stops early, another process finishes."""
    honest = runs.make_record

    def slow(*args):
        with patch.object(runs, "make_record", honest):
            train(tmp_path, resume=True)
        return honest(*args)

    with patch.object(runs, "make_record", slow):
        found = train(tmp_path, stop_after=2)
    assert found["status"] == "done" and records.load_records("tiny", out=tmp_path) == [found]


@pytest.mark.parametrize("name", ["out", "keep"])
def test_a_folder_that_cannot_be_written_is_found_out_before_training(tmp_path, name):
    (tmp_path / "file").write_text("in the way")
    folders = dict(out=tmp_path, keep=tmp_path / "kept") | {name: tmp_path / "file" / "below"}
    with patch.object(sl.Trainer, "run", side_effect=AssertionError("trained")):
        with pytest.raises(OSError, match=f"{name} cannot be written: Not a directory"):
            sl.run(tiny_experiment(), 1, device="cpu", **folders)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_weights_are_kept_before_the_checkpoint_goes(tmp_path):
    with patch.object(sl.HybridLM, "save", side_effect=OSError(errno.ENOSPC, "full")), pytest.raises(OSError):
        train(tmp_path, keep=tmp_path / "kept")
    assert [p.name for p in (tmp_path / "tiny").iterdir()] == ["N2-seed0.safetensors"]
    with patch.object(sl.Trainer, "train_step", side_effect=AssertionError("trained again")):
        assert train(tmp_path, keep=tmp_path / "kept", resume=True)["status"] == "done"
    assert (tmp_path / "kept" / "tiny" / "N2-seed0" / "model.safetensors").is_file()


def test_sigterm_saves_like_ctrl_c(tmp_path, monkeypatch):
    honest, before = Muon.step, signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as m:
        m.setattr(Muon, "step", lambda self: (signal.raise_signal(signal.SIGTERM), honest(self)))
        stopped = train(tmp_path / "cut")
    assert stopped["status"] == "terminated after step 1" and signal.getsignal(signal.SIGTERM) is before
    same(train(tmp_path / "cut", resume=True), train(tmp_path / "whole"))


@pytest.mark.parametrize("runs_it", [True, False])
def test_a_record_names_the_precision_that_ran(tmp_path, runs_it):
    with patch.object(training.machine, "multiplies_bfloat16", return_value=runs_it):
        low = train(tmp_path / "low", tiny_experiment(precision="bfloat16"))
    assert low["dtype"] == ("bfloat16" if runs_it else "float32")
    assert (low["curve"] == train(tmp_path / "full", tiny_experiment())["curve"]) == (not runs_it)


def test_threads_are_those_asked_for_and_a_resumed_run_keeps_them(tmp_path):
    before, seen = torch.get_num_threads(), []
    honest = Muon.step
    with patch.object(Muon, "step", lambda self: (seen.append(torch.get_num_threads()), honest(self))):
        first = train(tmp_path, threads=3, stop_after=1)
        assert torch.get_num_threads() == before
        second = train(tmp_path, resume=True, stop_after=1)
        train(tmp_path, resume=True, stop_after=1, threads=2)
    assert seen == [3, 3, 2] and torch.get_num_threads() == before
    for record in (first, second):
        assert record["device"].endswith(", 3 threads")
    with pytest.raises(ValueError, match="threads must be an int of at least 1; got 0"):
        train(tmp_path, threads=0)


def test_a_full_disk_at_the_end_loses_nothing(tmp_path, monkeypatch):
    """The record cannot be written: clear error, the checkpoint stands, a second try needs no training."""
    experiment = tiny_experiment(steps=3)
    honest = records.save_record

    def full(record, out=None):
        with patch.object(records.os, "fsync", side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))):
            return honest(record, out)

    with monkeypatch.context() as m:
        m.setattr(runs.records, "save_record", full)
        with pytest.raises(OSError, match="record not written, nothing changed: No space left"):
            train(tmp_path / "full", experiment)
    assert [p.name for p in (tmp_path / "full" / "tiny").iterdir()] == ["N2-seed0.safetensors"]
    with patch.object(sl.Trainer, "train_step", side_effect=AssertionError("trained again")):
        record = train(tmp_path / "full", experiment, resume=True)
    same(record, train(tmp_path / "whole", experiment))


# What is drawn, what is scored


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_draw_the_batches_of_the_seed_also_after_a_resume(tmp_path, workers):
    experiment = tiny_experiment(steps=7, eval_every=1)
    seen = []
    honest = sl.Trainer.forward_backward

    def forward_backward(self, batch):
        seen.append(batch)
        return honest(self, batch)

    with patch.object(sl.Trainer, "forward_backward", forward_backward):
        whole, first, second = (sl.Trainer(experiment, 2, 3, device="cpu") for _ in range(3))
        for trainer in (whole, first, second):
            trainer.workers = workers
        whole.run(progress=False)
        for _ in range(2):  # once more in the same process, then in a new one
            first.run(2, progress=False)
        checkpoints.save_checkpoint(first, tmp_path / "x.safetensors")
        second.train_step()  # a batch of another step was drawn already
        seen.pop()
        checkpoints.load_checkpoint(second, tmp_path / "x.safetensors")
        second.run(progress=False)
    wanted = [training.training_batch(experiment.task, experiment.train, 3, step) for step in range(7)]
    assert len(seen) == 14
    for batch, right in zip(seen, 2 * wanted):
        assert torch.equal(batch.inputs, right.inputs) and torch.equal(batch.labels, right.labels)
    assert whole.curve == second.curve and whole.batches is None


@pytest.mark.parametrize("passes, eviction", [(1, "hard"), (3, "hard"), (2, "sliding")])
def test_a_score_is_that_of_all_logits_and_keeps_only_those_of_labels(passes, eviction):
    small = dict(d_model=16, pattern="agag", num_heads=2, mlp_size=16)
    story = dict(ops=(1, 2), tokens=(60, 96), places=(1, 2), kinds=(1, 2), noise=(3, 3))
    for task in (
        sl.tasks.Rule110(width=8, strings=2, steps=1),
        sl.tasks.Depo(nodes=4, hops=4, letters=4, word=(1, 2), queries=2, windows=2, fewest=3),
        sl.tasks.GSMInfinite(**story, window=24),
        sl.tasks.GSMInfinite(**story, window=99),
    ):
        model = sl.HybridLM(sl.ModelConfig(vocab_size=task.vocab_size, **small))
        batch = evaluation.held_out(task, 20, 0)
        options = dict(window=task.window, passes=passes, eviction=eviction)
        with torch.no_grad():
            pieces = [
                sl.sleep_forward(model, inputs, labels, **options).logits
                for inputs, labels in zip(batch.inputs.split(7), batch.labels.split(7))
            ]
        wanted = task.score(torch.cat(pieces), batch)
        with patch.object(type(task), "score", autospec=True, side_effect=type(task).score) as scored:
            found = evaluation.evaluate(model, task, batch, passes=passes, eviction=eviction, chunk=7)
        assert found == wanted
        assert scored.call_args.args[1].shape == (int((batch.labels >= 0).sum()), task.vocab_size)


@pytest.mark.parametrize("wrong", [(5, 3, 4), (6, 4)])
def test_logits_that_fit_neither_tokens_nor_labels_are_refused(wrong):
    labels = torch.full((5, 8), -100)
    labels[:, 7] = 1
    batch = sl.tasks.Batch(labels.clamp(0), labels)
    with pytest.raises(ValueError, match="do not fit labels"):
        sl.tasks.Rule110(width=3, strings=1, steps=1).score(torch.zeros(wrong), batch)


# Hard eviction first, then sliding


def test_hard_eviction_gives_way_to_sliding_after_a_third():
    train = tiny_experiment(steps=9, eviction="hard-then-sliding").train
    assert [train.eviction_at(step) for step in range(10)] == 3 * ["hard"] + 7 * ["sliding"]
    for eviction in ("hard", "sliding"):
        assert {replace(train, eviction=eviction).eviction_at(step) for step in range(10)} == {eviction}


def test_the_recipe_is_one_eviction_then_the_other_also_in_pieces(tmp_path):
    options = dict(steps=6, eval_every=2, save_every=1)
    recipe = tiny_experiment(eviction="hard-then-sliding", **options)
    whole = train(tmp_path / "whole", recipe)
    for _ in range(3):
        piece = train(tmp_path / "pieces", recipe, resume=True, stop_after=2)
    same(piece, whole)
    hard, sliding = (train(tmp_path / e, tiny_experiment(eviction=e, **options)) for e in ("hard", "sliding"))
    losses = [[point["loss"] for point in record["curve"]] for record in (whole, hard, sliding)]
    assert losses[0][0] == losses[1][0] != losses[2][0]  # two hard steps
    assert losses[0][1] != losses[1][1]
    # All are scored with the eviction that they end with.
    trainer = sl.Trainer(recipe, 2, 0, device="cpu")
    trainer.run(2, progress=False)
    scores = [
        evaluation.evaluate(trainer.model, recipe.task, trainer.test, passes=2, eviction=e)
        for e in ("sliding", "hard")
    ]
    assert scores[0] == trainer.curve[-1]["metrics"] != scores[1]


# Optimizers, schedule, loss


@pytest.mark.parametrize("pattern", ["agag", "ahja"])
def test_each_parameter_has_one_optimizer(pattern):
    model = sl.HybridLM(sl.ModelConfig(vocab_size=4, d_model=16, pattern=pattern, num_heads=2))
    names = {id(p): name for name, p in model.named_parameters()}
    muon, adamw = training.make_optimizers(model, tiny_experiment().train)
    ours = [[names[id(p)] for g in o.param_groups for p in g["params"]] for o in (muon, adamw)]
    assert sorted(ours[0] + ours[1]) == sorted(names.values())
    for name, p in model.named_parameters():
        hidden = name.startswith("layers.") and p.ndim == 2 and not name.endswith("conv.weight")
        assert name in ours[0 if hidden else 1], name
    assert all(p.ndim == 2 for g in muon.param_groups for p in g["params"])
    for group in adamw.param_groups:
        for p in group["params"]:
            assert (group["weight_decay"] > 0) == (p.ndim == 2), names[id(p)]


def test_the_schedule_warms_up_stays_and_decays():
    train = replace(tiny_experiment().train, steps=100, warmup=10, decay=20)
    rates = [training.schedule(step, train) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == 1 and set(rates[9:81]) == {1} and rates[99] == 0.05
    assert rates[:10] == sorted(rates[:10]) and rates[80:] == sorted(rates[80:], reverse=True)
    constant = replace(train, warmup=0, decay=0)
    assert {training.schedule(step, constant) for step in range(100)} == {1}


def test_the_loss_that_is_minimised_is_the_one_that_is_reported(tmp_path):
    trainer = sl.Trainer(tiny_experiment(steps=20), 2, 0, device="cpu")
    batch = training.training_batch(trainer.experiment.task, trainer.experiment.train, 0, 0)
    chunk = trainer.experiment.task.window
    out = sl.sleep_forward(trainer.model, batch.inputs, batch.labels, window=chunk, passes=2)
    assert torch.equal(trainer.forward_backward(batch), out.loss.detach())


def test_training_learns():
    """One step of time and one ring: a model of width 16 has it after a minute of nothing but this loop."""
    experiment = tiny_experiment(steps=60, batch=64, eval_every=60, adamw_lr=1e-2, muon_lr=2e-2)
    experiment = replace(experiment, task=sl.tasks.Rule110(width=3, strings=1, steps=1))
    trainer = sl.Trainer(experiment, 2, 0, device="cpu")
    assert trainer.run(progress=False) == "done"
    assert trainer.curve[-1]["metrics"]["exact"] > experiment.task.chance()["exact"] + 0.15


def test_checkpointing_over_windows_changes_no_gradient():
    gradients = []
    for checkpoint in (False, True):
        trainer = sl.Trainer(tiny_experiment(checkpoint=checkpoint), 3, 0, device="cpu")
        batch = training.training_batch(trainer.experiment.task, trainer.experiment.train, 0, 0)
        trainer.forward_backward(batch)
        gradients.append([p.grad for p in trainer.model.parameters()])
    for a, b in zip(*gradients):
        assert torch.equal(a, b)


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_micro_batches_have_the_gradient_of_the_whole(parts):
    """Also where they differ in size and a row has several labels."""
    gradients, losses = [], []
    for count in (1, parts):
        trainer = sl.Trainer(tiny_experiment(batch=7), 2, 0, device="cpu", micro_batches=count)
        task, config = trainer.experiment.task, trainer.experiment.train
        batch = training.training_batch(task, config, 0, 0)
        batch.labels[0, -2] = batch.labels[3, -1] = -100  # parts with fewer labels count less
        losses.append(trainer.forward_backward(batch))
        gradients.append([p.grad for p in trainer.model.parameters()])
    close(losses[1], losses[0], 1e-6)
    for a, b in zip(*gradients):
        close(b, a, 1e-5)


def test_bfloat16_trains_with_a_float32_state(monkeypatch):
    monkeypatch.setattr(training.machine, "multiplies_bfloat16", lambda device: True)
    trainer = sl.Trainer(tiny_experiment(precision="bfloat16"), 2, 0, device="cpu")
    plain = sl.Trainer(tiny_experiment(), 2, 0, device="cpu")
    batch = training.training_batch(trainer.experiment.task, trainer.experiment.train, 0, 0)
    low, full = trainer.forward_backward(batch), plain.forward_backward(batch)
    assert low.dtype == torch.float32 and not torch.equal(low, full)
    close(low, full, 3e-2)
    assert trainer.run(progress=False) == "done"


def test_a_run_goes_on_in_the_precision_that_it_began_in(tmp_path, monkeypatch):
    monkeypatch.setattr(training.machine, "multiplies_bfloat16", lambda device: True)
    train(tmp_path, tiny_experiment(precision="bfloat16"), stop_after=1)
    monkeypatch.setattr(training.machine, "multiplies_bfloat16", lambda device: False)
    with pytest.raises(ValueError, match="belongs to another run .differs in precision"):
        train(tmp_path, tiny_experiment(precision="bfloat16"), resume=True)


def test_bfloat16_keeps_the_kernels(monkeypatch):
    """On a CPU no slower form of a kernel runs in its place."""

    def refuse(*args, **options):
        raise AssertionError("plain PyTorch in place of a kernel")

    monkeypatch.setattr(training.machine, "multiplies_bfloat16", lambda device: True)
    names = "recurrence swiglu rms_norm split_heads causal_convolution apply_rotary softmax_attention"
    for name in names.split():
        monkeypatch.setattr(sl.kernels.naive, name, refuse)
    trainer = sl.Trainer(tiny_experiment(precision="bfloat16"), 2, 0, device="cpu")
    trainer.train_step()
    assert trainer.precision == "bfloat16"


def test_to_build_a_trainer_changes_nothing_global():
    with patch.object(training.machine, "tune_malloc") as tuned:
        torch.manual_seed(9)
        before = torch.get_rng_state()
        trainer = sl.Trainer(tiny_experiment(), 2, 5, "cpu")
        assert torch.equal(torch.get_rng_state(), before)
        assert not tuned.called
        trainer.run(progress=False)
        assert tuned.called  # when it starts to train
    torch.manual_seed(5)
    honest = sl.HybridLM(trainer.experiment.model)
    for a, b in zip(sl.Trainer(tiny_experiment(), 1, 5, "cpu").model.parameters(), honest.parameters()):
        assert torch.equal(a, b)


def test_numbers_of_numpy_are_numbers(tmp_path):
    four = dict(passes=np.int64(2), seed=np.int32(1), stop_after=np.int8(2), micro_batches=np.uint8(2))
    record = sl.run(tiny_experiment(), device="cpu", out=tmp_path, **four)
    assert (record["passes"], record["seed"], record["status"]) == (2, 1, "stopped after step 2")
    assert records.load_records("tiny", out=tmp_path) == [record]
    assert training.machine.find_device(torch.device("cpu")).type == "cpu"
    for index in (np.int64(0), "0"):
        with patch.object(torch.cuda, "is_available", return_value=True):
            with patch.object(torch.cuda, "device_count", return_value=1):
                assert training.machine.find_device(index) == torch.device("cuda:0")
    for wrong in (True, np.int64(99), -1, "meta"):
        with pytest.raises(ValueError, match="^device must be"):
            training.machine.find_device(wrong)


def test_a_presets_name_is_an_experiment(tmp_path):
    preset = tiny_experiment(steps=2)
    with patch.dict(sl.experiments.PRESETS, {"tiny": preset}):
        record = sl.run("tiny", 4, device="cpu", out=tmp_path)
        assert record["preset"] == "tiny" and sl.Trainer("tiny", 1, 0, "cpu").experiment is preset
        assert flops.training_flops("tiny", 4) == flops.training_flops(preset, 4)


@pytest.mark.parametrize(
    "names, options",
    [
        ("passes must be an int of at least 1; got 0", dict(passes=0)),
        ("passes must be an int of at least 1; got 2.0", dict(passes=2.0)),
        ("passes must be an int of at least 1; got True", dict(passes=True)),
        ("seed must be an int in 0 .. 18446744073709551615; got -1", dict(seed=-1)),
        ("seed must be an int in 0 .. 18446744073709551615", dict(seed=2**64)),
        ("seed must be an int in 0 .. 18446744073709551615; got True", dict(seed=True)),
        ("preset 'tinny' is unknown", dict(experiment="tinny")),
        ("stop_after must be an int of at least 1; got 0", dict(stop_after=0)),
        ("micro_batches must be an int in 1 .. 4; got 0", dict(micro_batches=0)),
    ],
)
def test_a_bad_call_is_refused(tmp_path, names, options):
    with pytest.raises(ValueError, match=names):
        train(tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_a_model_that_does_not_fit_the_task_is_refused():
    experiment = replace(tiny_experiment(), model=sl.ModelConfig(vocab_size=5, d_model=16, num_heads=2))
    with pytest.raises(ValueError, match="model.vocab_size is 5; the task has 4 tokens"):
        sl.Trainer(experiment, 2, 0, device="cpu")


class FakeCuda:
    """Records on which device a graph is captured, where there is no GPU."""

    def __init__(self):
        self.current, self.used = "cuda:0", []

    @contextmanager
    def device(self, wanted):
        self.current, before = str(wanted), self.current
        yield
        self.current = before

    def __getattr__(self, name):  # Stream, current_stream, stream, CUDAGraph, graph
        self.used.append((name, self.current))
        return MagicMock()


def test_a_step_is_captured_on_its_own_device_and_takes_its_own_shape(monkeypatch):
    """CUDA is simulated: calls are noted, tensors stay on the CPU."""
    fake = FakeCuda()
    monkeypatch.setattr(training.machine, "torch", SimpleNamespace(cuda=fake))
    weight = torch.nn.Parameter(torch.ones(3))
    batch = sl.tasks.Batch(*(torch.zeros(4, 3, dtype=torch.int64) for _ in range(2)))
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *_: self)
    step = training.machine.CapturedStep(lambda x, y: (weight * x * y).sum(), [weight], batch, "cuda:1")
    assert {"Stream", "CUDAGraph", "graph"} <= {name for name, _ in fake.used}
    assert {where for _, where in fake.used} == {"cuda:1"} and fake.current == "cuda:0"
    with pytest.raises(ValueError, match=r"batch: inputs \(1, 3\), captured with \(4, 3\)"):
        step(sl.tasks.Batch(batch.inputs[:1], batch.labels))


def test_blocks_are_compiled_whole_and_left_as_they_were(monkeypatch):
    """Only traced, and run as they are: without a GPU there is nothing to fuse for."""
    trainer, graphs = sl.Trainer(tiny_experiment(), 3, 0, "cpu"), []
    batch = trainer.next_batch()

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend, fullgraph=True))
    monkeypatch.setattr(training.machine, "find_spec", lambda name: name == "triton")
    plain = trainer.loss(batch.inputs, batch.labels)
    with training.machine.compiled_blocks(trainer.model):
        loss = trainer.loss(batch.inputs, batch.labels)
    close(loss, plain)
    assert len(graphs) >= 2  # one a kind of block, or more
    seen = len(graphs)
    assert trainer.loss(batch.inputs, batch.labels) == plain and len(graphs) == seen
    monkeypatch.setattr(training.machine, "find_spec", lambda name: None)
    with training.machine.compiled_blocks(trainer.model):
        assert trainer.loss(batch.inputs, batch.labels) == plain and len(graphs) == seen


# On a GPU

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@cuda
@pytest.mark.cuda
def test_a_step_on_cuda_is_the_step_on_the_cpu():
    trainers = [sl.Trainer(tiny_experiment(), 3, 0, device=device) for device in ("cpu", "cuda")]
    batch = training.training_batch(trainers[0].experiment.task, trainers[0].experiment.train, 0, 0)
    slow, fast = (trainer.forward_backward(batch).cpu() for trainer in trainers)
    close(fast, slow)
    for a, b in zip(*(trainer.model.parameters() for trainer in trainers)):
        close(b.grad.cpu(), a.grad)


@cuda
@pytest.mark.cuda
def test_a_captured_step_is_the_eager_one():
    trainers = [sl.Trainer(tiny_experiment(graph=graph, steps=6), 3, 0, "cuda") for graph in (False, True)]
    batch = training.training_batch(trainers[0].experiment.task, trainers[0].experiment.train, 0, 0)
    close(*(trainer.forward_backward(batch).cpu() for trainer in trainers))
    eager, captured = trainers
    for (name, a), (_, b) in zip(eager.model.named_parameters(), captured.model.named_parameters()):
        close(b.grad.cpu(), a.grad.cpu(), what=name)
    for trainer in trainers:  # Muon rounds to bfloat16: from here on they go apart by as much
        assert trainer.run(progress=False) == "done"
    assert captured.graph is not None and eager.graph is None
    assert captured.curve[-1]["loss"] == pytest.approx(eager.curve[-1]["loss"], rel=1e-3)
