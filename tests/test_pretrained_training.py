"""Pretrained models in the one training loop: they learn, fast weights first, and go on when stopped."""

import dataclasses

import pytest
import torch
from tiny_pretrained import tiny_original

import sleeplib as sl
from sleeplib.experiments import Experiment, TrainConfig
from sleeplib.training import Trainer

pytest.importorskip("transformers")
pytest.importorskip("peft")

from sleeplib.pretrained import Insert, LoRA, PretrainedConfig

TASK = sl.tasks.Rule110(width=8, strings=2, steps=1)
INSERT = Insert(after=(1, 3), num_heads=2, key_size=8, value_size=16)
TRAIN = TrainConfig(steps=12, batch=4, warmup=0, adamw_lr=3e-3, muon_lr=4e-3, eval_every=6, eval_batch=8)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root, found = tmp_path_factory.mktemp("checkpoints"), {}
    for name in ("qwen3_5", "llama-tied"):
        found[name] = str(root / name)
        options = dict(vocab_size=TASK.vocab_size, pad_token_id=None)
        tiny_original(name, **options).save_pretrained(found[name])
    return found


def experiment(sources, name="qwen3_5", lora=None, **train):
    insert = INSERT if name == "llama-tied" else None
    model = PretrainedConfig(sources[name], TASK.vocab_size, insert=insert, lora=lora, loop=(1, 2))
    return Experiment("tiny-pretrained", TASK, model, dataclasses.replace(TRAIN, **train))


def mean_loss(trainer):
    batch = TASK.batch(16, __import__("numpy").random.default_rng(0))
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
