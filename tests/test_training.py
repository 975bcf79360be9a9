"""Training: stopped in any way, it goes on as if it had not been; everything bad is refused by name."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import save_file
from test_truths import tiny_experiment
from tiny import close
from torch.utils.flop_counter import FlopCounterMode

import sleeplib as sl
from sleeplib import checkpoints, evaluation, flops, records, runs, training
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


def test_without_resume_a_run_starts_anew(tmp_path):
    experiment = tiny_experiment(steps=4)
    train(tmp_path, experiment, stop_after=2)
    again = train(tmp_path, experiment)
    assert again["status"] == "done" and again["tokens"] == 4 * 4 * experiment.task.length


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
def test_killed_and_interrupted_processes_resume_exactly(tmp_path):
    experiment = sl.experiments.get("rule110-quick").replace(
        TINY | {"train.steps": "150", "train.save_every": "10"}
    )
    whole = train(tmp_path / "whole", experiment)

    out = tmp_path / "killed"
    assert stop_in_the_middle(out, signal.SIGKILL) == -signal.SIGKILL
    assert not list(out.rglob("*.json"))  # no record of a run that could not write one
    done = subprocess.run(command_line(out, "--resume"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (record,) = records.load_records("rule110-quick", out=out)
    same(record, whole)
    assert not list(out.rglob("*.safetensors"))

    out = tmp_path / "interrupted"
    assert stop_in_the_middle(out, signal.SIGINT) == 130
    (record,) = records.load_records("rule110-quick", out=out)
    assert record["status"].startswith("interrupted after step ") and record["final"]
    same(train(out, experiment, resume=True), whole)


def test_a_loss_that_is_not_finite_is_recorded_as_a_failure(tmp_path):
    experiment = tiny_experiment(steps=4, eval_every=2, adamw_lr=math.inf)
    record = train(tmp_path, experiment)
    assert record["status"] == "failed: weights are not finite near step 1"
    assert record["final"] == {} and record["curve"] == []
    assert records.load_records("tiny", out=tmp_path) == [record]
    assert not list(tmp_path.rglob("*.safetensors"))  # nothing to go on from


# Checkpoints


def checkpoint_of(tmp_path, experiment=None, **options):
    train(tmp_path, experiment, stop_after=2, **options)
    return tmp_path / "tiny" / "N2-seed0.safetensors"


@pytest.mark.parametrize("damage", ["truncated", "empty", "noise", "not ours"])
def test_a_damaged_checkpoint_is_refused(tmp_path, damage):
    path = checkpoint_of(tmp_path)
    content = path.read_bytes()
    if damage == "not ours":
        save_file({"x": torch.zeros(1)}, path)
    else:
        path.write_bytes({"truncated": content[:-9], "empty": b"", "noise": b"\xff" * 99}[damage])
    bad = path.read_bytes()
    with pytest.raises(ValueError, match=f"^checkpoint: {path} is damaged, or no checkpoint of a run"):
        train(tmp_path, resume=True)
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


def test_bfloat16_trains_with_a_float32_state():
    trainer = sl.Trainer(tiny_experiment(precision="bfloat16"), 2, 0, device="cpu")
    plain = sl.Trainer(tiny_experiment(), 2, 0, device="cpu")
    batch = training.training_batch(trainer.experiment.task, trainer.experiment.train, 0, 0)
    low, full = trainer.forward_backward(batch), plain.forward_backward(batch)
    assert low.dtype == torch.float32 and not torch.equal(low, full)
    close(low, full, 3e-2)
    assert trainer.run(progress=False) == "done"


@pytest.mark.parametrize(
    "names, options",
    [
        ("passes must be an int of at least 1; got 0", dict(passes=0)),
        ("passes must be an int of at least 1; got 2.0", dict(passes=2.0)),
        ("passes must be an int of at least 1; got True", dict(passes=True)),
        ("seed must be an int in 0 .. 18446744073709551615; got -1", dict(seed=-1)),
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
    for trainer in trainers:
        assert trainer.run(progress=False) == "done"
    eager, captured = trainers
    assert captured.graph is not None and eager.graph is None
    for (name, a), (_, b) in zip(eager.model.named_parameters(), captured.model.named_parameters()):
        close(b.cpu(), a.cpu(), what=name)
    assert captured.curve[-1]["loss"] == pytest.approx(eager.curve[-1]["loss"], rel=1e-4)
