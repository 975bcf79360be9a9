"""Read the masters of the course, course/src/aN_topic.md, and check them for what each must have."""

import sys
from dataclasses import dataclass
from pathlib import Path

import nbformat
import yaml

COURSE = Path(__file__).resolve().parent
ROOT = COURSE.parent
sys.path.insert(0, str(ROOT / "book"))
import exercises as parser  # noqa: E402
from build import assemble  # noqa: E402

SETTINGS = {
    "sleeplib": bool,  # whether answers may import the library
    "call": int,  # seconds that one call of an answer may take
    "total": int,  # seconds for the whole submission
    "memory": int,  # MiB beyond what Python with its libraries takes already
}


@dataclass(frozen=True)
class Assignment:
    """One master: its `name`, that of the file, its notebook without outputs, and what is read from it."""

    name: str
    title: str
    settings: dict
    notebook: nbformat.NotebookNode
    exercises: dict  # name -> Exercise
    write_ups: dict  # label -> WriteUp

    points = property(lambda self: sum(exercise.points for exercise in self.exercises.values()))
    setup = property(lambda self: parser.setup(self.notebook, self.name))


def sources(folder=COURSE / "src"):
    """The masters in a folder, in order."""
    return sorted(Path(folder).glob("a[0-9]*.md"))


def read(path):
    """Read a master.  It is a ValueError, naming the file, if it does not keep to course/README.md."""
    path = Path(path)
    try:
        head = yaml.safe_load(path.read_text().split("---\n")[1])
        settings = head.get("course") or {}
        odd = [key for key, kind in SETTINGS.items() if type(settings.get(key)) is not kind]
        if odd or set(settings) - set(SETTINGS):
            raise ValueError(f"course: wants exactly {', '.join(SETTINGS)} in the head, not {settings}")
        notebook = assemble(path)
        found = parser.exercises(notebook)
        for exercise in found.values():
            if not exercise.hidden:
                raise ValueError(f"{exercise.name}: there is no exercise-hidden")
            names = {check.name for check in exercise.hidden}
            for mistake in exercise.mistakes:
                if not mistake.loses or set(mistake.loses) - names:
                    raise ValueError(f"{mistake.name}: loses names no hidden check, or an unknown one")
        parser.public_cells(notebook)
        title = notebook.cells[0].source.partition("\n")[0].removeprefix("# ")
        return Assignment(path.stem, title, settings, notebook, found, parser.write_ups(notebook))
    except (ValueError, SyntaxError, IndexError) as error:
        raise ValueError(f"{path.name}: {error}") from error
