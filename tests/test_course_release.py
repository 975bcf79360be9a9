"""What is handed out: handouts without a solution that run as a student would run them, and otter's zips."""

import contextlib
import io
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "course"))
import masters  # noqa: E402
import release  # noqa: E402
from feedback import written  # noqa: E402
from test_course_masters import EXAMPLE  # noqa: E402

SOURCES = masters.sources()
each = pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.stem)


@pytest.fixture(scope="module")
def convert():
    return release.Converter()


@pytest.fixture(scope="module")
def private():
    return release.secrets([masters.read(source) for source in SOURCES])


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    path = tmp_path_factory.mktemp("master") / "a0_means.md"
    path.write_text(EXAMPLE)
    return masters.read(path)


@each
def test_the_handout_is_current(source, convert):
    made = nbformat.writes(release.handout(masters.read(source), convert)).rstrip("\n") + "\n"
    assert (release.HANDOUTS / f"{source.stem}.ipynb").read_text() == made, "run make student-release"


def test_a_handout_that_imports_the_library_sets_it_up_first():
    count = 0
    for path in release.HANDOUTS.glob("*.ipynb"):
        cells = nbformat.read(path, as_version=4).cells
        code = [cell.source for cell in cells if cell.cell_type == "code"]
        lines = "\n".join(code[1:]).splitlines()
        imports = any(x.lstrip().startswith(("import sleeplib", "from sleeplib")) for x in lines)
        assert code[0].startswith("#@title Run me first") == imports, path.name
        count += imports
    assert count >= 4  # Algorithm 1, the experiment, the report, the museum


def test_every_handout_has_a_master():
    assert {path.stem for path in release.HANDOUTS.glob("*.ipynb")} == {source.stem for source in SOURCES}


@each
def test_the_zip_has_nothing_private_and_nothing_of_otter(source, convert, private):
    assignment = masters.read(source)
    data = release.student_zip(assignment, release.handout(assignment, convert), private)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        text = "".join(archive.read(name).decode() for name in archive.namelist())
        assert sorted(archive.namelist()) == sorted([f"{source.stem}.ipynb", f"{source.stem}-README.txt"])
        readme = archive.read(f"{source.stem}-README.txt").decode()
        installs = "Run me first" in archive.read(f"{source.stem}.ipynb").decode()
        assert ("git+" in readme) == installs
    for word in ("_solution", "_mistake", "def hidden_", "exemplar", "otter"):
        assert word not in text, word
    for exercise in assignment.exercises.values():
        assert f"def {exercise.name}(" in text
    assert len(private) > 50


def test_a_leak_stops_the_release(example, convert):
    private = release.secrets([example])
    notebook = release.handout(example, convert)
    release.student_zip(example, notebook, private)
    for secret in ("return (x / len(x)).sum(0)", "Most will call `mean` and lose the point for overflow."):
        cells = [*notebook.cells, nbformat.v4.new_markdown_cell(f"By the way: {secret}")]
        leaky = nbformat.from_dict(notebook | {"cells": cells})
        with pytest.raises(ValueError, match="not released"):
            release.student_zip(example, leaky, private)


@each
def test_a_handout_runs_as_it_is_and_solved(source):
    """Every visible check says "not yet" before, and "right" after."""
    assignment = masters.read(source)
    handout = nbformat.read(release.HANDOUTS / f"{source.stem}.ipynb", as_version=4)
    for notebook in (handout, release.solved(assignment, handout)):
        namespace, said = {"__name__": "__main__"}, io.StringIO()
        with contextlib.redirect_stdout(said):
            for cell in notebook.cells:
                if cell.cell_type == "code" and "%pip" not in cell.source:
                    masters.parser.define(cell.source, namespace, source.stem)
        lines = said.getvalue().splitlines()
        assert len(lines) == len(assignment.exercises)
        if notebook is handout:
            assert all(line.startswith("not yet: ") for line in lines), lines
        else:
            assert set(lines) == {"right"}


def test_the_marking_page_says_what_a_mistake_loses(example):
    page = release.marking(example)
    assert "| overflow | 1 |" in page and "| Right on tables of any shape. | 3 |" in page
    assert "A made-up sample answer, worth 4 of 4" in page and "worth 2 of 4" in page


def test_the_students_answers_are_found_again(example, convert):
    notebook = release.handout(example, convert)
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    assert written(example, texts) == {"why": ""}
    answered = [text.replace("*Write here.*", "Nine people earn 1.") for text in texts]
    assert written(example, answered) == {"why": "Nine people earn 1."}


def test_otter_grades_the_zip(example, convert, tmp_path, monkeypatch):
    """Full marks, none, and full marks without any metadata; and the zip holds what Gradescope runs."""
    from otter.api import grade_submission

    monkeypatch.chdir(tmp_path)
    zipped = tmp_path / "autograder.zip"
    release.autograder(example, "a secret", zipped)
    names = set(zipfile.ZipFile(zipped).namelist())
    assert {"run_autograder", "setup.sh", "run_otter.py", "tests/mean_row.py"} <= names
    handout, exercise = release.handout(example, convert), example.exercises["mean_row"]
    mistake = exercise.mistakes[0].source.replace(exercise.mistakes[0].name, "mean_row")
    for name, answer, points in (("solution", None, 4), ("stub", None, 0), ("mistake", mistake, 3)):
        made = release.solved(example, handout) if name == "solution" else handout
        notebook = nbformat.reads(nbformat.writes(made), as_version=4)
        for cell in notebook.cells:
            if name == "solution":
                cell.metadata = {}
            if answer and cell.source == exercise.stub.source:
                cell.source = answer
        if name == "solution":
            notebook.metadata = {"kernelspec": notebook.metadata.kernelspec}
        path = tmp_path / f"{name}.ipynb"
        nbformat.write(notebook, path)
        results = grade_submission(str(path), str(zipped), quiet=True)
        assert (results.total, results.possible) == (points, 4), name
