"""The one parser of exercises: for the book's chapters, the handouts of the course, and the graders.

An exercise is a series of code cells, told apart by their tags, in this order:

    exercise-stub      def NAME(...): what the reader fills in
    exercise-check     def check_NAME(answer): asserts that the reader sees; then report(check_NAME, NAME)
    exercise-hidden    def hidden_NAME_ASPECT(answer, rng): asserts on hidden inputs (none, one or several)
    exercise-solution  def NAME_solution(...): the function, filled in
    exercise-mistake   def NAME_mistake...(...): what one might well write instead (one or several)

What checks need is defined in cells tagged ``exercise-setup``: no other cells are executed for them.  Hidden
checks, and the write-ups at the end of this file, occur in ``course/src`` only; course/README.md says how.
"""

import ast
import hashlib
from dataclasses import dataclass, field

import numpy as np

PARTS = ("stub", "check", "hidden", "solution", "mistake")
REPEATED = ("hidden", "mistake")


@dataclass
class Exercise:
    """The cells of one exercise; `stub`, `check` and `solution` are cells, `hidden` and `mistakes` lists."""

    name: str
    cells: dict = field(default_factory=lambda: {part: [] for part in PARTS})

    stub = property(lambda self: self.cells["stub"][0])
    check = property(lambda self: self.cells["check"][0])
    solution = property(lambda self: self.cells["solution"][0])
    hidden = property(lambda self: [Hidden.read(cell, self.name) for cell in self.cells["hidden"]])
    mistakes = property(lambda self: [Mistake.read(cell, self.name) for cell in self.cells["mistake"]])
    points = property(lambda self: sum(check.points for check in self.hidden))


@dataclass(frozen=True)
class Hidden:
    """A check on hidden inputs: the function's `name`, its docstring's first line, and its `points`."""

    name: str
    title: str
    points: int
    source: str

    @classmethod
    def read(cls, cell, exercise):
        function = last_function(cell)
        if not function.name.startswith(f"hidden_{exercise}_"):
            raise ValueError(f"{function.name}: wants the name hidden_{exercise}_ASPECT")
        title = (ast.get_docstring(function) or "").partition("\n")[0]
        points = cell.metadata.get("points")
        if not title or type(points) is not int or points < 1:
            raise ValueError(f"{function.name}: needs a docstring and :points:, a whole number from 1 on")
        return cls(function.name, title, points, cell.source)


@dataclass(frozen=True)
class Mistake:
    """A wrong answer: the function's `name`, and the names of the hidden checks it `loses`."""

    name: str
    loses: tuple
    source: str

    @classmethod
    def read(cls, cell, exercise):
        name = last_function(cell).name
        if not name.startswith(f"{exercise}_mistake"):
            raise ValueError(f"{name}: a mistake of {exercise} is named {exercise}_mistake...")
        return cls(name, tuple(cell.metadata.get("loses", ())), cell.source)


def tags(cell):
    return cell.metadata.get("tags", [])


def tagged(notebook, tag):
    """The cells that carry `tag`, in order."""
    return [cell for cell in notebook.cells if tag in tags(cell)]


def last_function(cell):
    """The last function that a cell defines."""
    return [node for node in ast.parse(cell.source).body if isinstance(node, ast.FunctionDef)][-1]


def exercises(notebook):
    """The exercises of a notebook: name -> Exercise.  A ValueError if cells are missing or out of order."""
    found, last = {}, None
    for cell in notebook.cells:
        part = next((part for part in PARTS if f"exercise-{part}" in tags(cell)), None)
        if part is None:
            continue
        if part == "stub":
            last = Exercise(last_function(cell).name)
            if last.name in found:
                raise ValueError(f"{last.name}: there are two exercises of this name")
            found[last.name] = last
        later = PARTS[PARTS.index(part) + (part in REPEATED) :]
        if last is None or any(last.cells[other] for other in later):
            raise ValueError(f"exercise-{part} after {last and last.name}: cells out of order")
        last.cells[part].append(cell)
    for exercise in found.values():
        missing = [part for part in PARTS if part != "hidden" and not exercise.cells[part]]
        if missing:
            raise ValueError(f"{exercise.name}: there is no exercise-{', exercise-'.join(missing)}")
    return found


def define(source, namespace, place):
    """Execute the text of one cell in `namespace`."""
    exec(compile(source, place, "exec"), namespace)


