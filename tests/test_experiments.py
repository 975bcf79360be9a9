"""Presets and settings: frozen, hashed, refused by name."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sleeplib as sl
from sleeplib import pretrained
from sleeplib.flops import training_flops
from sleeplib.tasks.check import check_task

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
                ("train.truncate", data.draw(st.sampled_from([None, 1, 3]))),
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


def test_a_setting_that_is_off_leaves_older_records_as_they_are():
    assert "truncate" not in QUICK.config()["train"]  # 4 digits of a hash from before there was one
    assert QUICK.config_hash()[:4] == "6e42"
    cut = QUICK.replace({"train.truncate": "2"})
    assert cut.config_hash() != QUICK.config_hash() and cut.changes() == ["train.truncate=2"]
    assert cut.replace({"train.truncate": "None"}) == QUICK
    name = "rule110-truncate-1"
    assert sl.experiments.get(name).replace({"train.truncate": None}).changes() == ["train.truncate=null"]


STORY = sl.experiments.get("gsm_infinite-text").task.of
INSERT, TOLD = pretrained.Insert((1, 3), 2, 8, 16, dynamic=False), {"task.tokens": (300, 900)}
CHANGED = [
    ("gsm-qwen-small", {"model.lora": pretrained.LoRA(4, 8.5), "model.revision": "123"} | TOLD),
    (
        "gsm-qwen-small",
        {"model.lora": None, "model.insert": INSERT, "model.source": "a (b)/c", "train.clip": 2},
    ),
    ("gsm-ouro-sliding-paper", {"train.trains": "all", "train.shard": True, "model.insert": INSERT}),
    ("gsm_infinite-text", {"task.of": dataclasses.replace(STORY, ops=(1, 2), theme=None)}),
    ("gsm_infinite-text", {"task.of": sl.tasks.Depo(5, 4, 8, (1, 1), 3, 2, 5)}),
    ("recall-ablation-recent8", {"model.keep": 4, "model.loop": (0, 1)}),
]


@pytest.mark.parametrize("name, changes", CHANGED)
def test_the_changes_that_a_record_keeps_make_the_experiment_again(name, changes):
    preset = sl.experiments.get(name)
    changed = preset.replace(changes)
    again = preset.replace(dict(change.split("=", 1) for change in changed.changes()))
    assert again == changed != preset and again.config_hash() == changed.config_hash()
    assert again.changes() == changed.changes() and len(changed.changes()) == len(changes)


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
    "train.truncate": "0",
    "task.steps": "-1",
    "model.pattern": "xyz",
    "model.num_heads": "3",
}


@pytest.mark.parametrize(
    "name, key, value, words",
    [
        ("gsm-qwen-small", "model.lora", '{"rang": 4}', "^model.lora.rang: unknown; LoRA has rank, alpha"),
        ("gsm-qwen-small", "model.lora", '{"rank": "few"}', "^model.lora.rank: cannot read 'few' as int"),
        ("gsm-qwen-small", "model.insert", '{"after": [1]}', "^model.insert: .*num_heads"),
        ("gsm_infinite-text", "task.of", '{"kind": "dep", "nodes": 5}', "^task.of: dep is no task of"),
        ("rule110-quick", "train.steps", '{"x": 4}', "^train.steps: wants int; got {'x': 4}"),
    ],
)
def test_bad_fields_of_a_setting_are_refused_by_name(name, key, value, words):
    with pytest.raises(ValueError, match=words):
        sl.experiments.get(name).replace({key: value})


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
        (TypeError, "truncate", 1.0),
        (TypeError, "truncate", True),
        (ValueError, "truncate", 0),
        (ValueError, "clip", float("nan")),
    ],
)
def test_a_bad_way_to_train_is_refused(error, name, value):
    with pytest.raises(error, match=f"train.{name} must be"):
        dataclasses.replace(QUICK.train, **{name: value})


def test_an_unknown_preset_is_refused_and_the_known_are_named():
    with pytest.raises(ValueError, match="preset 'rule111' is unknown; .*`sleeplib list` shows"):
        sl.experiments.get("rule111")


def test_the_same_seed_makes_the_same_model_whatever_n():
    small = QUICK.replace({"train.eval_batch": "1", "train.batch": "1"})
    one, four = (sl.Trainer(small, passes, 3, device="cpu").model for passes in (1, 4))
    for a, b in zip(one.parameters(), four.parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "name, value",
    [
        ("clip", 0),
        ("clip", float("inf")),
        ("muon_lr", float("nan")),
        ("adamw_lr", float("inf")),
        ("weight_decay", -1.0),
        ("warmup", 801),
        ("decay", 801),
        ("eval_every", 0),
        ("save_every", 0),
        ("eval_batch", 0),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"^train.{name} must be"):
        dataclasses.replace(QUICK.train, **{name: value})


def test_a_short_trial_needs_no_other_warmup():
    assert QUICK.replace({"train.steps": 3}).train.warmup == 50
    both = {"train.steps": 30, "train.warmup": 30, "train.decay": 30}  # order does not matter
    assert QUICK.replace(both) == QUICK.replace(dict(reversed(both.items())))


def test_numbers_of_numpy_are_plain_numbers():
    found = QUICK.replace(
        {"train.batch": np.int64(16), "train.clip": np.float32(0.5), "task.width": np.int8(9)}
    )
    assert found == QUICK.replace({"train.batch": 16, "train.clip": 0.5, "task.width": 9})
    assert (
        found.config_hash()
        == QUICK.replace({"train.batch": 16, "train.clip": 0.5, "task.width": 9}).config_hash()
    )
    train = dataclasses.replace(QUICK.train, batch=np.int64(16), clip=2)
    assert type(train.batch) is int and type(train.clip) is float


@pytest.mark.parametrize("name", ["../x", "a/b", "a\\b", "", ".", "..", ".hidden", "x.", "a\nb", None, 3])
def test_a_name_that_is_no_folder_is_refused(name):
    with pytest.raises(ValueError, match="^name must be letters, digits"):
        dataclasses.replace(QUICK, name=name)
    assert dataclasses.replace(QUICK, name="a short story, N=4_b-c+d.e 2").name


def test_settings_may_be_named_by_field_alone_where_that_is_clear():
    assert QUICK.replace(clip=2, pattern="gaga") == QUICK.replace(
        {"train.clip": 2.0, "model.pattern": "gaga"}
    )
    assert QUICK.replace({"train.steps": 9}, batch="7") == QUICK.replace({"train.steps": 9, "train.batch": 7})
    assert QUICK.replace(steps=100) == QUICK.replace({"train.steps": 100})  # how long, not the task's t
    with pytest.raises(ValueError, match=r"^window: ambiguous|^window: unknown"):
        QUICK.replace(window=100)
    with pytest.raises(ValueError, match=r"^stepz: unknown; there are task.width, .*train.save_every"):
        QUICK.replace(stepz=100)
    assert sl.experiments.get("depo-quick").replace(steps=100).train.steps == 100


# A task of one's own


@dataclasses.dataclass(frozen=True)
class Parity:
    """Is the number of ones in a window odd?  The question stands in a window of its own."""

    length: int = 12
    vocab_size: int = 4
    window: int = 6
    shift: float = 0.0

    def batch(self, count, rng, split="train"):
        inputs = torch.from_numpy(rng.integers(2, size=(count, self.length)))
        inputs[:, 6:] = 3
        labels = torch.full_like(inputs, -100)
        labels[:, 6] = inputs[:, :6].sum(1) % 2
        return sl.tasks.Batch(inputs, labels)

    def score(self, logits, batch):
        return sl.tasks.base.score(logits, batch)

    def chance(self):
        return dict(loss=math.log(2), token=0.5, exact=0.5)


def own(task, **train):
    model = sl.ModelConfig(vocab_size=4, d_model=16, num_heads=2, pattern="ag", mlp_size=16)
    train = dict(steps=2, batch=4, eval_every=2, eval_batch=8) | train
    return sl.experiments.Experiment("own", task, model, sl.experiments.TrainConfig(**train))


def test_a_task_of_ones_own_is_trained_and_recorded(tmp_path):
    record = sl.run(own(Parity()), 2, device="cpu", out=tmp_path)
    assert record["status"] == "done" and record["config"]["task"]["kind"] == "test_experiments.Parity"
    assert record["config"]["task"]["window"] == 6 and {"loss", "token", "exact"} <= set(record["final"])
    assert own(Parity()).replace({"task.length": 13}).config_hash() != own(Parity()).config_hash()


@dataclasses.dataclass(frozen=True)
class Wider(sl.tasks.Rule110):
    """A subclass is another task."""


def test_a_record_never_calls_a_task_by_another_ones_name():
    assert QUICK.config()["task"]["kind"] == "rule110"
    assert dataclasses.replace(QUICK, task=Wider()).config()["task"]["kind"] == "test_experiments.Wider"


def changed(**methods):
    return type("Parity", (Parity,), methods)()


def batch_with(change):
    """Parity with a fault in its batches."""

    def batch(self, count, rng, split="train"):
        found = Parity.batch(self, count, rng, split)
        return change(found) or found

    return changed(batch=batch)


def shuffled(batch):
    batch.labels[0, 6], batch.labels[0, 0] = -100, 1


def repeated(batch):
    return batch._replace(labels=torch.where(batch.labels < 0, batch.labels, batch.inputs))


@pytest.mark.parametrize(
    "task, words",
    [
        (object(), "object has no vocab_size"),
        (Parity(window=0), "window must be an int of at least 1; got 0"),
        (Parity(length=True), "length must be an int of at least 1; got True"),
        (batch_with(lambda b: (b.inputs, b.labels)), "inputs must be an int64 tensor .*; got NoneType"),
        (
            batch_with(lambda b: b._replace(labels=b.labels.int())),
            r"labels must be .*got torch.int32 \(8, 12\)",
        ),
        (
            batch_with(lambda b: b._replace(labels=b.labels[:, 1:])),
            r"labels must be .*got torch.int64 \(8, 11\)",
        ),
        (batch_with(lambda b: b._replace(inputs=b.inputs + 1)), "inputs must lie in 0 .. 3; got 1 .. 4"),
        (
            batch_with(lambda b: b._replace(labels=b.labels.clamp(min=-1))),
            "labels must lie in .*; got -1 .. 1",
        ),
        (batch_with(lambda b: b._replace(labels=b.labels.clamp(max=-100))), "labels are -100 everywhere"),
        (batch_with(repeated), "labels repeat the token"),
        (batch_with(shuffled), "labels: rows disagree about which windows of 6 tokens"),
        (
            batch_with(lambda b: b._replace(inputs=torch.randint(3, b.inputs.shape))),
            "inputs must follow from",
        ),
        (batch_with(lambda b: b._replace(groups=b.labels[0])), "groups must be None or as labels"),
        (changed(score=lambda self, logits, batch: dict(loss=0.0)), "score must give exact, token; got loss"),
        (changed(chance=lambda self: dict(loss=0.0, token=1.0)), "chance must give exact; got loss, token"),
    ],
)
def test_a_task_that_does_not_fit_is_refused_in_words_before_training(task, words):
    with pytest.raises((ValueError, TypeError), match=f"^task: {words}"):
        sl.Trainer(own(task), 2, 0, device="cpu")


def test_a_task_that_cannot_be_recorded_is_refused():
    bare = type("Bare", (), {name: getattr(Parity, name) for name in ("batch", "score", "chance")})
    bare.vocab_size, bare.length, bare.window = 4, 12, 6
    with pytest.raises(TypeError, match="^task: a record keeps its fields, so .*Bare must be a dataclass"):
        sl.run(own(bare()), 2, device="cpu")
    with pytest.raises(ValueError, match="^task: the fields of .*Parity must be plain data: Out of range"):
        own(Parity(shift=math.inf)).config()
    with pytest.raises(
        TypeError, match="^task: the fields of .*Parity must be plain data: Object of type set"
    ):
        own(Parity(shift={1})).config()


def test_every_task_of_the_library_passes_the_check():
    for name in ("rule110-quick", "depo-quick", "depo-ablation-ring8"):
        check_task(sl.experiments.get(name).task)
