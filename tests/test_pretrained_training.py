"""Pretrained models in the one training loop: they learn, fast weights first, and go on when stopped."""

import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from tiny_pretrained import byte_tokenizer, tiny_original

import sleeplib as sl
from sleeplib import budget, checkpoints, processes
from sleeplib.experiments import Experiment, TrainConfig
from sleeplib.optimizers import make_optimizers
from sleeplib.training import Trainer

pytest.importorskip("transformers")
pytest.importorskip("peft")

from sleeplib.pretrained import Insert, LoRA, PretrainedConfig, load, save

TASK = sl.tasks.Rule110(width=8, strings=2, steps=1)
INSERT = Insert(after=(1, 3), num_heads=2, key_size=8, value_size=16)
TRAIN = TrainConfig(steps=12, batch=4, warmup=0, adamw_lr=3e-3, muon_lr=4e-3, eval_every=6, eval_batch=8)


def make_sources(root):
    """Folders of a hybrid and of a plain transformer whose tokens are the task's."""
    found = {}
    for name in ("qwen3_5", "llama-tied"):
        found[name] = str(root / name)
        tiny_original(name, vocab_size=TASK.vocab_size, pad_token_id=None).save_pretrained(found[name])
    return found


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return make_sources(tmp_path_factory.mktemp("checkpoints"))


def experiment(sources, name="qwen3_5", lora=None, **train):
    insert = INSERT if name == "llama-tied" else None
    model = PretrainedConfig(sources[name], TASK.vocab_size, insert=insert, lora=lora, loop=(1, 2))
    return Experiment("tiny-pretrained", TASK, model, dataclasses.replace(TRAIN, **train))


def mean_loss(trainer):
    batch = TASK.batch(16, np.random.default_rng(0))
    with torch.no_grad():
        return float(trainer.loss(batch.inputs, batch.labels))


@pytest.mark.parametrize("name", ["qwen3_5", "llama-tied"])
@pytest.mark.parametrize("lora", [None, LoRA(4, 8)])
def test_fine_tuning_lowers_the_loss(sources, name, lora):
    trainer = Trainer(experiment(sources, name, lora), 2, 0, device="cpu")
    before = mean_loss(trainer)
    frozen = {k: p.clone() for k, p in trainer.model.named_parameters() if not p.requires_grad}
    for _ in range(8):
        trainer.train_step()
    assert mean_loss(trainer) < before - 0.02
    assert bool(frozen) == (lora is not None)
    for k, p in trainer.model.named_parameters():
        assert k not in frozen or torch.equal(p, frozen[k])


@pytest.mark.parametrize("name, lora", [("llama-tied", None), ("qwen3_5", LoRA(2, 4))])
def test_the_papers_recipe_trains_fast_weights_first_and_evicts_hard(sources, name, lora):
    """And a run that was stopped in either stage goes on to the bit."""
    recipe = experiment(sources, name, lora, trains="fast-then-all", eviction="hard-then-sliding", steps=6)
    trainer, evictions, moved, kept = Trainer(recipe, 2, 0, device="cpu"), [], [], {}
    step = sl.training.sleep_forward

    def noted(*args, eviction, **options):
        evictions.append(eviction)
        return step(*args, eviction=eviction, **options)

    fast = {id(p) for p in trainer.model.fast_parameters()}
    with patch("sleeplib.training.sleep_forward", noted):
        for i in range(4):
            if i in (1, 3):
                kept[i] = {k: v.clone() for k, v in trainer.snapshot()[0].items()}, trainer.snapshot()[1]
            before = {k: p.clone() for k, p in trainer.model.named_parameters()}
            trainer.train_step()
            after = dict(trainer.model.named_parameters())
            changed = {id(p): not torch.equal(p, before[k]) for k, p in after.items()}
            moved.append(
                {
                    "fast": any(changed[i] for i in fast),
                    "rest": any(changed[i] for i in changed.keys() - fast),
                }
            )
    assert evictions == ["hard"] * 2 + ["sliding"] * 2
    assert moved == [{"fast": True, "rest": False}] * 2 + [{"fast": True, "rest": True}] * 2
    for tensors, notes in kept.values():
        again = Trainer(recipe, 2, 0, device="cpu")
        again.restore(tensors, json.loads(json.dumps(notes)))
        while again.step < 4:
            again.train_step()
        for k, v in trainer.model.state_dict().items():
            assert torch.equal(v, again.model.state_dict()[k]), k


