"""Two processes that torchrun has started train as one, may be killed, and go on in another number."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

import sleeplib as sl
from sleeplib import processes
from sleeplib.training import Trainer

SETTINGS = {
    "task.width": 8,
    "task.steps": 1,
    "model.d_model": 16,
    "model.pattern": "agag",
    "model.num_heads": 2,
    "model.mlp_size": 16,
    "train.steps": 12,
    "train.batch": 5,  # three sequences for one, two for the other
    "train.eval_batch": 8,
    "train.eval_every": 4,
    "train.save_every": 2,
}
QUICK = sl.experiments.get("rule110-quick")
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch has no processes here")


def command(out, count, *options, **settings):
    """The command line of a run by `count` processes."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(count)] if count > 1 else []
    argv = [sys.executable, *torchrun, "-m", "sleeplib", "run", "rule110-quick", "--passes", "2"]
    argv += ["--device", "cpu", "--resume", "--out", str(out), *options]
    for key, value in (SETTINGS | settings).items():
        argv += ["--set", f"{key}={value}"]
    return argv


def environment(out):
    """One thread each, and what torchrun leaves in the folder for temporary files stays below `out`."""
    return os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(out)}


def run(out, count, *options, **settings):
    done = subprocess.run(
        command(out, count, *options, **settings), capture_output=True, text=True, env=environment(out)
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def record(out):
    return json.loads((out / "rule110-quick" / "N2-seed0.json").read_text())


def alike(a, b):
    """Whether two curves are the same but for rounding."""
    assert [entry["step"] for entry in a] == [entry["step"] for entry in b]
    for one, other in zip(a, b):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["metrics"]["loss"] == pytest.approx(other["metrics"]["loss"], rel=1e-4)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process makes of the run: its record, and its checkpoint after eight steps."""
    out = tmp_path_factory.mktemp("alone")
    run(out, 1, "--stop-after", "8")
    tensors = load_file(out / "rule110-quick" / "N2-seed0.safetensors")
    run(out, 1)
    return record(out), tensors


@pytest.mark.xdist_group("processes")
def test_two_processes_take_the_steps_of_one_and_go_on_as_one_and_as_two(alone, tmp_path):
    said = run(tmp_path, 2, "--stop-after", "8", "--micro-batches", "2")
    assert said.count("stopped after step 8") == 1  # one process speaks for both
    assert [p.name for p in (tmp_path / "rule110-quick").iterdir() if p.suffix != ".json"] == [
        "N2-seed0.safetensors"
    ]
    tensors = load_file(tmp_path / "rule110-quick" / "N2-seed0.safetensors")
    assert tensors.keys() == alone[1].keys()
    # Muon makes a direction of the smallest gradient, rounding included: up to 1e-4 of a matrix.  Processes
    # that counted alike, with three sequences and with two, would move some matrices by 0.3 of their norm.
    for name in (name for name in tensors if name.startswith("model.")):
        one, two = alone[1][name].float(), tensors[name].float()
        assert (one - two).norm() <= 5e-3 * one.norm(), name
    run(tmp_path, 1, "--stop-after", "2")
    run(tmp_path, 2)
    found = record(tmp_path)
    alike(found["curve"], alone[0]["curve"])
    assert found["status"] == "done" and found["command"].startswith(
        "torchrun --nproc-per-node 2 -m sleeplib run"
    )
    assert found["device"].startswith("2 x ") and found["tokens"] == alone[0]["tokens"]


@pytest.mark.xdist_group("processes")
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are looked up in /proc")
@pytest.mark.parametrize("whom, number", [("torchrun", signal.SIGTERM), ("the second", signal.SIGKILL)])
def test_what_is_stopped_or_killed_goes_on(whom, number, tmp_path):
    long = {"train.steps": 4000, "train.eval_every": 2000}
    started = subprocess.Popen(
        command(tmp_path, 2, **long), env=environment(tmp_path), stderr=subprocess.DEVNULL
    )
    file = tmp_path / "rule110-quick" / "N2-seed0.safetensors"
    while not file.exists():
        assert started.poll() is None
        time.sleep(0.05)
    pid = started.pid
    if whom != "torchrun":
        pid = int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[1])
    os.kill(pid, number)
    assert started.wait(120) != 0
    assert sl.checkpoints.steps_done(file) >= 2
    if number == signal.SIGTERM:
        assert record(tmp_path)["status"].startswith("terminated after step")
    before = sl.checkpoints.steps_done(file)
    run(tmp_path, 2, "--stop-after", "2", **long)
    assert sl.checkpoints.steps_done(file) == before + 2


def test_alone_there_is_nothing_to_agree_on():
    assert processes.first() and (processes.rank(), processes.world()) == (0, 1)
    assert processes.agreed(15) == 15
    assert processes.summed(x := torch.ones(2)) is x


def test_a_batch_is_shared_by_as_many_as_it_has_sequences():
    with (
        patch.object(processes, "world", return_value=129),
        pytest.raises(ValueError, match="^train.batch is 128; 129"),
    ):
        Trainer("rule110-quick", 1, 0, "cpu")


def test_a_model_that_is_to_lie_in_parts_does_not_lie_whole_on_the_device_first(tmp_path):
    seen, meta = [], torch.device("meta")  # in the place of a GPU
    start = sl.run(
        QUICK.replace(SETTINGS | {"train.steps": 1}), 1, 0, "cpu", tmp_path, keep=tmp_path / "kept"
    )
    sharded = QUICK.replace(
        SETTINGS | {"train.shard": True, "train.start": f"{tmp_path}/kept/rule110-quick/N1-seed0"}
    )

    def noted(model, device):
        seen.append((device, {x.device.type for x in model.state_dict().values()}))
        model.to(device)

    with (
        patch.object(processes, "world", return_value=2),
        patch.object(processes, "shard", noted),
        patch("sleeplib.device.find_device", return_value=meta),
    ):
        trainer = Trainer(sharded, 1, 0)
    assert start["status"] == "done" and trainer.device == meta and seen == [(meta, {"cpu"})]


@pytest.mark.parametrize("rows", [1, 5, 7, 8])
@pytest.mark.parametrize("rank", [0, 2, 3])
def test_the_part_of_a_whole_tensor_is_what_was_kept_of_a_weight(rows, rank):
    from torch.testing._internal.distributed.fake_pg import FakeStore  # processes that are not there

    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([torch.nn.Linear(3, rows)])
    model.embed = model.readout = lambda x: x
    whole = {k: p.detach().clone() for k, p in model.named_parameters()}
    torch.distributed.init_process_group("fake", rank=rank, world_size=4, store=FakeStore())
    try:
        processes.shard(model, torch.device("cpu"))
        for name, p in model.named_parameters():
            part, kept = processes.part(whole[name], p), p.to_local()
            assert part.shape == p.shape == whole[name].shape and torch.equal(part.to_local(), kept)
            assert part.to_local().untyped_storage().nbytes() == kept.nbytes
        assert kept.numel() < rows or rows == 1
    finally:
        torch.distributed.destroy_process_group()


def test_a_process_without_a_gpu_says_so(monkeypatch):
    for name, value in dict(LOCAL_RANK=2, RANK=2, WORLD_SIZE=3, TORCHELASTIC_RUN_ID="x").items():
        monkeypatch.setenv(name, str(value))
    assert not processes.first()
    with (
        patch.object(torch.cuda, "is_available", return_value=True),
        patch.object(torch.cuda, "device_count", return_value=2),
    ):
        with (
            pytest.raises(ValueError, match="process 2 of this machine has no GPU: there are 2"),
            processes.joined(),
        ):
            pass
