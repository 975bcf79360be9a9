"""Rule 110: what is read, what is asked, who is held out.  Run as a script, it writes the golden file."""

import hashlib
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sleeplib as sl
from sleeplib.tasks import rule110_history, rule110_rollout

GOLDEN = Path(__file__).resolve().parent.parent / "data" / "samples" / "rule110.json"
ROW = np.zeros(3, dtype=np.float32)
TASKS = {"default": sl.tasks.Rule110(), "quick": sl.tasks.Rule110(width=12, strings=2, steps=6)}


def draw(task, count=64, seed=0, split="train"):
    return task.batch(count, np.random.default_rng(seed), split=split)


def golden():
    """What a fixed seed draws: the first sequence in full, a hash of the first 256."""
    samples = []
    for name, task in TASKS.items():
        for split in ("train", "test"):
            batch = draw(task, 256, seed=110, split=split)
            digest = hashlib.sha256(np.stack((batch.inputs, batch.labels)).astype("<i8").tobytes())
            asked = batch.labels[0] >= 0
            samples.append(
                {
                    "task": name,
                    "split": split,
                    "first": " ".join(task.vocab[i] for i in batch.inputs[0]),
                    "asked": " ".join(task.vocab[i] for i in batch.labels[0, asked]),
                    "sha256": digest.hexdigest(),
                }
            )
    return samples


@settings(max_examples=20, deadline=None, derandomize=True)
@given(width=st.integers(3, 63), strings=st.integers(1, 4), steps=st.integers(0, 40), seed=st.integers(0, 99))
def test_a_sequence_reads_rings_and_asks_for_first_cells(width, strings, steps, seed):
    task = sl.tasks.Rule110(width=width, strings=strings, steps=steps)
    inputs, labels, groups = draw(task, 3, seed)
    assert groups is None and inputs.dtype == labels.dtype == torch.int64
    assert inputs.shape == labels.shape == (3, task.length) and task.window == width
    context = strings * width
    for row, wanted in zip(inputs, labels):
        rings = row[:context].view(strings, width).numpy()
        answers = [int(rule110_history(ring, steps)[-1, 0]) for ring in rings]
        assert task.vocab[row[context]] == "<answer>"
        assert row[context + 1 :].tolist() == answers[:-1]  # teacher forcing
        assert (wanted[:context] == -100).all() and wanted[context:].tolist() == answers


def test_the_same_seed_draws_the_same():
    for a, b in zip(draw(TASKS["default"])[:2], draw(TASKS["default"])[:2]):
        assert torch.equal(a, b)
    assert not torch.equal(draw(TASKS["default"])[0], draw(TASKS["default"], seed=1)[0])


def test_no_ring_of_one_split_is_in_the_other():
    task = sl.tasks.Rule110(width=10, strings=8, steps=1)

    def rings(split):
        context = draw(task, 500, split=split).inputs[:, :80]
        return set(map(tuple, context.reshape(-1, 10).tolist()))

    train, test = rings("train"), rings("test")
    assert not train & test
    assert 1000 < len(train | test) <= 1024 and 1024 / 16 < len(test) < 1024 / 4


def test_rings_are_drawn_evenly():
    inputs = draw(TASKS["default"], 2000).inputs[:, :96].double()
    assert (inputs.mean(dim=0) - 0.5).abs().max() < 0.06  # five standard deviations of 2,000 coins


def test_the_answers_cannot_be_seen():
    """No input before <answer> is an answer, and no answer but earlier ones follows it."""
    task = TASKS["default"]
    batch = draw(task)
    blind = batch.inputs.clone()
    blind[:, task.strings * task.width + 1 :] = 3
    assert torch.equal(task.solve(blind), task.solve(batch.inputs))


def test_score_and_chance_have_the_same_keys_and_mean_what_they_say():
    task = TASKS["quick"]
    batch = draw(task, 50, split="test")
    logits = torch.zeros(*batch.inputs.shape, task.vocab_size)
    asked = batch.labels >= 0
    logits[asked, batch.labels[asked]] = 50.0
    assert task.score(logits, batch) == pytest.approx({"loss": 0, "token": 1, "exact": 1})
    row, column = asked.nonzero()[0]
    logits[row, column] = -logits[row, column]
    wrong = task.score(logits, batch)
    assert wrong["token"] == pytest.approx(99 / 100) and wrong["exact"] == pytest.approx(49 / 50)
    assert set(wrong) == set(task.chance())
    with pytest.raises(ValueError, match="logits"):
        task.score(logits[:, :-1], batch)