def test_a_run_writes_its_record_and_keeps_a_model_that_can_be_loaded(sources, tmp_path):
    recipe = experiment(sources, "llama-tied", LoRA(2, 4), steps=2, eval_every=2, precision="bfloat16")
    with patch("sleeplib.device.multiplies_bfloat16", lambda device: True):
        record = sl.run(recipe, 2, device="cpu", out=tmp_path, keep=tmp_path / "kept", threads=1)
    assert record["status"] == "done" and record["dtype"] == "bfloat16"
    assert record["config"]["model"]["insert"]["after"] == [1, 3]
    model = load(tmp_path / "kept" / "tiny-pretrained" / "N2-seed0")
    assert model.lora == LoRA(2, 4) and model.insert == INSERT and model.loop == (1, 3)


def test_memory_is_predicted_without_weights(sources, tmp_path):
    """From the settings alone, and less where the original stays as it is."""
    predicted = {}
    for lora in (None, LoRA(2, 4)):
        recipe = experiment(sources, "llama-tied", lora)
        folder = shutil.copytree(sources["llama-tied"], tmp_path / str(lora))
        (folder / "model.safetensors").unlink()
        model = dataclasses.replace(recipe.model, source=str(folder))
        predicted[lora] = sl.flops.training_bytes(dataclasses.replace(recipe, model=model), 2)
        reading = budget.Reading.of(TASK)
        counted = budget.step_bytes(model.on_meta(), recipe.train, reading, 2, recipe.train.batch)
        assert 0.8 * predicted[lora] < counted <= predicted[lora]  # gradients counted once, and twice
    numbers = sum(p.numel() for p in recipe.model.on_meta().original_parameters())
    assert predicted[None] > 16 * numbers
    assert predicted[LoRA(2, 4)] < predicted[None] - 6 * numbers


@pytest.mark.parametrize("base", [True, False])
def test_a_saved_folder_is_counted_and_built_with_the_settings_it_was_saved_with(sources, tmp_path, base):
    recipe = experiment(sources, "llama-tied", LoRA(2, 4))
    model = recipe.model.build()
    save(model, tmp_path / "saved", base=base)
    saved = dataclasses.replace(recipe, model=PretrainedConfig(str(tmp_path / "saved"), TASK.vocab_size))
    counted, built = saved.model.on_meta(), saved.model.build()
    for other in (counted, built):
        assert (other.loop, other.insert, other.lora) == (model.loop, INSERT, LoRA(2, 4))
        shapes = {k: (v.shape, v.dtype) for k, v in model.state_dict().items()}
        assert shapes == {k: (v.shape, v.dtype) for k, v in other.state_dict().items()}
    assert 0 < sl.flops.training_bytes(saved, 2) <= sl.flops.training_bytes(recipe, 2)
    for make in ("on_meta", "build"):
        with pytest.raises(ValueError, match="^loop: .* was saved with settings of its own"):
            getattr(dataclasses.replace(saved.model, loop=(1, 2)), make)()


def test_the_small_preset_runs_on_any_checkpoint_of_its_family(tmp_path):
    """On a tiny one with weights in bfloat16 here: what is learned is low-rank differences in float32."""
    original = tiny_original("qwen3_5", vocab_size=260, pad_token_id=257, eos_token_id=256)
    original.save_pretrained(tmp_path / "source")
    byte_tokenizer().save_pretrained(tmp_path / "source")
    settings = {"source": str(tmp_path / "source"), "vocab_size": 260}
    settings = {f"{part}.{k}": v for part in ("task", "model") for k, v in settings.items()}
    settings |= {"task.tokens": (300, 900), "task.window": 450, "task.ops": (1, 2), "model.dtype": "bfloat16"}
    settings |= {f"train.{k}": 2 for k in ("steps", "batch", "eval_batch", "eval_every")}
    recipe = sl.experiments.get("gsm-qwen-small").replace(settings | {"train.warmup": 0, "train.decay": 0})
    record = sl.run(recipe, 2, device="cpu", out=tmp_path / "out", threads=1)
    assert record["status"] == "done" and record["chance"].keys() <= record["final"].keys()
    assert record["tokens"] == 2 * 2 * 912
    words = shlex.split(record["command"])
    changes = [word for before, word in zip(words, words[1:]) if before == "--set"]
    assert "model.dtype=bfloat16" in changes
    again = sl.experiments.get("gsm-qwen-small").replace(dict(x.split("=", 1) for x in changes))
    assert again == recipe


