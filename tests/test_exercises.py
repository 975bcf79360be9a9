"""Exercises keep their promise: the solution passes its check, the stub fails, and so does a likely mistake.

The convention.  In a chapter's source an exercise is four code cells, told apart by a tag, in this order:

    exercise-stub      def NAME(...): what the reader fills in
    exercise-check     def check_NAME(answer): asserts; then report(check_NAME, NAME)
    exercise-solution  def NAME_solution(...): the same, done; then report(check_NAME, NAME_solution)
    exercise-mistake   def NAME_mistake(...): what one may well write; then report(check_NAME, NAME_mistake)

``report`` prints "right" or "not yet: ...", so that a notebook runs through with its stubs empty.
Solution and mistake lie in one gated directive, ``{solution-start}`` with the class ``dropdown``. What a
check needs is defined in cells tagged ``exercise-setup``: these alone are executed here.
"""

import ast
import functools
import re

import matplotlib
import nbformat
import pytest
import torch
from test_book import builder

matplotlib.use("Agg")

PARTS = ("stub", "check", "solution", "mistake")


def tagged(notebook, tag):
    return [c for c in notebook.cells if tag in c.metadata.get("tags", [])]


def exercises(notebook):
    """The exercises of a chapter: name -> {part: cell}."""
    found, group = {}, None
    for cell in notebook.cells:
        for part in PARTS:
            if f"exercise-{part}" not in cell.metadata.get("tags", []):
                continue
            if part == "stub":
                functions = [n.name for n in ast.parse(cell.source).body if isinstance(n, ast.FunctionDef)]
                group = found[functions[-1]] = {}
            assert group is not None and list(PARTS[: len(group)]) == list(group), "cells out of order"
            group[part] = cell
    return found


def verdict(name, group, namespace):
    """Raise AssertionError unless solution, stub and mistake fare as they should."""
    namespace = dict(namespace)
    for part in PARTS:
        exec(compile(group[part].source, f"{name} ({part})", "exec"), namespace)
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
def setup(source):
    """The namespace that a chapter's checks need."""
    namespace = {"__name__": "chapter"}
    for cell in tagged(builder.assemble(source), "exercise-setup"):
        exec(compile(cell.source, source.name, "exec"), namespace)
    return namespace


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
    verdict(name, exercises(builder.assemble(source))[name], setup(source))


@each_chapter
def test_every_exercise_is_whole(source):
    notebook = builder.assemble(source)
    for name, group in exercises(notebook).items():
        assert tuple(group) == PARTS, f"{name} has only {', '.join(group)}"
    text = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    count = len(exercises(notebook))
    labels = re.findall(r"\{exercise-start\}.*\n:label: ([\w-]+)", text)
    solved = re.findall(r"\{solution-start\} ([\w-]+)\n(?::label: .*\n)?:class: dropdown", text)
    hints = re.findall(r"\{admonition\} Hint\n:class: .*dropdown", text)
    assert len(labels) == len(hints) == count and labels == solved


@each_chapter
def test_the_page_shows_the_same_verdicts(source):
    notebook = nbformat.read(builder.target(source), as_version=4)
    for name, group in exercises(notebook).items():
        said = {part: "".join(o.get("text", "") for o in cell.outputs) for part, cell in group.items()}
        assert said["solution"] == "right\n", name
        assert said["check"].startswith("not yet: ") and said["mistake"].startswith("not yet: "), name


def tiny(check, stub="return 0", solution="return 1", mistake="return 2"):
    bodies = {
        "stub": ("one", stub),
        "solution": ("one_solution", solution),
        "mistake": ("one_mistake", mistake),
    }
    cells = {part: nbformat.v4.new_code_cell(f"def {n}(): {body}") for part, (n, body) in bodies.items()}
    cells["check"] = nbformat.v4.new_code_cell(f"def check_one(answer): {check}")
    return cells


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (tiny("assert answer() > -1"), "accepts the stub"),
        (tiny("assert answer() > 0"), "accepts the mistake"),
        (tiny("assert answer() == 1"), "does not say"),
        (tiny("assert answer() == 3, 'no'"), "no"),
    ],
    ids=["checks nothing", "misses the mistake", "is mute", "rejects the solution"],
)
def test_a_weak_check_is_caught(cells, message):
    with pytest.raises(AssertionError, match=message):
        verdict("one", cells, {})


def test_a_good_exercise_is_accepted():
    verdict("one", tiny("assert answer() == 1, 'no'"), {})
