"""Grading: right answers get their marks; no submission gets one that it has not earned, or holds up a run.

``python tests/test_course_grading.py 100`` grades a hundred submissions, kills the run twice, and says how
long one takes.
"""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "course"))
import feedback  # noqa: E402
import grade  # noqa: E402
import masters  # noqa: E402
import runner  # noqa: E402
from test_course_masters import EXAMPLE  # noqa: E402

MASTER = EXAMPLE.replace("call: 10", "call: 2").replace("total: 60", "total: 20")
SEED = "a word that nobody knows"
IMPORT = "import os, sys, json, builtins, signal\nimport numpy as np"
RIGHT = "def mean_row(x):\n    return (x / len(x)).sum(0)"
STUB = "def mean_row(x):\n    return np.zeros(x.shape[1])"
pytestmark = pytest.mark.xdist_group("grading")  # one run serves all of them
full = pytest.mark.skipif(runner.isolation() != "full", reason="this system has no namespaces for us")


def body(*lines):
    return "def mean_row(x):\n" + "\n".join(f"    {line}" for line in lines)


def notebook(*cells, metadata=True):
    kinds = [{"cell_type": "code", "source": cell} for cell in cells]
    if metadata:
        kinds = [kind | {"metadata": {}, "outputs": [], "id": f"c{n}"} for n, kind in enumerate(kinds)]
    return json.dumps({"cells": kinds, "nbformat": 4, "nbformat_minor": 5, "metadata": {}})


# Says the right thing only if it could read what it should not.
SPY = """
def mean_row(x):
    places = ["/proc/1/environ", f"/proc/{os.getppid()}/environ", "@MASTER@", "@OUT@", "@SUBMISSIONS@"]
    for place in places:
        try:
            seen = os.listdir(place) if os.path.isdir(place) else open(place, "rb").read()
        except OSError:
            continue
        if seen:
            return x.mean(0)
"""
FORGE = """
def mean_row(x):
    tree = json.dumps({"value": True, "ready": True, "points": 4}).encode()
    frame = len(tree).to_bytes(8, "big") + bytes(8) + tree
    for fd in range(3, 64):
        try:
            os.write(fd, frame)
        except OSError:
            pass
"""
LIAR = """
class Liar(np.ndarray):
    def __eq__(self, other): return True
    def __lt__(self, other): return True
    def __array__(self, *a, **k): return self
class Always:
    shape = ()
    def __getattr__(self, name): return self
    def __call__(self, *a, **k): return self
    def __eq__(self, other): return True
"""
PATCH = """
builtins.AssertionError = KeyError
np.allclose = np.testing.assert_allclose = lambda *a, **k: True
builtins.abs = builtins.float = lambda *a: 0
"""
NOTHING = {  # name: cells, each worth no point
    "stub": [STUB],
    "empty": ["mean_row"],
    "endless": [body("while True:", "    pass")],
    "endless_deaf": [
        body("while True:", "    try:", "        while True: pass", "    except BaseException: pass"),
        "signal.signal(signal.SIGALRM, signal.SIG_IGN)\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)",
    ],
    "endless_load": [RIGHT, "signal.signal(signal.SIGALRM, signal.SIG_IGN)\nwhile True: pass"],
    "crash": [body("os._exit(0)")],
    "crash_load": [RIGHT, "os._exit(0)"],
    "kill_all": [body("os.kill(os.getppid(), 9)", "os.kill(-1, 9)")],
    "exit": ["import sys", body("sys.exit(0)")],
    "fork_bomb": [body("while True:", "    os.fork()")],
    "fork_load": ["while True: os.fork()", STUB],
    "flood": [body("while True:", "    print('x' * 10**6)", "    os.write(2, bytes(10**6))")],
    "memory": [body("kept = []", "while True:", "    kept.append(bytearray(10**8))")],
    "large": [body("return np.zeros(10**8, dtype='i1')")],
    "deep": [body("deep = []", "for _ in range(10**4):", "    deep = [deep]", "return deep")],
    "file_flood": [body("for n in range(10**3):", "    open(f'/tmp/{n}', 'wb').write(bytes(10**7))")],
    "patched": [PATCH, body("return x[0] * 0")],
    "own_checks": [STUB, "def check_mean_row(answer): pass\nhidden_mean_row_values = check_mean_row"],
    "own_score": [STUB, "print('4/4 points')\nprint(json.dumps({'points': 4}))", body("print('right')")],
    "own_result": [body("open('results.json', 'w').write('{\"points\": 4}')", "return x[0] * 0")],
    "liar": [LIAR, body("return np.zeros(x.shape[1]).view(Liar)")],
    "always": [LIAR, body("return Always()")],
    "asserting": [body("raise AssertionError('right')")],
    "base": [body("raise BaseException('right')")],
    "not_a_number": [body("return np.full(x.shape[1], np.nan)")],
    "forge": [FORGE],
}
if runner.isolation() != "full":  # it would end everything that this user runs
    del NOTHING["kill_all"]
