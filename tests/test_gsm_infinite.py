"""GSM-Infinite: what is told, what is asked, who is held out.  Run as a script, it writes the golden file."""

import dataclasses
import hashlib
import json
import math
import re
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sleeplib as sl
from sleeplib.algorithm import awake_chunks
from sleeplib.tasks.gsm_infinite import chance, graph, language, problem, solver, task
from sleeplib.training import training_batch

GOLDEN = Path(__file__).resolve().parent.parent / "data" / "samples" / "gsm_infinite.json"
SMALL = sl.tasks.GSMInfinite(
    ops=(1, 3), tokens=(60, 96), places=(1, 3), kinds=(1, 3), noise=(3, 3), max_value=30, window=24
)
MIDDLE = sl.tasks.GSMInfinite(tokens=(180, 400), window=100)
TASKS = {
    "default": sl.tasks.GSMInfinite(),
    "small": SMALL,
    "solution": replace(MIDDLE, question_first=False, solution=True, window=1000),
}
CELLS = list(product(language.THEMES, task.MODES, task.LEVELS))


def draw(task, count=32, seed=0, split="train"):
    return task.batch(count, np.random.default_rng(seed), split=split)


def problems(task, count, seed=0, split="train"):
    rng = np.random.default_rng(seed)
    return [task.problem(rng, split=split) for _ in range(count)]


def words(task, row):
    return " ".join(task.vocab[i] for i in row)


def golden():
    """What a fixed seed draws: one problem in full, the first sequence of a batch, a hash of 32."""
    samples = []
    for (name, drawn), split in product(TASKS.items(), ("train", "test")):
        batch = draw(drawn, 32, seed=13, split=split)
        digest = hashlib.sha256(np.stack([t.numpy() for t in batch]).astype("<i8").tobytes())
        first = words(drawn, batch.inputs[0])
        sample = {"task": name, "split": split, "first": first if name != "default" else first[-400:]}
        sample["asked"] = words(drawn, batch.labels[0, batch.labels[0] >= 0])
        sample["sha256"] = digest.hexdigest()
        if name == "small":
            sample["problem"] = json.loads(json.dumps(dataclasses.asdict(problems(drawn, 1, 13, split)[0])))
        samples.append(sample)
    return samples


# What a text says, read with the solver's grammar


def read(text):
    """(asked, hidden, given numbers, formulas) of a text; formulas as {parameter: (number, parameters)}."""
    asked = hidden = None
    numbers, formulas = {}, {}
    for sentence in solver._sentences(text):
        subject, rest = solver._parameter(sentence[2:] if sentence[0] == "What" else sentence)
        if sentence[0] == "What":
            asked = subject
        elif rest[0] == "exists":
            hidden = subject
        elif len(rest) == 2:
            numbers[subject] = int(rest[1])
        else:
            formulas[subject] = solver._expression(rest[1:])[1:]
    return asked, hidden, numbers, formulas


def operations(text):
    """Edges below the query, counted in the text."""
    asked, hidden, numbers, formulas = read(text)
    told = {*numbers, *formulas, hidden} - {None}
    query = asked
    if hidden:
        twice = [p for p in numbers if p[0] == "total" or p in formulas or p == hidden]
        (query,) = twice
    seen, waiting, edges = set(), [query], 0
    while waiting:
        p = waiting.pop()
        if p in seen:
            continue
        seen.add(p)
        if p in formulas:
            number, needs = formulas[p]
            edges += len(needs) + (number is not None)
        elif p[0] == "total":
            needs = [q for q in told if q[0] == "count" and q[1] == p[1] and q[3] == p[2]]
            averages = [q for q in told if q[0] == "average" and q[1] == p[1] and q[3] == p[2]]
            needs += [n for q in averages for n in (q, ("count", f"{q[4]}s", q[2], q[3]))]
            edges += len(needs)
        else:
            needs = []
            edges += 1
        waiting += needs
    return edges


def answer(question, context):
    """What the solver says; None if it cannot."""
    try:
        return sl.tasks.solve_text(f"{question} {context}")
    except ValueError:
        return None