def test_scores_are_split_by_groups():
    batch = draw(TASKS["quick"], 4)
    groups = torch.zeros_like(batch.labels)
    groups[:, -1] = 7
    batch = batch._replace(groups=groups)
    logits = torch.zeros(*batch.inputs.shape, 4)
    asked = batch.labels >= 0
    logits[asked, batch.labels[asked]] = 9.0
    logits[:, -1] *= -1
    result = TASKS["quick"].score(logits, batch)
    assert result["exact/0"] == 1 and result["exact/7"] == 0
    assert result["loss/0"] < 0.1 < result["loss/7"]


@pytest.mark.parametrize("width, strings, steps", [(10, 1, 3), (12, 2, 6), (24, 4, 12)])
def test_chance_is_the_best_constant_answer(width, strings, steps):
    task = sl.tasks.Rule110(width=width, strings=strings, steps=steps)
    batch = draw(task, 4000, split="test")
    answers = batch.labels[batch.labels >= 0].double()
    commoner = float(answers.mean() > 0.5)
    rows = (batch.labels[:, -strings:] == commoner).double()
    chance = task.chance()
    assert chance["token"] == pytest.approx(rows.mean().item(), abs=0.03)
    assert chance["exact"] == pytest.approx(rows.prod(dim=1).mean().item(), abs=0.04)
    p = rows.mean().item()
    assert chance["loss"] == pytest.approx(-(p * math.log(p) + (1 - p) * math.log(1 - p)), abs=0.02)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(width=st.integers(1, 63), steps=st.integers(0, 40), seed=st.integers(0, 99))
def test_the_packed_rollout_is_the_rule_table(width, steps, seed):
    cells = np.random.default_rng(seed).integers(0, 2, width)
    packed = np.array([sum(int(c) << i for i, c in enumerate(cells))], dtype=np.uint64)
    history = rule110_history(cells, steps)
    assert history.shape == (steps + 1, width) and np.array_equal(history[0], cells)
    rolled = rule110_rollout(packed, width, steps)[0]
    assert [int(rolled) >> i & 1 for i in range(width)] == history[-1].tolist()


def test_rule_110_spells_110():
    for number in range(8):
        cells = [number >> 2 & 1, number >> 1 & 1, number & 1, 0, 0]
        assert rule110_history(cells, 1)[1, 1] == 110 >> number & 1


@pytest.mark.parametrize(
    "error, names, call",
    [
        (ValueError, "cells must lie in 0 .. 1; got 0 .. 2", lambda: rule110_history([0, 2], 1)),
        (ValueError, "cells must be one row", lambda: rule110_history([], 1)),
        (ValueError, "cells must be one row of integers", lambda: rule110_history([[0, 1]], 1)),
        (ValueError, "cells must be one row of integers; got float64", lambda: rule110_history([0.0], 1)),
        (ValueError, "steps must be an int of at least 0; got -1", lambda: rule110_history([0, 1], -1)),
        (TypeError, "steps must be an int.*; got 1.0", lambda: rule110_history([0, 1], 1.0)),
        (TypeError, "steps must be an int.*; got True", lambda: rule110_rollout([1], 5, True)),
        (ValueError, "steps must be an int of at least 0; got -1", lambda: rule110_rollout([1], 5, -1)),
        (ValueError, "width must be an int in 1 .. 63; got 64", lambda: rule110_rollout([1], 64, 1)),
        (ValueError, "rows must lie in 0 .. 31; got 32 .. 32", lambda: rule110_rollout([32], 5, 1)),
        (ValueError, "rows must lie in 0 .. 31; got -1 .. 1", lambda: rule110_rollout([1, -1], 5, 1)),
        (ValueError, "rows must be one row of integers; got float32", lambda: rule110_rollout(ROW, 5, 1)),
    ],
)
def test_a_rollout_minds_its_arguments(error, names, call):
    with pytest.raises(error, match=names):
        call()