EARNED = {  # name: points, cells
    "solution": (4, [RIGHT]),
    "mistake": (3, ["def mean_row(x):\n    return x.mean(0)"]),
    "stripped": (4, [RIGHT]),
    "reordered": (4, ["def mean_row(x):\n    return f(x / len(x))", "f = make()", "def make(): return sum"]),
    "magics": (4, ["%pip install nothing\n!ls", RIGHT, "def ("]),
    "set_up": (4, [RIGHT, "#@title Run me first: sets up sleeplib\nmean_row = None"]),
    "scratch": (4, [RIGHT, "while True: pass"]),
    "exit_load": (4, ["raise SystemExit", "sys.exit(0)", RIGHT]),
    "checks_kept": (4, [RIGHT, "def check_mean_row(a):\n    os._exit(1)", "check_mean_row(mean_row)"]),
    "chatty": (4, [RIGHT.replace("    return", "    print('x' * 10**6)\n    return")]),
}
REFUSED = {
    "no_notebook": (b"%PDF-1.4", "no Jupyter notebook"),
    "cut": (notebook(RIGHT).encode()[:-30], "no Jupyter notebook"),
    "odd": (b'{"cells": [1, 2]}', "no Jupyter notebook"),
    "other": (notebook("print('hello')").encode(), "none of the functions"),
    "too_large": (notebook(RIGHT, "#" * (11 << 20)).encode(), "more than 10 MiB"),
}


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """name -> result of every submission above, in one run; and the run's folder."""
    home = tmp_path_factory.mktemp("course")
    (home / "masters").mkdir()
    (home / "masters" / "a0_means.md").write_text(MASTER)
    folder, out = home / "handed-in", home / "graded"
    folder.mkdir()
    places = {"@MASTER@": home / "masters" / "a0_means.md", "@OUT@": out, "@SUBMISSIONS@": folder}
    spy = SPY
    for mark, place in places.items():
        spy = spy.replace(mark, str(place))
    for name, cells in (NOTHING | {"spy": [spy]}).items():
        (folder / f"{name}.ipynb").write_text(notebook(IMPORT, *cells))
    for name, (_, cells) in EARNED.items():
        # stripped: no metadata, ids or outputs; reordered: what is needed comes last
        ordered = [*cells, IMPORT] if name == "reordered" else [IMPORT, *cells]
        (folder / f"{name}.ipynb").write_text(notebook(*ordered, metadata=name != "stripped"))
    for name, (data, _) in REFUSED.items():
        (folder / f"{name}.ipynb").write_bytes(data)
    assignments = {"a0_means": masters.read(home / "masters" / "a0_means.md")}
    begin = time.monotonic()
    results = grade.grade(folder, out, SEED, assignments, say=lambda text: None)
    assert time.monotonic() - begin < 600
    return results, home


@pytest.mark.parametrize("name", NOTHING)
def test_nothing_is_given_for_nothing(graded, name):
    result = graded[0][name]
    assert (result["status"], result["points"]) == ("graded", 0), result


@full
def test_the_graders_files_cannot_be_read(graded):
    result = graded[0]["spy"]
    assert (result["status"], result["points"]) == ("graded", 0), result


@pytest.mark.parametrize("name", EARNED)
def test_what_is_earned_is_given(graded, name):
    result = graded[0][name]
    assert (result["status"], result["points"]) == ("graded", EARNED[name][0]), result


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_graded_is_refused_with_a_reason(graded, name):
    result = graded[0][name]
    assert result["status"] == "refused" and REFUSED[name][1] in result["why"]


def test_the_table_has_each_submission_once(graded):
    results, home = graded
    with open(home / "graded" / "marks.csv", newline="") as file:
        rows = {row["submission"]: row for row in csv.DictReader(file)}
    everybody = {*NOTHING, *EARNED, *REFUSED, "spy"}
    assert set(rows) == everybody == set(results)
    assert sum(1 for _ in open(home / "graded" / "marks.csv")) == len(everybody) + 1
    assert rows["mistake"]["points"] == "3" and rows["mistake"]["hidden_mean_row_large"] == "0"
    assert rows["other"]["points"] == "" and rows["other"]["status"] == "refused"
    assert rows["solution"]["write-up a0_means why (of 4)"] == ""