def check_solver_agrees():
    for theme, mode, level in CELLS:
        task = replace(MIDDLE, theme=theme, mode=mode, level=level)
        found = problems(task, 160, seed=1, split="test") + problems(task, 40)
        assert {p.ops for p in found} == set(range(1, 9))
        for p in found:
            assert (p.theme, p.mode, p.level) == (theme, mode, level)
            assert answer(p.question, p.context) == p.answer
            assert 0 <= p.answer <= 1000 and (mode == "forward" or 1 <= p.answer <= 4)


def check_distractors_can_be_deleted():
    for theme, mode, level in CELLS:
        found = problems(replace(MIDDLE, theme=theme, mode=mode, level=level), 100)
        assert sum(bool(p.distractors) for p in found) > 50
        for p in found:
            bare = p.without_distractors()
            assert len(bare) == len(p.context) - sum(len(d) + 1 for d in p.distractors)
            assert answer(p.question, bare) == p.answer
            assert operations(f"{p.question} {bare}") == p.ops
            names = language.THEMES[theme]
            for name in (*names.noise_places, *names.noise_kinds):
                assert not re.search(rf"\b{name}\b", bare)


def check_operations_are_counted():
    for mode, level in product(task.MODES, task.LEVELS):
        for p in problems(replace(MIDDLE, mode=mode, level=level), 200):
            assert operations(f"{p.question} {p.context}") == p.ops


def check_operations_are_even():
    count = 1600
    for settled, ops in ((MIDDLE, range(1, 9)), (SMALL, range(1, 4))):
        drawn = [p.ops for p in problems(settled, count)]
        wanted = count / len(ops)
        square = sum((drawn.count(n) - wanted) ** 2 / wanted for n in ops)
        assert square < {7: 24.3, 2: 13.8}[len(ops) - 1]  # one draw in a thousand is worse
    groups = draw(SMALL, 120).groups.amax(dim=1)
    assert groups.bincount().tolist() == [0, 40, 40, 40]


def check_no_problem_of_one_split_is_in_the_other():
    task = replace(SMALL, places=(1, 2), kinds=(1, 2), level="medium", theme="harbor")
    seen = {}
    for split in ("train", "test"):
        found = problems(task, 1000, split=split)
        seen[split] = {(p.question, *sorted(p.without_distractors().split(". "))) for p in found}
    assert not seen["train"] & seen["test"] and min(map(len, seen.values())) > 100


def check_golden():
    assert golden() == json.loads(GOLDEN.read_text())


CHECKS = {name: f for name, f in list(globals().items()) if name.startswith("check_")}


@pytest.mark.parametrize("name", CHECKS)
def test_truth(name):
    CHECKS[name]()


# Planted faults, each with the check that must catch it


def plant(target, name, fault):
    @contextmanager
    def context():
        honest = getattr(target, name)
        with patch.object(target, name, lambda *args, **options: fault(honest, *args, **options)):
            yield

    return context


def a_distractor_in_a_core_place(honest, draw, task, bare, **options):
    texts, size = honest(draw, task, bare, **options)
    names = language.THEMES[bare.theme]
    place = bare.core.query.place
    return [*texts, f"The number of {names.noise_kinds[0]} {names.thing}s in {place} equals 3."], size


def a_core_number_from_a_distractor(honest, draw, task, bare, **options):
    texts, size = honest(draw, task, bare, **options)
    name = re.match("T(.*) equals", texts[0])[1] if texts else ""
    constants = [i for i, text in enumerate(bare.sentences) if re.search(r"equals \d+\.$", text)]
    if name and constants:
        i = constants[0]
        value = re.search(r"\d+", bare.sentences[i])[0]
        bare.sentences[i] = re.sub(r"\d+", f"t{name}", bare.sentences[i])
        texts[0] = f"T{name} equals {value}."
    return texts, size


