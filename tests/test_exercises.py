"""Exercises keep their promise: the solution passes its check, the stub fails, and so does a likely mistake.

book/exercises.py says how an exercise is written.  ``report`` prints "right" or "not yet: ...", so that a
notebook runs through with its stubs empty.  In a chapter solution and mistake lie in one gated directive,
``{solution-start}`` with the class ``dropdown``.
"""

import functools
import re
import sys
from pathlib import Path

import matplotlib
import nbformat
import pytest
import torch
from test_book import builder

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "book"))
from exercises import Exercise, define, exercises, private_names, setup

matplotlib.use("Agg")


def verdict(exercise, namespace):
    """Raise AssertionError unless solution, stub and mistake fare as they should."""
    name, namespace = exercise.name, dict(namespace)
    for cell in (exercise.stub, exercise.check, exercise.solution, *exercise.cells["mistake"]):
        define(cell.source, namespace, name)
    check = namespace[f"check_{name}"]
    check(namespace[f"{name}_solution"])
    try:
        check(namespace[name])
    except Exception:
        pass
    else:
        raise AssertionError(f"{name}: the check accepts the stub")
    try:
        check(namespace[f"{name}_mistake"])
    except AssertionError as error:
        assert str(error), f"{name}: the check does not say what is wrong"
    else:
        raise AssertionError(f"{name}: the check accepts the mistake")


@functools.cache
def namespace_of(source):
    return setup(builder.assemble(source))


@pytest.fixture(autouse=True)
def threads():
    """One thread, as the chapters ask for; afterwards what was there before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


CASES = [
    pytest.param(source, name, id=f"{source.stem}-{name}")
    for source in builder.sources()
    for name in exercises(builder.assemble(source))
]
WITH_EXERCISES = sorted({case.values[0] for case in CASES})
each_chapter = pytest.mark.parametrize("source", WITH_EXERCISES, ids=lambda s: s.stem)


@pytest.mark.parametrize(("source", "name"), CASES)
def test_solution_passes_stub_and_mistake_fail(source, name):
    verdict(exercises(builder.assemble(source))[name], namespace_of(source))


@pytest.mark.parametrize(("source", "name"), CASES)
def test_a_check_uses_public_names_only(source, name):
    assert not private_names(exercises(builder.assemble(source))[name].check.source)


@each_chapter
def test_every_exercise_is_whole(source):
    notebook = builder.assemble(source)
    text = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    count = len(exercises(notebook))
    assert all(len(e.mistakes) == 1 and not e.hidden for e in exercises(notebook).values())
    labels = re.findall(r"\{exercise-start\}.*\n:label: ([\w-]+)", text)
    solved = re.findall(r"\{solution-start\} ([\w-]+)\n(?::label: .*\n)?:class: dropdown", text)
    hints = re.findall(r"\{admonition\} Hint\n:class: .*dropdown", text)
    assert len(labels) == len(hints) == count and labels == solved


@each_chapter
def test_the_page_shows_the_same_verdicts(source):
    notebook = nbformat.read(builder.target(source), as_version=4)
    for name, exercise in exercises(notebook).items():
        said = {
            part: "".join(o.get("text", "") for cell in cells for o in cell.outputs)
            for part, cells in exercise.cells.items()
        }
        assert said["solution"] == "right\n", name
        assert said["check"].startswith("not yet: ") and said["mistake"].startswith("not yet: "), name


def tiny(check, stub="return 0", solution="return 1", mistake="return 2"):
    bodies = {
        "stub": ("one", stub),
        "solution": ("one_solution", solution),
        "mistake": ("one_mistake", mistake),
    }
    made = Exercise("one")
    for part, (function, body) in bodies.items():
        made.cells[part] = [nbformat.v4.new_code_cell(f"def {function}(): {body}")]
    made.cells["check"] = [nbformat.v4.new_code_cell(f"def check_one(answer): {check}")]
    return made


@pytest.mark.parametrize(
    ("exercise", "message"),
    [
        (tiny("assert answer() > -1"), "accepts the stub"),
        (tiny("assert answer() > 0"), "accepts the mistake"),
        (tiny("assert answer() == 1"), "does not say"),
        (tiny("assert answer() == 3, 'no'"), "no"),
    ],
    ids=["checks nothing", "misses the mistake", "is mute", "rejects the solution"],
)
def test_a_weak_check_is_caught(exercise, message):
    with pytest.raises(AssertionError, match=message):
        verdict(exercise, {})


def test_a_good_exercise_is_accepted():
    verdict(tiny("assert answer() == 1, 'no'"), {})