def setup(notebook, place="chapter"):
    """Make a namespace with what the checks of a notebook need."""
    namespace = {"__name__": place}
    for cell in tagged(notebook, "exercise-setup"):
        define(cell.source, namespace, place)
    return namespace


def generator(seed, name):
    """The random numbers of one hidden check: the same for everybody, unknown without the seed."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest))


def judge(exercise, answer, namespace, seed):
    """Put `answer` to every hidden check of an exercise, in the setup's `namespace`.

    Returns name of the check -> None if it passed, else what was wrong.  `answer` is the function itself or
    stands for one that runs elsewhere; the checks cannot tell.
    """
    verdicts, namespace = {}, dict(namespace)
    for check in exercise.hidden:
        define(check.source, namespace, check.name)
        try:
            namespace[check.name](answer, generator(seed, check.name))
        except Exception as error:
            verdicts[check.name] = str(error) or type(error).__name__
        else:
            verdicts[check.name] = None
    return verdicts


# Write-ups: Markdown cells whose metadata stand in a line above: +++ {"tags": [...], "label": ..., ...}


@dataclass(frozen=True)
class WriteUp:
    """A question that a person marks: the prompt, its points, the rubric, and graded sample answers."""

    label: str
    points: int
    prompt: str
    rubric: str
    exemplars: tuple  # of (points, text)


def write_ups(notebook):
    """The write-ups of a notebook: label -> WriteUp.  A ValueError if one is incomplete."""
    kinds = ("prompt", "rubric", "exemplar")
    found = {}
    for cell in notebook.cells:
        kind = next((kind for kind in kinds if f"writeup-{kind}" in tags(cell)), None)
        if kind:
            label = cell.metadata.get("label")
            if kind != "rubric" and type(cell.metadata.get("points")) is not int:
                raise ValueError(f"writeup-{kind} of {label}: points is no whole number")
            found.setdefault(label, {kind: [] for kind in kinds})[kind].append(cell)
    result = {}
    for label, cells in found.items():
        counts = [len(cells[kind]) for kind in kinds]
        if label is None or counts != [1, 1, 2]:
            raise ValueError(f"write-up {label}: one prompt, one rubric, two exemplars; not {counts}")
        prompt, rubric = cells["prompt"][0], cells["rubric"][0]
        exemplars = tuple((cell.metadata.points, cell.source) for cell in cells["exemplar"])
        points = prompt.metadata.points
        if not all(0 <= given <= points for given, _ in exemplars):
            raise ValueError(f"write-up {label}: an exemplar has more than {points} points")
        result[label] = WriteUp(label, points, prompt.source, rubric.source, exemplars)
    return result


# What a student may see

PUBLIC = ("exercise-setup", "exercise-stub", "exercise-check", "writeup-prompt", "writeup-rubric")
PRIVATE = ("exercise-hidden", "exercise-solution", "exercise-mistake", "writeup-exemplar", "instructor")


def public_cells(notebook):
    """The cells for students.  A ValueError at a cell that may be public or private.

    Text right after a private cell usually explains that cell, so it must say what it is: by the tag
    ``instructor``, by any public tag, or by a heading as its first line.
    """
    shown, after_private = [], False
    for cell in notebook.cells:
        marks = {tag for tag in tags(cell) if tag.partition("-")[0] in ("exercise", "writeup", "instructor")}
        if unknown := marks - {*PUBLIC, *PRIVATE}:
            raise ValueError(f"unknown tag {', '.join(sorted(unknown))}")
        private = bool(marks & set(PRIVATE))
        if private and marks & set(PUBLIC):
            raise ValueError(f"a cell is public and private: {', '.join(sorted(marks))}")
        text = cell.cell_type == "markdown"
        if after_private and text and not marks and not cell.source.startswith("#"):
            raise ValueError(f"public or not? Give this text a tag or a heading: {cell.source[:60]!r}")
        if not private:
            shown.append(cell)
        after_private = private
    return shown


def private_names(source):
    """Names with a leading underscore that a check imports or looks up; there should be none."""
    tree = ast.parse(source)
    attributes = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    imported = [
        part
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        for part in (*(getattr(node, "module", None) or "").split("."), *alias.name.split("."))
    ]
    return [name for name in attributes + imported if name.startswith("_") and not name.endswith("__")]