MUTANTS = {
    "a_distractor_counts_in_a_total": (
        plant(problem, "add_distractors", a_distractor_in_a_core_place),
        "check_solver_agrees",
    ),
    "a_core_number_hangs_on_a_distractor": (
        plant(problem, "add_distractors", a_core_number_from_a_distractor),
        "check_distractors_can_be_deleted",
    ),
    "twice_is_three_times": (
        plant(
            graph,
            "evaluate",
            lambda honest, f, v: honest(f, v) + (v[f.needs[0]] if f[:2] == ("times", 2) else 0),
        ),
        "check_solver_agrees",
    ),
    "a_constant_costs_nothing": (
        plant(graph, "degree", lambda honest, f: max(1, len(f.needs))),
        "check_operations_are_counted",
    ),
    "failed_draws_change_the_op_count": (
        plant(
            task,
            "draw_until",
            lambda honest, *args, ops, **cell: honest(*args, ops=max(2, ops), **cell),
        ),
        "check_operations_are_even",
    ),
    "holds_nothing_out": (
        plant(
            problem,
            "draw_bare",
            lambda honest, draw, task, split, **cell: honest(draw, task, None, **cell),
        ),
        "check_no_problem_of_one_split_is_in_the_other",
    ),
    "draws_other_structures": (
        plant(graph, "draw_structure", lambda honest, *args: dict(reversed(honest(*args).items()))),
        "check_golden",
    ),
}


@pytest.mark.parametrize("fault", MUTANTS)
def test_the_truth_catches_its_mutant(fault):
    context, name = MUTANTS[fault]
    with context(), pytest.raises(AssertionError):
        CHECKS[name]()


def test_every_truth_has_a_mutant():
    assert {name for _, name in MUTANTS.values()} == set(CHECKS)


# Sequences


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data(), seed=st.integers(0, 999), split=st.sampled_from(("train", "test")))
def test_a_sequence_is_as_long_as_asked_and_can_be_answered(data, seed, split):
    low = data.draw(st.integers(1, 5))
    short = data.draw(st.integers(170, 400))
    task = sl.tasks.GSMInfinite(
        ops=(low, data.draw(st.integers(low, 7))),
        tokens=(short, short + data.draw(st.integers(40, 200))),
        theme=data.draw(st.sampled_from((None, *language.THEMES))),
        mode=data.draw(st.sampled_from((None, "forward", "reverse"))),
        level=data.draw(st.sampled_from((None, "medium", "hard"))),
        question_first=data.draw(st.booleans()),
        window=1000,
        solution=data.draw(st.booleans()),
        places=(1, data.draw(st.integers(3, 6))),
        kinds=(1, data.draw(st.integers(3, 6))),
        max_value=data.draw(st.integers(40, 1000)),
    )
    batch = draw(task, 6, seed, split)
    assert batch.inputs.shape == batch.labels.shape == batch.groups.shape == (6, task.length)
    assert torch.equal(task.solve(batch.inputs), batch.labels)
    first, pad = task.tokens[1], task.vocab.index("<pad>")
    sizes = (batch.inputs[:, :first] != pad).sum(dim=1)
    assert (sizes >= task.tokens[0]).all() and (sizes <= first).all()
    assert (batch.labels[:, :first] == -100).all() and (batch.labels[:, first] >= 0).all()
    for row, labels, groups in zip(*batch):
        text = words(task, row[:first]).replace("<pad> ", "")
        assert text.startswith("What is") == task.question_first != text.endswith("?")
        assert max(map(int, re.findall(r"\d+", text))) <= task.max_value
        asked = labels >= 0
        assert operations(text) == groups[asked].unique().item()
        assert groups[~asked].unique().item() == ("exists" in text)
        shown = row[first : first + int(asked.sum())]
        assert torch.equal(shown[1:], labels[asked][:-1])  # teacher forcing
        assert (row[first + len(shown) :] == pad).all()
    awake = awake_chunks(batch.labels, task.window)
    assert not any(awake[:-1]) and awake[-1]