def test_a_rollout_takes_rings_of_any_integer_kind():
    """Signed and unsigned integers together would be floats to Numba."""
    wanted = rule110_rollout(np.arange(32, dtype=np.uint64), 5, 3)
    for kind in (np.int64, np.int8, np.uint16):
        assert np.array_equal(rule110_rollout(np.arange(32, dtype=kind), np.int32(5), 3), wanted)
    assert np.array_equal(rule110_rollout(np.arange(64, dtype=np.uint64)[::2] // 2, 5, np.int64(3)), wanted)


@pytest.mark.parametrize(
    "error, names, changes",
    [
        (ValueError, "width must be an int in 3 .. 63; got 64", dict(width=64)),
        (ValueError, "width must be an int in", dict(width=2)),
        (ValueError, "strings must be an int in", dict(strings=0)),
        (ValueError, "steps must be an int in", dict(steps=-1)),
        (TypeError, "steps must be an int.*; got 1.5", dict(steps=1.5)),
        (TypeError, "width must be an int.*; got True", dict(width=True)),
    ],
)
def test_a_bad_task_is_refused(error, names, changes):
    with pytest.raises(error, match=names):
        replace(TASKS["quick"], **changes)


def test_a_bad_request_is_refused():
    task, rng = TASKS["quick"], np.random.default_rng(0)
    with pytest.raises(ValueError, match="count must be .* got 0"):
        task.batch(0, rng)
    with pytest.raises(TypeError, match="rng must be a numpy Generator; got int"):
        task.batch(1, 0)
    with pytest.raises(ValueError, match="split must be 'train' or 'test'; got 'val'"):
        task.batch(1, rng, split="val")
    with pytest.raises(ValueError, match="inputs must have shape"):
        task.solve(torch.zeros(1, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="inputs must show cells"):
        task.solve(torch.full((1, task.length), 3))
    with pytest.raises(ValueError, match="inputs must show cells .* <answer> at position 24"):
        task.solve(torch.zeros(1, task.length, dtype=torch.int64))
    with pytest.raises(ValueError, match="inputs must hold tokens 0 .. 3"):
        task.solve(torch.full((1, task.length), -1))
    with pytest.raises(TypeError, match="inputs must be an int64 tensor; got torch.float32"):
        task.solve(torch.zeros(1, task.length))
    with pytest.raises(TypeError, match="inputs must be an int64 tensor; got Tensor"):
        task.solve(torch.zeros(1, task.length, dtype=torch.int64, device="meta"))
    with pytest.raises(TypeError, match="inputs must be an int64 tensor; got NoneType"):
        task.solve(None)
    with pytest.raises(ValueError, match="count must be an int in 1 .. 10000000; got True"):
        task.batch(True, rng)


def test_numpy_integers_are_ints():
    """And are kept as Python's, so that a run's settings and their hash stay the same."""
    task = sl.tasks.Rule110(*np.array([12, 2, 6]))
    assert task == TASKS["quick"] and all(type(x) is int for x in vars(task).values())
    for a, b in zip(draw(task, np.int64(3))[:2], draw(TASKS["quick"], 3)[:2]):
        assert torch.equal(a, b)


def test_chance_of_a_long_rollout_takes_seconds():
    began = time.process_time()
    chance = sl.tasks.Rule110(width=20, steps=100_000).chance()
    assert 0.5 <= chance["token"] < 0.7 and time.process_time() - began < 20


def test_a_question_to_a_stream_read_in_part_is_refused():
    """It was slept on one of two rings only."""
    task = TASKS["quick"]
    model = sl.HybridLM(sl.ModelConfig(vocab_size=4, d_model=8, num_heads=2))
    sleeper = sl.Sleeper(model, window=task.window)
    inputs = draw(task, 1).inputs
    sleeper.feed(inputs[:, : task.window])
    with pytest.raises(ValueError, match="position: 12 tokens were read; .* after 24, so sleep on 2 windows"):
        task.check_asked(sleeper.state.position)
    sleeper.feed(inputs[:, task.window : task.context])
    task.check_asked(sleeper.state.position)
    for position in (23, 26):
        with pytest.raises(ValueError, match=f"position: {position} tokens"):
            task.check_asked(position)


if __name__ == "__main__":
    GOLDEN.parent.mkdir(parents=True, exist_ok=True)
    GOLDEN.write_text(json.dumps(golden(), indent=1) + "\n")
