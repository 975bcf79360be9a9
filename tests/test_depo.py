"""Depo: what is read, what is asked, who is held out.  Run as a script, it writes the golden file."""

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
from sleeplib.algorithm import awake_chunks
from sleeplib.tasks import khop_walk

GOLDEN = Path(__file__).resolve().parent.parent / "data" / "samples" / "depo.json"
QUICK = sl.experiments.get("depo-quick").task
TASKS = {"default": sl.tasks.Depo(), "quick": QUICK}


def draw(task, count=64, seed=0, split="train"):
    return task.batch(count, np.random.default_rng(seed), split=split)


def golden():
    """What a fixed seed draws: the first sequence in full, a hash of the first 256."""
    samples = []
    for name, task in TASKS.items():
        for split in ("train", "test"):
            batch = draw(task, 256, seed=12, split=split)
            digest = hashlib.sha256(np.stack(tuple(batch)).astype("<i8").tobytes())
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


def words(texts):
    """Names in a row of tokens: tuples that end with N.., marks on their own, padding left out."""
    found, name = [], ()
    for text in texts:
        if text.startswith("<"):
            assert not name, "a mark tears a name"
            found += [text] if text != "<pad>" else []
        else:
            name += (text,)
            if text[0] == "N":
                found, name = [*found, name], ()
    assert not name
    return found