def test_the_worked_example():
    told = (
        "The number of spotted boats in Jettymoor equals 2 more than the number of red boats in Brinemouth.",
        "The number of red boats in Brinemouth equals 3.",
    )
    asked = "What is the total number of boats in Brinemouth?"
    p = sl.tasks.Problem(" ".join(told), asked, 3, "", 2, "forward", "medium", "harbor", told[:1])
    assert solver.solve_text(f"{asked} {told[0]} {told[1]}") == 3 and operations(f"{asked} {told[1]}") == 2
    task = sl.tasks.GSMInfinite(ops=(2, 2), tokens=(30, 40), window=10, theme="harbor")
    with patch.object(type(task), "_draw", lambda *args: p):
        inputs, labels, groups = task.batch(1, np.random.default_rng(0))
    row = words(task, inputs[0]).split()
    assert row[0] == "<pad>" and row[1] == "What" and row[10] == "?" and row[11] == "The" and row[29] == "."
    assert row[30] == "The" and row[39] == "." and row[40:] == ["<answer>"]
    assert words(task, labels[0, 40:]) == "3" and (labels[0, :40] == -100).all() and groups[0, 40] == 2
    assert awake_chunks(labels, task.window) == (False, False, False, False, True)
    text = " ".join((task.__doc__ or "").split())
    assert "1 .. 10 What is the total number of boats in Brinemouth ?" in text


@pytest.mark.parametrize("mode, level", list(product(task.MODES, task.LEVELS)))
def test_the_solution_is_right_line_by_line(mode, level):
    for p in problems(replace(MIDDLE, mode=mode, level=level), 60):
        *lines, last = p.solution.removesuffix(".").split(". ")
        assert last.endswith(f"= {p.answer}")
        if mode == "reverse":
            given, x = re.fullmatch(r"(.* = \d+), so x = (\d)", last).groups()
            assert int(x) == p.answer
            lines.append(given)
        else:
            lines.append(last)
        for line in lines:
            sides = [side for side in line.split(" = ") if not side.startswith("The")]
            for x in (p.answer,):
                written = [re.sub(r"(\d+) x", r"\1 * x", side) for side in sides]
                assert len({eval(side, {"x": x}) for side in written}) == 1, line


def test_all_numbers_of_a_forward_problem_are_in_range():
    for p in problems(replace(MIDDLE, mode="forward", max_value=60), 100):
        _, _, numbers, _ = read(f"{p.question} {p.context}")
        defined = {}
        for sentence in solver._sentences(p.context):
            subject, rest = solver._parameter(sentence)
            if len(rest) > 2:
                defined[subject] = solver._expression(rest[1:])
        facts = solver._Facts(None, numbers, defined)
        assert all(0 <= facts.value(s)[0] <= 60 for s in (*numbers, *defined))


def test_the_same_seed_draws_the_same():
    for a, b in zip(draw(SMALL), draw(SMALL)):
        assert torch.equal(a, b)
    assert not torch.equal(draw(SMALL)[0], draw(SMALL, seed=1)[0])
    assert problems(MIDDLE, 3) == problems(MIDDLE, 3) != problems(MIDDLE, 3, seed=1)


def test_the_answers_cannot_be_seen():
    task = TASKS["solution"]
    batch = draw(task, 8)
    last = (batch.inputs == task.vocab.index("<answer>")).nonzero()
    assert (batch.inputs[last[:, 0], last[:, 1] + 1] == 0).all()
    batch = draw(SMALL, 8)
    assert SMALL.vocab[batch.inputs[0, -1]] == "<answer>" and SMALL.length == 97


def test_streams_are_the_trainers_batches_for_any_number_of_workers():
    train = sl.experiments.TrainConfig(steps=4, batch=8)
    for workers in (0, 2):
        batches = sl.tasks.stream(SMALL, 8, [5, 0], start=1, workers=workers)
        for step in range(1, 5):
            for a, b in zip(next(batches), training_batch(SMALL, train, 5, step), strict=True):
                assert torch.equal(a, b)
    with pytest.raises(ValueError, match="workers must be an int of at least 0; got -1"):
        sl.tasks.stream(SMALL, 8, 0, workers=-1)


def test_a_model_trains_on_it(tmp_path):
    task = replace(SMALL, theme="harbor", level="medium")
    model = sl.ModelConfig(vocab_size=task.vocab_size, d_model=16, pattern="ag", num_heads=2, mlp_size=16)
    train = sl.experiments.TrainConfig(steps=2, batch=12, eval_every=1, eval_batch=12)
    trainer = sl.Trainer(sl.experiments.Experiment("x", task, model, train), 2, 0, "cpu")
    assert trainer.run(progress=False) == "done"
    assert set(trainer.curve[-1]["metrics"]) == set(task.chance())