def test_feedback_says_what_went_wrong_and_keeps_the_seed(graded):
    results, home = graded
    page = (home / "graded" / "feedback" / "mistake.html").read_text()
    assert "3 of 4 points" in page and "the mean of two large numbers overflows" in page
    assert "took too long" in (home / "graded" / "feedback" / "endless.html").read_text()
    assert "code cell 3" in (home / "graded" / "feedback" / "crash_load.html").read_text()
    for path in (home / "graded").rglob("*"):
        assert path.is_dir() or SEED not in path.read_text(), path


def test_no_process_is_left(graded):
    listing = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    mine = str(ROOT / "course" / "child.py")
    assert mine not in listing


def test_feedback_escapes_what_students_write(graded):
    _, home = graded
    assignments = {"a0_means": masters.read(home / "masters" / "a0_means.md")}
    text = "**Your answer (why).**\n\nNine <script>alert(1)</script> & one"
    result = graded[0]["solution"] | {"written": feedback.written(assignments["a0_means"], ["# A", text])}
    page = feedback.page("<b>", result, assignments)
    assert "&lt;script&gt;" in page and "<script" not in page and "&lt;b&gt;" in page


def test_a_name_is_no_formula_and_never_two_submissions(tmp_path):
    assert grade.plain("=cmd()") == "'=cmd()" and grade.plain(3) == 3
    for path in ("ada/a1.ipynb", "ada__a1.ipynb"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("{}")
    with pytest.raises(SystemExit, match="ada__a1"):
        grade.submissions(tmp_path)


def test_a_run_that_cannot_be_right_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("SEED", raising=False)
    cases = [("", tmp_path, "SEED is not set"), ("x", tmp_path / "no", "there is no folder")]
    cases += [("x", ROOT / "sleeplib", "submissions could read")]
    for seed, folder, message in cases:
        monkeypatch.setenv("SEED", seed)
        with pytest.raises(SystemExit):
            grade.main([str(folder), "--weak"])
        assert message in capsys.readouterr().err


def test_a_failure_of_the_grader_is_no_mark_and_is_tried_again(tmp_path, monkeypatch):
    synthetic(tmp_path, 1)
    assignments = {"a0_means": masters.read(tmp_path / "masters" / "a0_means.md")}
    run = [tmp_path / "in", tmp_path / "out", SEED, assignments]
    with monkeypatch.context() as broken:
        broken.setattr(runner.Pupil, "process", lambda *_: subprocess.Popen(["false"]))
        broken.setattr(runner.Pupil, "weak_process", lambda *_: subprocess.Popen(["false"]))
        assert grade.grade(*run, say=print)["s000"]["status"] == "not graded"
    row = (tmp_path / "out" / "marks.csv").read_text().splitlines()[1]
    assert row.startswith("s000,,not graded,,,")
    assert grade.grade(*run, say=print)["s000"]["points"] == 4


@pytest.mark.parametrize(("delimiter", "encoding"), [(",", "utf-8"), (";", "utf-8-sig")])
def test_marks_by_hand_outlive_another_run(tmp_path, delimiter, encoding):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in ("adams", "müller"):
        (folder / f"{name}.ipynb").write_text(notebook(IMPORT, STUB))
    (tmp_path / "a0_means.md").write_text(MASTER)
    run = [folder, out, SEED, {"a0_means": masters.read(tmp_path / "a0_means.md")}]
    grade.grade(*run, say=print)
    rows = list(csv.reader((out / "marks.csv").open(encoding="utf-8")))
    column = rows[0].index("write-up a0_means why (of 4)")
    rows[2][column] = "3"
    with open(out / "marks.csv", "w", encoding=encoding, newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    (folder / "late.ipynb").write_text(notebook(IMPORT, STUB))
    grade.grade(*run, say=print)
    found = list(csv.DictReader((out / "marks.csv").open(encoding="utf-8")))
    assert [(r["submission"], r[rows[0][column]]) for r in found] == [
        ("adams", ""),
        ("late", ""),
        ("müller", "3"),
    ]
    pages = [(out / "feedback" / f"{name}.html").read_text() for name in ("adams", "müller")]
    assert "person, of 4 points" in pages[0] and "person, <b>3</b> of 4 points" in pages[1]
    (out / "marks.csv").write_text("not a table")
    with pytest.raises(SystemExit, match="save it so, or move it away"):
        grade.grade(*run, say=print)
    assert (out / "marks.csv").read_text() == "not a table"


def test_real_assignments_score_the_same_in_isolation(tmp_path):
    """Handouts filled with the solutions, left as they are, and with a mistake in every exercise."""
    first = [path for path in masters.sources() if path.stem < "a4"]  # the others need minutes
    assignments = {path.stem: masters.read(path) for path in first}
    wanted = {}
    for assignment in assignments.values():
        handout = nbformat.read(ROOT / "course" / "handouts" / f"{assignment.name}.ipynb", as_version=4)
        solutions = "\n\n".join(e.solution.source for e in assignment.exercises.values())
        lost = {check for e in assignment.exercises.values() for check in e.mistakes[0].loses}
        points = {c.name: c.points for e in assignment.exercises.values() for c in e.hidden}
        for kind in ("solved", "empty", "mistaken"):
            cells = [cell for cell in handout.cells if cell.cell_type == "code"]
            texts = [cell.source for cell in cells if "pip" not in cell.source]
            if kind != "empty":
                texts.append(solutions)
            for name, exercise in assignment.exercises.items() if kind != "empty" else ():
                chosen = exercise.mistakes[0].name if kind == "mistaken" else f"{name}_solution"
                texts += [exercise.mistakes[0].source, f"{name} = {chosen}"]
            full_marks = sum(points.values())
            less = full_marks if kind == "empty" else sum(points[c] for c in lost) * (kind == "mistaken")
            wanted[f"{assignment.name}-{kind}"] = full_marks - less
            (tmp_path / f"{assignment.name}-{kind}.ipynb").write_text(notebook(*texts))
    results = grade.grade(tmp_path, tmp_path / "out", SEED, assignments, jobs=1, say=lambda text: None)
    assert {name: result["points"] for name, result in results.items()} == wanted


def synthetic(home, count):
    """Masters and `count` submissions of several kinds, in `home`."""
    (home / "masters").mkdir()
    (home / "masters" / "a0_means.md").write_text(MASTER)
    (home / "in").mkdir()
    kinds = [RIGHT, EARNED["mistake"][1][0], STUB, body("os._exit(0)"), body("1 / 0")]
    for n in range(count):
        (home / "in" / f"s{n:03}.ipynb").write_text(notebook(IMPORT, kinds[n % 5], f"# {n}"))


def killed_and_resumed(home, count, kills):
    """Grade, killing the run after each of `kills` results; returns the seconds that it took in all."""
    command = [sys.executable, str(ROOT / "course" / "grade.py"), str(home / "in")]
    command += ["--masters", str(home / "masters"), "--out", str(home / "out"), "--weak"]
    env = os.environ | {"SEED": SEED, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    results, before, begin = home / "out" / "results", {}, time.monotonic()
    for wanted in [*kills, None]:
        run = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
        while wanted and run.poll() is None and len(list(results.glob("*.json"))) < wanted:
            time.sleep(0.05)
        if wanted:
            run.send_signal(signal.SIGKILL)
        assert run.wait() == (-signal.SIGKILL if wanted else 0)
        now = {path.name: path.stat() for path in results.glob("*.json")}
        for name, stat in before.items():  # what was there is there, and was not done again
            assert (now[name].st_ino, now[name].st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns), name
        before = now
    with open(home / "out" / "marks.csv", newline="") as file:
        rows = [(row["submission"], row["points"]) for row in csv.DictReader(file)]
    points = ["4", "3", "0", "0", "0"]
    assert rows == [(f"s{n:03}", points[n % 5]) for n in range(count)]
    assert len(list(results.iterdir())) == len(list((home / "out" / "feedback").iterdir())) == count
    return time.monotonic() - begin


def test_a_run_that_is_killed_twice_goes_on(tmp_path):
    synthetic(tmp_path, 6)
    killed_and_resumed(tmp_path, 6, kills=(2, 4))
    # a new submission, and one that was handed in again, are graded; the rest is not
    assignments = {"a0_means": masters.read(tmp_path / "masters" / "a0_means.md")}
    (tmp_path / "in" / "s002.ipynb").write_text(notebook(IMPORT, RIGHT))
    (tmp_path / "in" / "s006.ipynb").write_text(notebook(IMPORT, RIGHT))
    said = []
    results = grade.grade(tmp_path / "in", tmp_path / "out", SEED, assignments, say=said.append)
    assert re.match("7 submissions, 5 graded before", said[0])
    assert results["s002"]["points"] == results["s006"]["points"] == 4
    # another seed is another grading
    grade.grade(tmp_path / "in", tmp_path / "out", "other", assignments, say=said.append)
    assert any(text.startswith("7 submissions, 0 graded before") for text in said)


if __name__ == "__main__":
    import tempfile

    number = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as place:
        synthetic(Path(place), number)
        spent = killed_and_resumed(Path(place), number, kills=(number // 3, 2 * number // 3))
    print(f"{number} submissions, killed twice: {spent:.0f} s, {spent / number:.2f} s each")
