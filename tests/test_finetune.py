"""Pretraining on text, weights that start from a trained model, layers that are trained first."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from tiny import close, sequence, tiny_model

import sleeplib as sl
from sleeplib import checkpoints
from sleeplib.experiments import Experiment, TrainConfig
from sleeplib.finetune import start_from
from sleeplib.tasks import Depo, GSMInfinite, Recall, Rule110, Text

STORY = sl.experiments.get("gsm_infinite-text").task.of
TASK = Rule110(width=4, strings=1, steps=1)


def experiment(**settings):
    model = sl.ModelConfig(vocab_size=TASK.vocab_size, d_model=16, num_heads=2, mlp_size=16)
    train = TrainConfig(**dict(steps=6, batch=4, warmup=0, eval_every=2, eval_batch=4) | settings)
    return Experiment("tiny", TASK, model, train)


# Text


@pytest.mark.parametrize("of", [STORY, TASK, Depo(5, 4, 8, (1, 1), 3, 2, 5), Recall()])
def test_text_asks_for_every_next_token_and_for_the_answers(of):
    task = Text(of)
    (own, asked, _), (inputs, labels, groups) = (
        t.batch(16, np.random.default_rng(3), "test") for t in (of, task)
    )
    assert torch.equal(own, inputs) and task.window == task.length == of.length
    for row in range(16):
        for t in range(task.length):
            answer = int(asked[row, t])
            after = int(inputs[row, t + 1]) if t + 1 < task.length else -100
            after = -100 if after != -100 and task.vocab[after] == "<pad>" else after
            assert labels[row, t] == (after if answer == -100 else answer)
            wanted = -100 if labels[row, t] == -100 else int(answer != -100)
            assert groups[row, t] == wanted


def test_chance_of_text_is_what_knowing_the_commonest_tokens_gives():
    task = Text(STORY)
    chance = task.chance()
    batch = task.batch(256, np.random.default_rng(0), "test")
    own, story = task.score(torch.zeros(256, task.length, task.vocab_size), batch), STORY.chance()
    assert chance.keys() == own.keys() and chance["loss"] < own["loss"]
    assert abs(chance["exact/1"] - story["exact"]) < 0.05  # both say the commonest answer
    sl.tasks.check.check_task(task)


def test_text_of_what_is_no_task_is_refused():
    for odd in ("gsm", Text(STORY), None):
        with pytest.raises(TypeError, match="^of must be a task"):
            Text(odd)


def test_a_record_says_whose_text_was_read():
    e = sl.experiments.get("gsm_infinite-text")
    assert e.config()["task"]["of"]["kind"] == "gsm_infinite"
    other = dataclasses.replace(e, task=Text(dataclasses.replace(STORY, ops=(1, 2))))
    assert other.config_hash() != e.config_hash()


# Where weights start


@pytest.mark.parametrize("old, new", [("agag", "agag"), ("aa", "agag"), ("ag", "aagg"), ("aj", "ajgh")])
def test_weights_go_to_the_blocks_of_their_letter_in_order(tmp_path, old, new):
    kept, model = tiny_model(old, seed=1), tiny_model(new, seed=2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    kept.save(tmp_path / "kept")
    start_from(model, tmp_path / "kept")
    places = [[i for i, kind in enumerate(new) if kind == letter] for letter in old]
    seen, taken = dict.fromkeys(old, 0), set()
    for i, letter in enumerate(old):
        j = places[i][seen[letter]]
        seen[letter] += 1
        taken.add(j)
        for name, x in kept.layers[i].state_dict().items():
            assert torch.equal(model.layers[j].state_dict()[name], x)
    for name, x in model.state_dict().items():
        block = re.match(r"layers\.(\d+)\.", name)
        if block is None:
            assert torch.equal(x, kept.state_dict()[name])
        elif int(block[1]) not in taken:
            assert torch.equal(x, before[name])


def test_new_blocks_change_nothing_at_the_start(tmp_path):
    kept = tiny_model("aa", dtype=torch.float32)
    kept.save(tmp_path / "kept")
    model = sl.HybridLM(dataclasses.replace(kept.config, pattern="agag"))
    start_from(model, tmp_path / "kept")
    tokens = sequence(7)
    close(model(tokens, model.initial_state(2))[0], kept(tokens, kept.initial_state(2))[0])


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    tiny_model("aaa").save(tmp_path / "deep")
    tiny_model("aa", d_model=32).save(tmp_path / "wide")
    with pytest.raises(ValueError, match="^train.start: .*blocks aaa, more than the model's agag"):
        start_from(tiny_model("agag"), tmp_path / "deep")
    with pytest.raises(ValueError, match="^train.start: .*does not fit"):
        start_from(tiny_model("agag"), tmp_path / "wide")
    with pytest.raises(FileNotFoundError, match="^train.start: .*--keep"):
        start_from(tiny_model("agag"), tmp_path / "none")
    (tmp_path / "wide" / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="^train.start: folder: .*model.safetensors is damaged"):
        start_from(tiny_model("aa"), tmp_path / "wide")
    with pytest.raises(ValueError, match="^train.start: .*holds a HybridLM, .* none of a Linear's"):
        start_from(torch.nn.Linear(2, 2), tmp_path / "deep")


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(num_heads=4), "has num_heads 2, not the model's 4"),  # no shape shows it
        (dict(rope_base=100.0), "has rope_base 10000.0, not the model's 100.0"),
        (dict(mlp_size=48), "does not fit the model: layers.0.* is"),
    ],
)
def test_what_would_compute_something_else_is_refused_and_nothing_is_copied(tmp_path, changes, message):
    settings = dict(vocab_size=TASK.vocab_size, d_model=16, pattern="aa", num_heads=2, mlp_size=16)
    sl.HybridLM(sl.ModelConfig(**settings)).save(tmp_path / "kept")
    model = sl.HybridLM(sl.ModelConfig(**settings | changes))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"train.start: .*{message}"):
        start_from(model, tmp_path / "kept")
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_a_run_starts_from_the_model_of_its_own_seed(tmp_path):
    kept = {seed: sl.run(experiment(), 1, seed, "cpu", tmp_path, keep=tmp_path / "kept") for seed in (0, 1)}
    assert all(record["status"] == "done" for record in kept.values())
    e = experiment(start=f"{tmp_path}/kept/tiny/N1-seed{{seed}}")
    for seed in (0, 1):
        model = sl.HybridLM.from_checkpoint(tmp_path / "kept" / "tiny" / f"N1-seed{seed}").float()
        trainer = sl.Trainer(e, 4, seed, "cpu")
        for name, x in trainer.model.state_dict().items():
            assert torch.equal(x, model.state_dict()[name])


# What is trained


def test_the_fast_weight_layers_are_their_mixers_and_norms():
    model = tiny_model("agj")
    chosen = set(map(id, model.fast_parameters()))
    names = {name for name, p in model.named_parameters() if id(p) in chosen}
    assert {name.rsplit(".", 1)[0].split(".", 2)[1] for name in names} == {"1", "2"}
    assert names == {n for n, _ in model.named_parameters() if re.match(r"layers\.[12]\.mixer(_norm)?\.", n)}
    model.learn("fast")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == names
    model.learn("all")
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="^part must be 'all' or 'fast'; got 'slow'"):
        model.learn("slow")


def test_the_first_third_trains_the_fast_weight_layers_alone():
    trainer = sl.Trainer(experiment(trains="fast-then-all"), 2, 0, "cpu")
    always = set(map(id, trainer.model.fast_parameters()))
    for step in range(6):
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        trainer.train_step()
        for name, p in trainer.model.named_parameters():
            moved = not torch.equal(p, before[name])
            if step < 2 and id(p) not in always:
                assert not moved, name
            elif step not in (0, 2):  # what stands behind a matrix of zeros moves a step later
                assert moved, name


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_run_in_stages_resumes_to_the_bit(tmp_path, stop):
    e = experiment(trains="fast-then-all")
    whole, first, second = (sl.Trainer(e, 2, 0, "cpu") for _ in range(3))
    whole.run(progress=False)
    first.run(stop, progress=False)
    checkpoints.save_checkpoint(first, tmp_path / "x.safetensors")
    checkpoints.load_checkpoint(second, tmp_path / "x.safetensors")
    second.run(progress=False)
    assert whole.curve == second.curve
    for name, x in whole.model.state_dict().items():
        assert torch.equal(x, second.model.state_dict()[name]), name


def test_settings_that_are_left_alone_are_not_in_the_record():
    plain, staged = experiment(), experiment(trains="fast-then-all", start="x")
    assert not {"trains", "start"} & plain.config()["train"].keys()
    assert {"trains", "start"} <= staged.config()["train"].keys()
    assert plain.replace({"train.start": "a/b"}).train.start == "a/b"
    assert staged.replace({"train.start": "None"}).train.start is None
    with pytest.raises(ValueError, match="^train.trains must be one of all, fast-then-all"):
        experiment(trains="fast")


def test_presets_of_one_comparison_read_as_many_tokens():
    text = sl.experiments.get("gsm_infinite-text").train
    scratch = sl.experiments.get("gsm_infinite-taught-scratch-8e-3").train
    for arm in ("all", "warmup", "insert-all", "insert-warmup"):
        taught = sl.experiments.get(f"gsm_infinite-taught-{arm}-8e-3")
        assert text.steps + taught.train.steps == scratch.steps and text.batch == scratch.batch
        assert isinstance(taught.task, GSMInfinite) and taught.task == STORY
