"""Recall: what is read and asked, and how long ago it was.  Run as a script, it writes the golden file."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sleeplib as sl

GOLDEN = Path(__file__).resolve().parent.parent / "data" / "samples" / "recall.json"


def draw(task, count=64, seed=0, split="train"):
    return task.batch(count, np.random.default_rng(seed), split=split)


def golden():
    """What a fixed seed draws: the first sequence in full, a hash of the first 256."""
    task, samples = sl.tasks.Recall(), []
    for split in ("train", "test"):
        batch = draw(task, 256, seed=1, split=split)
        digest = hashlib.sha256(np.stack(batch).astype("<i8").tobytes()).hexdigest()
        first = " ".join(task.vocab[i] for i in batch.inputs[0])
        samples.append({"split": split, "first": first, "sha256": digest})
    return samples


def test_golden():
    assert golden() == json.loads(GOLDEN.read_text())


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    pairs=st.integers(1, 4),
    windows=st.integers(1, 6),
    extra=st.integers(0, 20),
    values=st.integers(2, 9),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_a_sequence_shows_pairs_and_asks_for_some_of_them(pairs, windows, extra, values, seed, data):
    queries = data.draw(st.integers(1, pairs))
    task = sl.tasks.Recall(pairs, windows, queries, pairs * windows + extra, values)
    inputs, labels, groups = batch = draw(task, 3, seed)
    assert inputs.shape == labels.shape == groups.shape == (3, task.length)
    assert torch.equal(task.solve(inputs), labels)
    for row, wanted, ago in zip(*(x.tolist() for x in batch)):
        shown = [(row[i], row[i + 1]) for i in range(0, task.context, 2)]
        keys = [task.vocab[key] for key, _ in shown]
        assert len(set(keys)) == len(keys) and all(key[0] == "k" for key in keys)
        assert all(task.vocab[value][0] == "v" for _, value in shown)
        assert all(x == -100 for x in wanted[: task.context])
        asked = [(row[i], row[i + 1]) for i in range(task.context, task.length, 2)]
        assert len(set(asked)) == queries
        for i, pair in zip(range(task.context, task.length, 2), asked):
            assert wanted[i] == pair[1] and wanted[i + 1] == -100
            assert ago[i] == windows - shown.index(pair) // pairs


def test_every_age_is_asked_for_equally_often():
    task = sl.tasks.Recall()
    groups = draw(task, 8000).groups
    counts = groups[groups > 0].bincount()[1:]
    assert len(counts) == 8 and (abs(counts - 2000) < 200).all()


def test_chance_is_what_a_fixed_answer_scores():
    task = sl.tasks.Recall(values=4)
    batch = draw(task, 5000, split="test")
    logits = torch.zeros(int((batch.labels >= 0).sum()), task.vocab_size)
    logits[:, : task.keys] = -30
    logits[:, task.keys] = 1e-4
    scores, chance = task.score(logits, batch), task.chance()
    assert scores.keys() == chance.keys()
    assert scores["loss"] == pytest.approx(chance["loss"], abs=0.01)
    assert scores["exact"] == pytest.approx(chance["exact"], abs=0.02)
    assert all(scores[f"exact/{k}"] == pytest.approx(1 / 4, abs=0.06) for k in range(1, 9))


@pytest.mark.parametrize(
    "changes", [dict(pairs=0), dict(windows=0), dict(queries=3), dict(keys=15), dict(values=1)], ids=str
)
def test_settings_that_make_no_sense_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        sl.tasks.Recall(**changes)


def test_a_key_that_was_never_shown_is_an_error():
    task = sl.tasks.Recall()
    inputs = draw(task, 1).inputs
    inputs[0, task.context] = next(k for k in range(task.keys) if k not in inputs[0].tolist())
    with pytest.raises(ValueError, match="was not shown"):
        task.solve(inputs)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(golden(), indent=1) + "\n")
