"""Make what is handed out: ``make student-release`` and, with a seed, ``make instructor-release SEED=...``.

Each master gives a handout, course/handouts/aN_topic.ipynb, which holds public cells only; the same as a zip;
and, for the instructor, a page for marking and an autograder zip for Gradescope, made by otter (except for
the museum, which only make grade can judge).  Nothing of otter is in a handout.
"""

import argparse
import hashlib
import inspect
import io
import os
import re
import sys
import tempfile
import zipfile
from pathlib import Path

import masters
import nbformat
import yaml
from feedback import MARKER
from masters import COURSE, ROOT, parser

sys.path.insert(0, str(ROOT / "book"))
from build import execute, write
from runners import Converter

from sleeplib.records import write_atomically

HANDOUTS = COURSE / "handouts"
BUILT = ROOT / "_build" / "course"
REPOSITORY = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]
HOW = """\
[Open in Colab]({colab}) and save a copy, or open this file in Jupyter on your own computer. A CPU is enough.

> **How it is graded.** Fill in the functions; keep their names. The cells with checks are for you: they show
> small examples. Points come from the tables, on inputs that you do not see. Your functions get data and
> return data. They run without a network, {call} seconds at most for one call, {total} for the whole
> notebook. Printing earns nothing. {library}
> Write your answers where it says *Write here*: in that cell, and keep the bold line above. Hand in this
> file, `{name}.ipynb`."""
IMPORTS = re.compile(r"^\s*(?:import|from) sleeplib\b", re.MULTILINE)
LIBRARY = {
    True: "You may use `sleeplib`.",
    False: "NumPy and PyTorch are there, `sleeplib` is not.",
}
CHECKS = "NumPy and PyTorch are there. `sleeplib` is not: this notebook uses it, your functions may not."
README = """\
{name}.ipynb: {title}

On your own computer: Python 3.11 or newer, then

    python -m pip install jupyterlab numpy torch{library}
    python -m jupyterlab

The notebook says how it is graded. The book is at {url}
"""
TEST = '''\
"""{title}: made by course/release.py for otter.  It holds the seed: keep it from students."""

import hashlib

import numpy as np
from otter.test_files import test_case

OK_FORMAT = False
name = {exercise!r}
SEED = {seed!r}
SETUP = {setup!r}

{generator}

def judge(source, check, answer):
    assert callable(answer), "there is no function {exercise}"
    namespace = {{"__name__": "checks"}}
    for text in (*SETUP, source):
        exec(text, namespace)

    def fresh(x):
        if type(x) in (list, tuple):
            return type(x)(map(fresh, x))
        return x.copy() if isinstance(x, np.ndarray) else x

    def called(*args, **options):  # an answer may write into the arrays that it is given
        return answer(*map(fresh, args), **{{name: fresh(x) for name, x in options.items()}})

    try:
        namespace[check](called, generator(SEED, check))
    except SystemExit as error:
        raise AssertionError("it tried to end the program") from error
'''
CASE = """

@test_case(name={title!r}, points={points}, hidden=True)
def {name}(env):
    judge({source!r}, {name!r}, env.get({exercise!r}))
"""


def markdown(text):
    cell = nbformat.v4.new_markdown_cell(text)
    cell.id = hashlib.sha256(text.encode()).hexdigest()[:8]
    return cell


def table(exercise):
    """An exercise's hidden checks as the rubric that students see."""
    rows = [f"| {check.title} | {check.points} |" for check in exercise.hidden]
    return "\n".join(["| what is checked, on hidden inputs | points |", "|---|---|", *rows])


