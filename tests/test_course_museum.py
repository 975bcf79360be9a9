"""The bug museum: its faults are the tests' mutants, and a judge earns nothing by luck or by crying wolf."""

import random
import sys
from pathlib import Path

import mutants
import pytest

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


def test_no_visit_leaves_a_trace(assignment):
    before = {name: getattr(*place) for name, place in enumerate(mutants.PLANTED)}
    visit(assignment, lambda draw: draw(5, 1, 1, 2))
    assert before == {name: getattr(*place) for name, place in enumerate(mutants.PLANTED)}