def test_a_vocabulary_of_another_size_is_refused(sources):
    model = PretrainedConfig(sources["qwen3_5"], 99)
    with pytest.raises(ValueError, match="model.vocab_size is 99; .* has"):
        model.build()


SHARDED = dict(name="llama-tied", shard=True, trains="fast-then-all", steps=4)


def train_in_parts(root):
    """What each of two processes does: a gradient, a step as on whole weights, a resumption."""
    sources = {"llama-tied": str(root / "llama-tied")}
    trainer = Trainer(experiment(sources, **SHARDED), 2, 0, device="cpu")
    loss = trainer.forward_backward(trainer.next_batch())
    learned = [(k, p) for k, p in trainer.model.named_parameters() if p.grad is not None]
    gradients, whole = processes.gathered({k: p.grad for k, p in learned}), trainer.whole_model()
    for optimizer in trainer.optimizers:
        optimizer.step()
    after = trainer.whole_model()
    if trainer.rank > 0:  # what is whole is at the first process alone
        assert gradients == {} and whole is after is None and trainer.snapshot()[0] == {}
    else:
        for k, p in whole.named_parameters():
            p.grad = gradients[k].clone() if k in gradients else None
        for optimizer in make_optimizers(whole, TRAIN):
            optimizer.step()
        for k, v in after.state_dict().items():
            assert torch.allclose(v, whole.state_dict()[k], atol=1e-6), k
        assert trainer.snapshot()[0].keys() > {f"model.{k}" for k in after.state_dict()}
    trainer = Trainer(experiment(sources, **SHARDED), 2, 0, device="cpu")
    for i in range(3):
        if i == 1:
            checkpoints.save_checkpoint(trainer, root / "one.safetensors")
        trainer.train_step()
    after = processes.gathered(trainer.model.state_dict())
    torch.distributed.barrier()
    checkpoints.load_checkpoint(trainer, root / "one.safetensors")
    for slot in (
        x for o in trainer.optimizers for slots in o.state.values() for x in slots.values() if x.ndim
    ):
        assert slot.to_local().untyped_storage().nbytes() == slot.to_local().nbytes < slot.nbytes
    for _ in range(2):
        trainer.train_step()
    again = processes.gathered(trainer.model.state_dict())
    for k in after:
        assert torch.equal(again[k], after[k]), k
    part = sum(p.to_local().numel() for p in trainer.model.parameters())
    if trainer.rank == 0:
        torch.save((part, float(loss), gradients), root / "whole.pt")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch has no processes here")
def test_weights_in_parts_learn_as_whole_ones_do(tmp_path):
    sources = make_sources(tmp_path)
    argv = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", __file__, str(tmp_path)]
    own = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    done = subprocess.run(argv, capture_output=True, text=True, env=own)
    assert done.returncode == 0, "\n".join(x for x in done.stderr.splitlines() if "rank0" in x)
    part, loss, gradients = torch.load(tmp_path / "whole.pt")
    alone = Trainer(experiment(sources, **SHARDED), 2, 0, device="cpu")
    assert part < 0.6 * sum(p.numel() for p in alone.model.parameters())
    assert float(alone.forward_backward(alone.next_batch())) == pytest.approx(loss, rel=1e-5)
    for k, p in alone.model.named_parameters():
        assert (p.grad is None) == (k not in gradients)
        if p.grad is not None:
            assert (p.grad - gradients[k]).abs().max() <= 1e-3 * p.grad.abs().max() + 1e-6, k


if __name__ == "__main__":
    with processes.joined():
        train_in_parts(Path(sys.argv[1]))