def handout(assignment, convert):
    """The notebook for students."""
    cells, before = [], None
    by_stub = {exercise.stub.id: exercise for exercise in assignment.exercises.values()}
    path = f"course/handouts/{assignment.name}.ipynb"
    owner = REPOSITORY["url"].removeprefix("https://github.com/")
    public, allowed = parser.public_cells(assignment.notebook), assignment.settings["sleeplib"]
    needed = allowed or any(IMPORTS.search(cell.source) for cell in public)
    how = HOW.format(
        colab=f"https://colab.research.google.com/github/{owner}/blob/{REPOSITORY['branch']}/{path}",
        name=assignment.name,
        call=assignment.settings["call"],
        total=assignment.settings["total"],
        library=CHECKS if needed and not allowed else LIBRARY[allowed],
    )
    for cell in public:
        first = cell.cell_type == "code" and before is None
        if first:
            before = cell
            cells.append(markdown(how))
            if not needed:
                continue  # nothing to install
        if cell.cell_type == "markdown":
            made = markdown(convert.markdown(cell.source))
        else:
            made = nbformat.v4.new_code_cell(convert.setup if first else cell.source, id=cell.id)
        if cell.id in by_stub:
            cells.append(markdown(table(by_stub[cell.id])))
        cells.append(made)
        if "writeup-rubric" in parser.tags(cell):
            cells.append(markdown(MARKER.format(label=cell.metadata.label) + "\n\n*Write here.*"))
    metadata = assignment.notebook.metadata | {"colab": {"provenance": []}}
    return nbformat.from_dict({"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5})


def solved(assignment, notebook):
    """The handout with every solution filled in."""
    by_stub = {exercise.stub.source: exercise for exercise in assignment.exercises.values()}
    notebook = nbformat.reads(nbformat.writes(notebook), as_version=4)
    for cell in notebook.cells:
        if exercise := by_stub.get(cell.source):
            cell.source = f"{exercise.solution.source}\n\n{exercise.name} = {exercise.name}_solution"
    return notebook


def secrets(assignments):
    """Lines that no student may read: those of more than 20 characters that are in private cells only."""
    private, shown = set(), ""
    for assignment in assignments:
        public = parser.public_cells(assignment.notebook)
        shown += "\n".join(cell.source for cell in public)
        shown += "".join(table(exercise) for exercise in assignment.exercises.values())
        for cell in assignment.notebook.cells:
            if cell not in public:
                private |= {line.strip().strip('"') for line in cell.source.splitlines()}
    return {line for line in private if len(line) > 20 and line not in shown}


def leaks(data, private):
    """The lines of `private` that occur in some file of a zip."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        texts = []
        for name in archive.namelist():
            texts.append(archive.read(name).decode())
            if name.endswith(".ipynb"):
                cells = nbformat.reads(texts[-1], as_version=4).cells
                texts.append("\n".join(cell.source for cell in cells))
    return sorted(line for line in private if any(line in text for text in texts))


def student_zip(assignment, notebook, private):
    """The bytes of one assignment's zip.  It is a ValueError if a line of `private` is in it."""
    buffer = io.BytesIO()
    needed = any(IMPORTS.search(cell.source) for cell in notebook.cells if cell.cell_type == "code")
    library = ' "git+{url}@{branch}"'.format(**REPOSITORY) if needed else ""
    readme = README.format(name=assignment.name, title=assignment.title, library=library, **REPOSITORY)
    files = {
        f"{assignment.name}-README.txt": readme,  # a name of its own: zips are unpacked side by side
        f"{assignment.name}.ipynb": nbformat.writes(notebook),
    }
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), text)
    data = buffer.getvalue()
    if found := leaks(data, private):
        raise ValueError(f"{assignment.name}: not released, {len(found)} lines are private, as {found[0]!r}")
    return data


def marking(assignment):
    """A page for the marker: the rubric, what each mistake loses, and the write-ups with sample answers."""
    lines = [f"# Marking: {assignment.title}", "", f"{assignment.points} points by automatic checks."]
    for exercise in assignment.exercises.values():
        points = {check.name: check.points for check in exercise.hidden}
        lines += ["", f"## `{exercise.name}`", "", table(exercise), ""]
        lines += ["| named mistake | loses |", "|---|---|"]
        for mistake in exercise.mistakes:
            what = mistake.name.removeprefix(f"{exercise.name}_mistake_").replace("_", " ")
            lines.append(f"| {what} | {sum(points[name] for name in mistake.loses)} |")
    for label, write_up in assignment.write_ups.items():
        lines += ["", f"## Write-up: {label}, {write_up.points} points by hand", "", write_up.prompt]
        lines += ["", write_up.rubric]
        for given, text in write_up.exemplars:
            lines += ["", f"### A made-up sample answer, worth {given} of {write_up.points}", "", text]
    return "\n".join(lines) + "\n"