def test_settings_are_plain_data():
    task = replace(SMALL, ops=[1, 2])  # as a run record has it
    assert task.ops == (1, 2)
    model = sl.ModelConfig(vocab_size=task.vocab_size, d_model=16, num_heads=2)
    experiment = sl.experiments.Experiment("x", task, model, sl.experiments.TrainConfig(steps=1, batch=1))
    kept = experiment.config()["task"]
    assert kept.pop("kind") == "gsm_infinite" and sl.tasks.GSMInfinite(**json.loads(json.dumps(kept))) == task
    changed = experiment.replace({"task.ops": "[1, 3]", "task.theme": '"harbor"', "task.window": "12"}).task
    assert (changed.ops, changed.theme, changed.window) == ((1, 3), "harbor", 12)


# Words


def test_names_are_in_one_pool_of_one_theme():
    pools = [
        pool
        for theme in language.THEMES.values()
        for pool in (theme.places, theme.kinds, theme.noise_places, theme.noise_kinds)
    ]
    names = [name for pool in pools for name in pool]
    assert len(names) == len(set(names)) and {len(pool) for pool in pools} == {8, 24}


def test_the_vocabulary_holds_what_the_settings_can_produce_and_no_more():
    task = replace(SMALL, theme="orchard", level="hard", mode="forward", max_value=8)
    task = replace(task, ops=(1, 5), tokens=(120, 180))
    assert task.vocab_size == len(set(task.vocab)) < 70
    seen = draw(task, 1500).inputs.unique().tolist() + draw(task, 1500).labels.unique().tolist()
    assert {task.vocab[i] for i in seen if i >= 0} == set(task.vocab)
    for less in (dict(theme="harbor"), dict(level="medium"), dict(mode="forward"), dict(max_value=20)):
        assert replace(MIDDLE, **less).vocab_size < MIDDLE.vocab_size
    assert "sailors" not in replace(MIDDLE, theme="harbor", level="medium").vocab


# Scores


def test_score_and_chance_have_the_same_keys_and_mean_what_they_say():
    batch = draw(SMALL, 60, split="test")
    logits = torch.zeros(*batch.inputs.shape, SMALL.vocab_size)
    asked = batch.labels >= 0
    logits[asked, batch.labels[asked]] = 50.0
    result = SMALL.score(logits, batch)
    assert set(result) == set(SMALL.chance()) and {"exact/2", "exact/reverse-3", "loss/forward-1"} <= set(
        result
    )
    for key, value in result.items():
        assert value == pytest.approx(0 if key.startswith("loss") else 1)
    reverse = batch.groups[:, 0] == 1
    hard = batch.groups[:, -1] == 3
    logits[reverse & hard] *= -1
    result = SMALL.score(logits, batch)
    assert result["exact/reverse-3"] == 0 and result["exact/forward-3"] == 1 == result["exact/reverse-2"]
    assert result["exact/3"] == pytest.approx(0.5) and result["exact"] == pytest.approx(5 / 6)
    with pytest.raises(ValueError, match="logits"):
        SMALL.score(logits[:, :-1], batch)


def test_chance_is_the_best_answer_that_knows_mode_and_op_count():
    chances = SMALL.chance()
    batch = draw(SMALL, 3000, seed=3, split="test")
    means = []
    for mode, ops in product((0, 1), (1, 2, 3)):
        chosen = (batch.groups[:, 0] == mode) & (batch.groups[:, -1] == ops)
        share = batch.labels[chosen, -1].bincount().double() / chosen.sum()
        means.append(share.max().item())
        name = f"{task.MODES[mode]}-{ops}"
        assert chances[f"exact/{name}"] == pytest.approx(means[-1], abs=0.1)
        p = share[share > 0]
        assert chances[f"loss/{name}"] == pytest.approx(-(p * p.log()).sum().item(), abs=0.2)
    assert chances["exact"] == chances["token"] == pytest.approx(np.mean(means), abs=0.05)
    assert chances["exact/2"] == pytest.approx(np.mean([chances[f"exact/{m}-2"] for m in task.MODES]))
    steps = replace(SMALL, solution=True, window=400)
    with patch.object(chance, "SAMPLE", 20):
        chances = steps.chance()
    batch = draw(steps, 30, split="test")
    found = steps.score(torch.zeros(*batch.inputs.shape, steps.vocab_size), batch)
    assert set(found) == set(chances)
    assert chances["exact"] == 0 < chances["token"] < 0.3 and math.isfinite(chances["loss"])


