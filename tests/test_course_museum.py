"""The bug museum: its faults are the tests' mutants, and a judge earns nothing by luck or by crying wolf."""

import random
import sys
from pathlib import Path

import mutants
import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "course"))
import masters
import museum


@pytest.fixture(scope="module")
def assignment():
    return masters.read(masters.COURSE / "src" / "a7_museum.md")


def visit(assignment, judge, seed=0):
    return museum.visit(judge, "data", assignment.setup["implementation"], seed)


def test_every_fault_is_a_mutant_and_has_one_check(assignment):
    faults = [fault for room in museum.ROOMS.values() for fault in room]
    assert len(faults) == len(set(faults)) and set(faults) <= set(mutants.MUTANTS)
    for room, names in museum.ROOMS.items():
        exercise = assignment.exercises[f"judge_{room}"]
        assert [check.name for check in exercise.hidden] == [f"hidden_judge_{room}_{n}" for n in names]
    text = "\n".join(cell.source for cell in assignment.notebook.cells)
    assert f"planted {len(faults)} faults" in text and "right code eight times, and each fault" in text
    shown = []
    visit(assignment, shown.append)
    assert len(shown) == 8 + 2 * len(museum.ROOMS["data"])


def test_who_objects_to_everything_finds_nothing(assignment):
    def cries_wolf(draw):
        raise AssertionError("wolf")

    def breaks(draw):
        raise KeyError("draw")

    def sleeps(draw):
        return None

    for judge, words in ((cries_wolf, "objects to right"), (breaks, "breaks on"), (sleeps, "lets this")):
        assert all(words in said for said in visit(assignment, judge).values())


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_who_objects_at_random_finds_next_to_nothing(assignment, share):
    draw = random.Random(1)

    def judge(draw_data):
        assert draw.random() > share

    found = [said for seed in range(30) for said in visit(assignment, judge, seed).values()]
    assert sum(said is None for said in found) <= 1  # of 60; 0.4 are expected at the best share


# Judges that object to nothing: they ask what their room allows, up to its edges.

R = torch.Generator().manual_seed(1)


def draw(*shape):
    return torch.randn(*shape, generator=R, dtype=torch.float64)


def tokens(*shape):
    return torch.randint(6, shape, generator=R)


def memory(size=1):
    return [None, size * draw(2, 2, 4, 8), None, size * draw(2, 2, 4, 8)]


def asks_rule(rule, rule_gradient):
    for T in (1, 2, 7):
        q, k, v, S = draw(2, T, 2, 3), draw(2, T, 2, 3), draw(2, T, 2, 4), draw(2, 2, 3, 4)
        k, beta = F.normalize(k, dim=-1), draw(2, T, 2).sigmoid()
        for g in (torch.zeros(2, T, 2).double(), -draw(2, T, 2).abs()):
            rule(q, k, v, g, beta, S)
            rule_gradient(q, k, v, g, beta, S, draw(2, T, 2, 4), draw(2, 2, 3, 4))


def asks_nap(block, loop, nap, nap_gradient):
    for passes in (1, 2, 3):
        for size in (0, 1):
            nap(draw(2, 5, 16), memory(size), passes)
            nap_gradient(draw(2, 5, 16), memory(size), passes, memory())


def asks_eviction(answer_from, nap, ask, ask_gradient, ask_keys):
    nap(draw(2, 5, 16), memory(0), 1)
    for t in (1, 5, 6):
        for eviction in ("hard", "sliding"):
            h, question = draw(2, 5, 16), tokens(2, t)
            ask(h, question, eviction)
            ask_gradient(h, question, eviction, draw(2, t, 6))
            ask_keys(h, question, eviction)


def asks_algorithm(embed, one_pass, readout, algorithm_1):
    for T, asked in ((1, [0]), (5, [4]), (11, [4, 10]), (13, range(13)), (15, [4])):
        for passes in (1, 3):
            labels = torch.full((2, T), -100)
            labels[:, list(asked)] = tokens(2, len(asked))
            algorithm_1(tokens(2, T), labels, passes, memory())
    labels = torch.full((2, 15), -100)
    labels[0, 9] = labels[1, 7] = 3  # rows agree about windows, not about tokens
    algorithm_1(tokens(2, 15), labels, 2)


def asks_stream(embed, one_pass, readout, stream):
    for passes in (1, 3):
        for eviction in ("hard", "sliding"):
            for sizes in ([1] * 6, [5, 7], [3, 4]):
                stream([tokens(2, t) for t in sizes], passes, eviction)


def asks_data(draw):
    for width in (3, 7, 63):
        for steps in (0, 1, 5):
            draw(width, 2, steps, 3)


@pytest.mark.parametrize("room", museum.ROOMS)
def test_no_fault_raises_by_itself_or_leaves_a_trace(assignment, room, monkeypatch):
    """Whoever asks gets an answer, right or wrong: an error would be taken for the judge's own."""
    monkeypatch.setattr(museum, "TIMES", 1)
    before = [getattr(*place) for place in mutants.PLANTED]
    asks = globals()[f"asks_{room}"]
    found = museum.visit(asks, room, assignment.setup["implementation"], 0)
    assert found == dict.fromkeys(museum.ROOMS[room], "it lets this fault through")
    assert before == [getattr(*place) for place in mutants.PLANTED]