def otter_test(assignment, exercise, seed):
    """One exercise as a test file for otter, complete in itself."""
    setup = [cell.source for cell in parser.tagged(assignment.notebook, "exercise-setup")]
    text = TEST.format(
        title=assignment.title,
        exercise=exercise.name,
        seed=seed,
        setup=setup,
        generator=inspect.getsource(parser.generator),
    )
    for check in exercise.hidden:
        text += CASE.format(exercise=exercise.name, **vars(check))
    return text


def autograder(assignment, seed, path):
    """Write an autograder zip that Gradescope and ``otter.api.grade_submission`` accept."""
    from otter.generate import main as generate

    with tempfile.TemporaryDirectory() as folder:
        tests = Path(folder) / "tests"
        tests.mkdir()
        for name, exercise in assignment.exercises.items():
            (tests / f"{name}.py").write_text(otter_test(assignment, exercise, seed))
        needed = Path(folder) / "requirements.txt"
        lines = ["numpy", "torch"] + ["git+{url}@{branch}".format(**REPOSITORY)]
        needed.write_text("\n".join(lines) + "\n")
        made = Path(folder) / "autograder.zip"
        generate(
            tests_dir=str(tests),
            output_path=str(made),
            no_config=True,
            requirements=str(needed),
            no_environment=True,
        )
        write_atomically(path, made.read_bytes())
    os.chmod(path, 0o600)


def main(arguments=None):
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("part", choices=("student", "instructor", "measure"))
    part = options.parse_args(arguments).part
    assignments = [masters.read(path) for path in masters.sources()]
    convert = Converter()
    notebooks = [handout(assignment, convert) for assignment in assignments]
    if part == "measure":  # what the head of each master says
        for assignment, notebook in zip(assignments, notebooks):
            seconds, peak = execute(solved(assignment, notebook))
            print(f"{assignment.name}: {seconds / 60:.1f} minutes, {(peak or 0) / 1024:.1f} GB")
        return 0
    if part == "student":
        private = secrets(assignments)
        zips = [student_zip(a, n, private) for a, n in zip(assignments, notebooks)]
        HANDOUTS.mkdir(exist_ok=True)
        for stray in {path.stem for path in HANDOUTS.glob("*.ipynb")} - {a.name for a in assignments}:
            (HANDOUTS / f"{stray}.ipynb").unlink()
        for assignment, notebook, data in zip(assignments, notebooks, zips):
            write(notebook, HANDOUTS / f"{assignment.name}.ipynb")
            write_atomically(BUILT / "student" / f"{assignment.name}.zip", data)
            print(f"_build/course/student/{assignment.name}.zip, searched: nothing private is in it")
        return 0
    seed = os.environ.get("SEED", "")
    if not seed:
        options.error("SEED is not set: choose one that no student knows, such as a long word, and keep it")
    for assignment in assignments:
        page = BUILT / "instructor" / f"{assignment.name}-marking.md"
        write_atomically(page, marking(assignment).encode())
        checks = [check.source for exercise in assignment.exercises.values() for check in exercise.hidden]
        if any("import museum" in check for check in checks):  # planted faults do not go where answers run
            print(f"{page.relative_to(ROOT)}; no zip, only make grade can judge it")
            continue
        path = BUILT / "instructor" / f"{assignment.name}-autograder.zip"
        autograder(assignment, seed, path)
        print(f"{path.relative_to(ROOT)} and {page.name}: {assignment.points} points")
    print("These hold your seed and the hidden checks: do not hand them out.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