@st.composite
def tasks(draw):
    nodes = draw(st.integers(3, 9))
    word = draw(st.sampled_from([(1, 1), (1, 2), (2, 3)]))
    windows = draw(st.sampled_from([w for w in (1, 2, 3) if (2 * nodes * word[1]) % w == 0]))
    window = 2 * nodes * word[1] // windows
    if window < 2 + 2 * word[1]:
        windows, window = 1, 2 * nodes * word[1]
    fits = window // (2 + 2 * word[1])
    fewest = draw(st.integers(3, nodes))
    queries = draw(st.integers(1, max(fewest, fits)))
    letters = draw(st.integers(nodes, 12))
    return sl.tasks.Depo(
        nodes=nodes,
        hops=draw(st.integers(1, 20)),
        letters=letters,
        word=word,
        queries=queries,
        windows=windows,
        fewest=fewest,
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(task=tasks(), seed=st.integers(0, 99), split=st.sampled_from(["train", "test"]))
def test_a_sequence_reads_edges_and_asks_for_walks(task, seed, split):
    inputs, labels, groups = draw(task, 5, seed, split)
    assert inputs.dtype == labels.dtype == groups.dtype == torch.int64
    assert inputs.shape == labels.shape == groups.shape == (5, task.length)
    assert torch.equal(labels >= 0, groups >= 0)
    assert inputs.min() >= 0 and inputs.max() < task.vocab_size == len(task.vocab) == len(set(task.vocab))
    for row in range(5):
        texts = [task.vocab[i] for i in inputs[row]]
        edges = words(texts[: task.context])
        sources, goals = edges[::2], edges[1::2]
        n = len(sources)
        assert sorted(sources) == sorted(goals) and len(set(sources)) == n, "each node once on either side"
        assert task.fewest <= n <= task.nodes and (split == "train" or n == task.nodes)
        assert all(task.word[0] <= len(name) <= task.word[1] for name in sources)
        assert "<pad>" not in texts[: task.context][-len(sum(edges, ())) :], "padding is on the left"
        number = {name: i for i, name in enumerate(sources)}
        successor = np.array([number[name] for name in goals])
        steps = khop_walk(successor, np.zeros(n, np.int64), np.arange(n))
        assert len(set(steps.tolist())) == n, "one cycle goes through all nodes"
        queries = words(texts[task.context :])
        assert len(queries) == 4 * min(n, task.queries)
        starts = queries[1::4]
        assert len(set(starts)) == len(starts), "starts differ"
        for mark, start, answer, goal in zip(*(queries[i::4] for i in range(4))):
            k = int(mark[1:-1])
            assert answer == "<answer>" and 1 <= k <= task.hops
            assert split == "train" or k & (k - 1) == 0, "powers of two at test"
            (end,) = khop_walk(successor, np.array([number[start]]), np.array([k]))
            assert sources[end] == goal
        # The label at a position is the token read next, and only answers are asked for.
        at = (labels[row] >= 0).nonzero()[:, 0]
        assert torch.equal(labels[row, at], inputs[row, at + 1])
        assert [task.vocab[i] for i in labels[row, at]] == [part for goal in queries[3::4] for part in goal]
        hops = [int(mark[1:-1]) for mark, goal in zip(queries[::4], queries[3::4]) for _ in goal]
        assert groups[row, at].tolist() == hops


@settings(max_examples=20, deadline=None, derandomize=True)
@given(task=tasks(), seed=st.integers(0, 99))
def test_no_window_of_edges_is_asked_and_every_window_of_queries_is(task, seed):
    awake = awake_chunks(draw(task, 9, seed).labels, task.window)
    assert awake[: task.windows] == (False,) * task.windows and all(awake[task.windows :])


def test_the_papers_sizes():
    task = TASKS["default"]
    assert (task.context, task.window, task.length, task.vocab_size) == (300, 75, 360, 118)


def test_sizes_are_drawn_as_stated():
    """n in 3 .. 75 with weight 1 / (n + sqrt(75)): mean about 28, two in five at most 16."""
    sizes, *_ = TASKS["default"]._cycles(20_000, np.random.default_rng(0), "train")
    weight = 1 / (np.arange(3, 76) + math.sqrt(75))
    wanted = weight / weight.sum()
    counts = np.bincount(sizes, minlength=76)[3:]
    chi2 = float(((counts - 20_000 * wanted) ** 2 / (20_000 * wanted)).sum())
    assert chi2 < 72 + 5 * math.sqrt(144)  # mean and five standard deviations of 72 degrees of freedom
    assert abs(sizes.mean() - 28) < 1 and abs((sizes <= 16).mean() - 0.39) < 0.02


def test_the_same_seed_draws_the_same():
    for a, b in zip(draw(QUICK), draw(QUICK)):
        assert torch.equal(a, b)
    assert not torch.equal(draw(QUICK)[0], draw(QUICK, seed=1)[0])


def test_no_cycle_of_one_split_is_in_the_other():
    """Cycles as sets of edges: the order of the edges and where the cycle begins do not count."""

    def cycles(split):
        inputs = draw(QUICK, 4000, split=split).inputs[:, : QUICK.context]
        rows = [words([QUICK.vocab[i] for i in row]) for row in inputs]
        return {frozenset(zip(row[::2], row[1::2])) for row in rows}

    train, test = cycles("train"), cycles("test")
    assert len(train) > 500 and len(test) > 100 and not train & test


def test_the_answers_cannot_be_seen():
    """The solver does not read what follows <answer>."""
    batch = draw(TASKS["default"], 16)
    blind = batch.inputs.clone()
    hidden = torch.zeros_like(blind, dtype=torch.bool)
    hidden[:, 1:] = batch.labels[:, :-1] >= 0
    blind[hidden] = QUICK.letters  # some other name
    assert torch.equal(TASKS["default"].solve(blind), batch.labels)


def test_score_and_chance_have_the_same_keys_and_mean_what_they_say():
    for task in TASKS.values():
        batch = draw(task, 400, split="test")
        logits = torch.zeros(*batch.inputs.shape, task.vocab_size)
        asked = batch.labels >= 0
        logits[asked, batch.labels[asked]] = 50.0
        right = task.score(logits, batch)
        assert set(right) == set(task.chance())
        assert all(v == pytest.approx(0 if "loss" in k else 1) for k, v in right.items())
        row, column = asked.nonzero()[0]
        logits[row, column] *= -1
        wrong = task.score(logits, batch)
        k = int(batch.groups[row, column])
        answers = (batch.inputs == task.vocab.index(f"<{k}>")).sum().item()
        assert wrong[f"exact/{k}"] == pytest.approx(1 - 1 / answers)
        assert wrong["exact"] == pytest.approx(1 - 1 / 400)


def test_chance_is_a_guess_among_the_nodes():
    """A guesser that knows the nodes' names and nothing else scores as `chance` says."""
    rng = np.random.default_rng(0)
    back = sl.tasks.Depo(nodes=4, hops=4, fewest=4, letters=60, word=(1, 1), queries=2, windows=1)
    for task in (*TASKS.values(), back):  # on a ring of four, four hops lead back to the start
        batch = draw(task, 500, split="test")
        logits = torch.zeros(*batch.inputs.shape, task.vocab_size)
        for row in range(500):
            texts = [task.vocab[i] for i in batch.inputs[row]]
            names = words(texts[: task.context])[::2]
            position = task.context
            for hops, start, _, goal in zip(*(words(texts[task.context :])[i::4] for i in range(4))):
                position = texts.index("<answer>", position) + 1
                guess = names[rng.choice([i for i, name in enumerate(names) if name != start])]
                guess = start if int(hops[1:-1]) % task.nodes == 0 else guess
                for offset, part in enumerate(guess[: len(goal)]):
                    logits[row, position - 1 + offset, task.vocab.index(part)] = 1.0
        score, chance = task.score(logits, batch), task.chance()
        for key in chance:
            if key.startswith(("exact", "token")):
                assert score[key] == pytest.approx(chance[key], abs=0.05), key
        labels = (batch.labels >= 0).sum().item() / (500 * min(task.nodes, task.queries))
        by_hops = [chance[key] for key in chance if key.startswith("loss/")]
        assert chance["loss"] == pytest.approx(sum(by_hops) / len(by_hops))
        assert max(by_hops) == pytest.approx(math.log(task.nodes - 1) / labels, rel=0.02)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(n=st.integers(1, 30), hops=st.integers(0, 50), seed=st.integers(0, 99))
def test_khop_walk_is_a_power_of_the_permutation(n, hops, seed):
    rng = np.random.default_rng(seed)
    successor = rng.permutation(n)
    start = rng.integers(0, n, 5)
    matrix = np.zeros((n, n), dtype=np.int64)
    matrix[np.arange(n), successor] = 1
    ends = np.linalg.matrix_power(matrix, hops)[start].argmax(axis=1)
    assert np.array_equal(khop_walk(successor, start, np.full(5, hops)), ends)


@pytest.mark.parametrize(
    "names, walk",
    [
        ("start must lie in 0 .. 2; got 0 .. 3", ([1, 2, 0], [0, 3], [1, 1])),
        ("start must lie in 0 .. 2; got -1", ([1, 2, 0], [-1], [1])),
        ("successor must lie in 0 .. 2; got 0 .. 7", ([7, 2, 0], [0], [1])),
        ("hops must lie in", ([1, 2, 0], [0], [-1])),
        (r"hops must have the shape of start, \(2,\); got \(1,\)", ([1, 2, 0], [0, 1], [1])),
        ("start must be one row of integers; got float64", ([1, 2, 0], [0.0], [1])),
        ("successor must be one row of integers", ([[1, 2, 0]], [0], [1])),
        ("hops must be one row of integers", ([1, 2, 0], [0], 1)),
        ("start must lie in 0 .. -1", (np.zeros(0, np.int64), [0], [1])),
    ],
)
def test_khop_walk_minds_its_arguments(names, walk):
    with pytest.raises(ValueError, match=names):
        khop_walk(*walk)


@pytest.mark.parametrize(
    "error, names, changes",
    [
        (ValueError, "nodes must be an int in 3 .. 1000; got 2", dict(nodes=2)),
        (ValueError, "hops must be an int in", dict(hops=0)),
        (ValueError, "fewest must be an int in 3 .. 5; got 6", dict(fewest=6)),
        (ValueError, "queries must be an int in", dict(queries=0)),
        (ValueError, "queries must be at most fewest = 5, .* got 6", dict(queries=6)),
        (ValueError, "letters: 4 give 4 names for 5 nodes", dict(letters=4)),
        (ValueError, "letters: 200 give 200 names for 200 nodes", dict(letters=200, nodes=200)),
        (ValueError, "letters: 9 give 90 names for 90 nodes", dict(letters=9, nodes=90, word=(1, 2))),
        (ValueError, r"word must be \(fewest, most\).* got \(2, 1\)", dict(word=(2, 1))),
        (ValueError, "windows must divide 10", dict(windows=3)),
        (ValueError, "windows: 5 leave 2 tokens each; a query has up to 4", dict(windows=5)),
        (TypeError, "nodes must be an int.*; got 5.0", dict(nodes=5.0)),
        (TypeError, "word must be 2 ints; got 1", dict(word=1)),
        (TypeError, "hops must be an int.*; got True", dict(hops=True)),
    ],
)
def test_a_bad_task_is_refused(error, names, changes):
    with pytest.raises(error, match=names):
        replace(QUICK, **changes)


def test_a_bad_request_is_refused():
    with pytest.raises(ValueError, match="split must be 'train' or 'test'; got 'val'"):
        QUICK.batch(1, np.random.default_rng(0), split="val")
    with pytest.raises(ValueError, match="inputs must have shape"):
        QUICK.solve(torch.zeros(1, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="inputs must hold tokens 0 .. 21"):
        QUICK.solve(torch.full((1, QUICK.length), 22))
    with pytest.raises(TypeError, match="inputs must be an int64 tensor; got torch.float32"):
        QUICK.solve(torch.zeros(1, QUICK.length))
    inputs = draw(QUICK, 2).inputs
    for token in range(QUICK.vocab_size):
        with pytest.raises(ValueError, match="inputs: row 1 does not read"):
            QUICK.solve(torch.stack((inputs[0], torch.full_like(inputs[0], token))))


def test_numpy_integers_are_ints():
    settings = {k: np.array(v) if k == "word" else np.int64(v) for k, v in vars(QUICK).items()}
    task = sl.tasks.Depo(**settings | dict(word=tuple(settings["word"])))
    assert task == QUICK and all(type(x) is int for x in (*task.word, task.nodes, task.hops, task.fewest))
    assert torch.equal(draw(task, 3).inputs, draw(QUICK, 3).inputs)


def test_a_split_without_cycles_is_refused():
    """Three names on a ring make two cycles, none of which is held out."""
    task = sl.tasks.Depo(nodes=3, hops=2, letters=3, word=(1, 1), queries=1, windows=1)
    draw(task)
    with pytest.raises(ValueError, match="letters: 3 give 3 nodes so few cycles that split='test' is empty"):
        draw(task, split="test")
    with pytest.raises(ValueError, match="letters: 3"):
        task.chance()


def test_chance_of_a_large_ring_takes_seconds():
    began = time.process_time()
    for letters, word in ((50, (1, 2)), (1000, (1, 1))):
        chance = sl.tasks.Depo(nodes=970, letters=letters, word=word, fewest=970, windows=1).chance()
        assert chance["exact/1"] == pytest.approx(1 / 969) and time.process_time() - began < 30


def test_a_question_to_a_stream_read_in_part_is_refused():
    QUICK.check_asked(QUICK.context)
    QUICK.check_asked(QUICK.context + 2)  # a later question
    for position in (0, QUICK.window, QUICK.length):
        with pytest.raises(ValueError, match=f"position: {position} tokens were read"):
            QUICK.check_asked(position)


if __name__ == "__main__":
    GOLDEN.parent.mkdir(parents=True, exist_ok=True)
    GOLDEN.write_text(json.dumps(golden(), indent=1) + "\n")
