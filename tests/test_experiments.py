"""Presets and settings: frozen, hashed, refused by name."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sleeplib as sl
from sleeplib.flops import training_flops

QUICK = sl.experiments.get("rule110-quick")


def test_the_presets_of_the_issue():
    task, model, train = QUICK.task, QUICK.model, QUICK.train
    assert task == sl.tasks.Rule110(width=12, strings=2, steps=6)
    assert (model.d_model, model.pattern, train.batch, train.steps) == (64, "agag", 128, 800)
    assert QUICK.seeds == (0, 1, 2) and QUICK.passes == (1, 2, 4)
    assert sl.experiments.get("rule110-paper").task == sl.tasks.Rule110(width=24, strings=4, steps=32)
    assert {"rule110-quick", "rule110-small", "rule110-paper"} <= set(sl.experiments.PRESETS)


def test_the_presets_of_gsm_infinite():
    paper = sl.experiments.get("gsm_infinite-paper")
    task, train = paper.task, paper.train
    assert (task.tokens, task.window, task.ops, task.question_first) == ((2000, 3300), 2000, (1, 8), True)
    assert (train.batch, train.muon_lr, train.adamw_lr, train.eviction) == (256, 1e-3, 5e-5, "hard")
    assert 8 * train.eval_batch == 1600  # held-out problems in the end
    quick, windows, sliding, warmup = (
        sl.experiments.get(f"gsm_infinite-quick{name}") for name in ("", "-windows", "-sliding", "-warmup")
    )
    assert quick.passes == (1, 2, 4) and quick.seeds == (0, 1, 2)
    assert not quick.task.solution and quick.task.question_first
    for other, eviction in ((windows, "hard"), (sliding, "sliding"), (warmup, "hard-then-sliding")):
        assert other.model == quick.model and other.task == windows.task
        assert other.train == dataclasses.replace(quick.train, eviction=eviction)


def test_the_rivals_without_sleep_cost_what_four_passes_cost():
    ring, long, deep = (sl.experiments.get(f"depo-ablation-{name}") for name in ("ring8", "long", "deep"))
    budget = training_flops(ring, 4) * ring.train.steps
    for rival in (long, deep):
        assert rival.passes == (1,) and rival.task == ring.task
        assert abs(training_flops(rival, 1) * rival.train.steps / budget - 1) < 0.01
    assert ring.task.nodes == 2 * ring.task.hops  # no shorter way back than four hops


@pytest.mark.parametrize("name", sl.experiments.PRESETS)
def test_every_preset_fits_together(name):
    experiment = sl.experiments.get(name)
    assert experiment.name == name and experiment.about
    assert experiment.task.vocab_size == experiment.model.vocab_size == len(experiment.task.vocab)
    assert experiment.passes and experiment.seeds
    assert json.loads(json.dumps(experiment.config())) == experiment.config()
    sl.HybridLM(experiment.model)


def test_an_experiment_is_frozen():
    for part in (QUICK, QUICK.task, QUICK.model, QUICK.train):
        with pytest.raises(dataclasses.FrozenInstanceError):
            part.name = "x"


def test_the_hash_is_of_the_configuration():
    hashes = {e.config_hash() for e in sl.experiments.PRESETS.values()}
    assert len(hashes) == len(sl.experiments.PRESETS)
    assert QUICK.replace({}).config_hash() == QUICK.config_hash()
    renamed = dataclasses.replace(QUICK, name="other", about="other", seeds=(7,))
    assert renamed.config_hash() == QUICK.config_hash()
    for key, value in {"task.steps": "7", "model.pattern": "gaga", "train.clip": "0.5"}.items():
        assert QUICK.replace({key: value}).config_hash() != QUICK.config_hash()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_setting_is_read_as_its_type(data):
    key, value = data.draw(
        st.sampled_from(
            [
                ("train.steps", data.draw(st.integers(1, 10**6))),
                ("train.clip", data.draw(st.floats(0.1, 10))),
                ("train.checkpoint", data.draw(st.booleans())),
                ("train.eviction", data.draw(st.sampled_from(["hard", "sliding", "hard-then-sliding"]))),
                ("model.loop", data.draw(st.sampled_from([None, (0, 1), (1, 3)]))),
                ("model.mlp_size", data.draw(st.integers(1, 99))),
            ]
        )
    )
    text = value if isinstance(value, str) else json.dumps(value)
    for given_value in (text, value):
        part, name = key.split(".")
        found = getattr(getattr(QUICK.replace({key: given_value}), part), name)
        assert found == value and type(found) is type(value)


def test_true_and_none_may_be_written_as_in_python():
    assert QUICK.replace({"train.graph": "True"}).train.graph is True
    assert QUICK.replace({"model.loop": "None"}).model.loop is None
    assert QUICK.replace({"train.clip": "2"}).train.clip == 2.0
    assert QUICK.replace({"model.loop": "(1, 3)"}).model.loop == (1, 3)


def test_a_word_may_stand_bare_where_none_is_allowed_too():
    story = dataclasses.replace(QUICK, task=sl.tasks.GSMInfinite())
    assert story.replace({"task.theme": "harbor"}).task.theme == "harbor"
    assert story.replace({"task.theme": "None"}).task.theme is None
    with pytest.raises(ValueError, match="theme"):
        story.replace({"task.theme": "desert"})


BAD = {
    "train.stepz": "1",
    "steps": "1",
    "trian.steps": "1",
    "train.steps": "many",
    "train.batch": "1.5",
    "task.width": "null",
    "task.strings": "true",
    "train.graph": "1",
    "train.clip": "[1]",
    "model.loop": "0",
    "model.d_model": '"64"',
    "train.eviction": "soft",
    "train.precision": "float16",
    "train.eval_every": "0",
    "task.steps": "-1",
    "model.pattern": "xyz",
    "model.num_heads": "3",
}


@pytest.mark.parametrize("key, value", BAD.items())
def test_a_bad_setting_is_refused_by_name(key, value):
    with pytest.raises((ValueError, TypeError), match=key.rpartition(".")[2]):
        QUICK.replace({key: value})


@pytest.mark.parametrize(
    "error, name, value",
    [
        (TypeError, "steps", 1.5),
        (TypeError, "steps", "3"),
        (TypeError, "graph", 1),
        (TypeError, "batch", True),
        (ValueError, "steps", 0),
        (ValueError, "warmup", -1),
        (ValueError, "clip", float("nan")),
    ],
)
def test_a_bad_way_to_train_is_refused(error, name, value):
    with pytest.raises(error, match=f"train.{name} must be"):
        dataclasses.replace(QUICK.train, **{name: value})


def test_an_unknown_preset_is_refused_and_the_known_are_named():
    with pytest.raises(ValueError, match="preset 'rule111' is unknown; there are .*rule110-quick"):
        sl.experiments.get("rule111")


def test_the_same_seed_makes_the_same_model_whatever_n():
    small = QUICK.replace({"train.eval_batch": "1", "train.batch": "1"})
    one, four = (sl.Trainer(small, passes, 3, device="cpu").model for passes in (1, 4))
    for a, b in zip(one.parameters(), four.parameters()):
        assert torch.equal(a, b)