# Other tokenizers


@pytest.fixture(scope="module")
def pieces():
    """A tiny byte-pair tokenizer, trained on problems of one theme."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=600, show_progress=False, initial_alphabet=alphabet)
    found = problems(replace(MIDDLE, theme="harbor"), 50)
    tokenizer.train_from_iterator([f"{p.question} {p.context}" for p in found], trainer)
    return tokenizer


@pytest.mark.parametrize("solution", [False, True])
def test_any_tokenizer_counts_and_writes(pieces, solution):
    task = replace(MIDDLE, solution=solution, window=2000)
    rng = np.random.default_rng(0)
    for _ in range(10):
        p = task.problem(rng, tokenizer=pieces)
        assert 180 <= len(pieces.encode(f"{p.question} {p.context}").ids) <= 400
        assert answer(p.question, p.context) == p.answer
    batch = task.batch(12, rng, tokenizer=pieces)
    for row, labels, groups in zip(*batch):
        asked = labels >= 0
        text = pieces.decode(row[:400].tolist())
        text = text[text.index("What") :]
        said = pieces.decode(labels[asked].tolist())
        assert sl.tasks.solve_text(text) == int(re.search(r"(\d+)$", said)[1])
        assert solution == ("Answer:" in said) and operations(text) == groups[asked].unique().item()
        start = int(asked.nonzero()[0])
        cue = " Solution:" if solution else " Answer:"
        assert pieces.decode(row[400 : start + 1].tolist()) == cue
        assert torch.equal(row[start + 1 : start + int(asked.sum())], labels[asked][:-1])
    awake_chunks(batch.labels, task.window)


def test_callables_and_dictionaries_will_do():
    def by_letters(text):
        return {"input_ids": [ord(letter) for letter in text]}

    task = replace(MIDDLE, ops=(1, 2), tokens=(700, 1000))
    p = task.problem(np.random.default_rng(0), tokenizer=by_letters)
    assert 700 <= len(f"{p.question} {p.context}") <= 1000
    prompt, cue, targets = task.encode(p, by_letters)
    assert "".join(map(chr, prompt)) == f"{p.question} {p.context}"
    assert "".join(map(chr, cue + targets)) == f" Answer: {p.answer}"


@pytest.mark.parametrize(
    "error, match, tokenizer",
    [
        (TypeError, "tokenizer must have encode.* got int", 3),
        (TypeError, "tokenizer must encode text into a list of int; it returned", str.split),
        (TypeError, "tokenizer must encode text into a list of int; it raised", lambda text: len(text)),
        (
            ValueError,
            "tokenizer must tell names and numbers apart; '1' and '2'",
            lambda text: [0] * len(text),
        ),
        (ValueError, "tokens=.180, 400. is too short", lambda text: [ord(c) for c in text for _ in range(5)]),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(error, match, tokenizer):
    for use in (MIDDLE.problem, lambda rng, **options: MIDDLE.batch(2, rng, **options)):
        with pytest.raises(error, match=match):
            use(np.random.default_rng(0), tokenizer=tokenizer)


# What is refused


@pytest.mark.parametrize(
    "error, match, changes",
    [
        (ValueError, r"ops must lie in 1 .. 30, the smaller first; got \(4, 2\)", dict(ops=(4, 2))),
        (ValueError, "ops must lie", dict(ops=(0, 2))),
        (TypeError, "ops must be 2 ints; got 3", dict(ops=3)),
        (TypeError, "ops must be an int; got True", dict(ops=(True, 2))),
        (TypeError, "tokens must be an int; got 20.0", dict(tokens=(10, 20.0))),
        (ValueError, "theme must be None or one of harbor, orchard, library; got 'zoo'", dict(theme="zoo")),
        (ValueError, "mode must be None or one of forward, reverse; got 'back'", dict(mode="back")),
        (ValueError, "level must be None or one of medium, hard; got 3", dict(level=3)),
        (TypeError, "question_first must be True or False; got 1", dict(question_first=1)),
        (TypeError, "window must be an int.*; got None", dict(window=None)),
        (ValueError, "window must be an int in", dict(window=0)),
        (ValueError, "places must lie in 1 .. 8", dict(places=(1, 9))),
        (ValueError, "noise must lie in 0 .. 24; got", dict(noise=(1, 25))),
        (ValueError, "max_value must be an int in 4 .. 1000; got 3", dict(max_value=3)),
        (ValueError, "window=24 cuts the solution", dict(solution=True)),
        (ValueError, r"tokens=\(30, 44\) is too short for a problem of \d operations", dict(tokens=(30, 44))),
        (
            ValueError,
            r"tokens=\(900, 990\) is too long for the names of noise=\(3, 3\)",
            dict(tokens=(900, 990)),
        ),
        (ValueError, r"tokens=\(400, 420\) .*noise=\(0, 0\)", dict(tokens=(400, 420), noise=(0, 0))),
        (
            ValueError,
            "ops: 3 operations do not fit .* places=.1, 1., kinds=.1, 1.",
            dict(ops=(1, 9), places=(1, 1), kinds=(1, 1), mode="forward"),
        ),
    ],
)
def test_a_bad_task_is_refused(error, match, changes):
    with pytest.raises(error, match=match):
        replace(SMALL, **changes)


def test_a_bad_request_is_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="count must be .* got 0"):
        SMALL.batch(0, rng)
    with pytest.raises(TypeError, match="rng must be a numpy Generator; got int"):
        SMALL.problem(1)
    with pytest.raises(ValueError, match="split must be 'train' or 'test'; got 'val'"):
        SMALL.problem(rng, split="val")
    with pytest.raises(ValueError, match=r"inputs must have shape \(B, 97\)"):
        SMALL.solve(torch.zeros(1, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="inputs must hold tokens"):
        SMALL.solve(torch.full((1, 97), SMALL.vocab_size))
    with pytest.raises(ValueError, match="inputs must show <answer> at position 96"):
        SMALL.solve(torch.zeros(1, 97, dtype=torch.int64))
    tiny = sl.tasks.GSMInfinite(
        ops=(1, 1),
        tokens=(21, 60),
        places=(1, 1),
        kinds=(1, 1),
        theme="library",
        level="medium",
        mode="reverse",
    )
    with pytest.raises(ValueError, match="split='test' is empty: places"):
        tiny.problem(rng, split="test")


@pytest.mark.parametrize(
    "match, text",
    [
        ("asks no question", "The number of red boats in Corvane equals 3."),
        ("nothing says what", "What is the number of red boats in Corvane?"),
        ("nothing says how many boats", "What is the total number of boats in Corvane?"),
        ("cannot read", "What is the number of red boats in Corvane? Boats are red."),
        ("cannot read 'the number", "What is the number of red boats on Corvane?"),
        ("ends inside a sentence", "What is the number of red boats in Corvane? The number of"),
        (
            "depends on itself",
            "What is the number of red boats in Corvane? The number of red boats in Corvane equals "
            "2 times the number of red boats in Corvane.",
        ),
        (
            "0 values are given",
            "What is the number of red boats in Corvane? "
            "The number of red boats in Corvane exists and is greater than 0.",
        ),
    ],
)
def test_a_text_that_cannot_be_answered_is_refused(match, text):
    with pytest.raises(ValueError, match=f"text: .*{match}"):
        sl.tasks.solve_text(text)


if __name__ == "__main__":
    GOLDEN.parent.mkdir(parents=True, exist_ok=True)
    GOLDEN.write_text(json.dumps(golden(), indent=1) + "\n")
