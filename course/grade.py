"""Grade a folder of submissions: ``make grade SUBMISSIONS=folder SEED=...``.

Each notebook is judged by a process of its own, which runs the student's code in yet another one (runner.py).
A result is a file of its own under OUT/results, written whole or not at all; what is there already, for the
same submission, masters and seed, is not done again.  So the command can be killed and repeated at any time.
"""

import argparse
import csv
import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import re
import resource
import signal
import sys
import time
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path

import feedback
import masters
import runner
import torch

from sleeplib.records import write_atomically

MOST = 10 << 20  # bytes of a notebook
RESTART = 30  # seconds that a judge may need to start a student's process once more
PATIENCE = 30  # seconds to wait for the judges of a run that was killed


class Refused(Exception):
    """A file that cannot be graded, and why."""


def read_cells(data):
    """Texts of the code cells and Markdown cells in a notebook's bytes; its metadata do not matter."""
    if len(data) > MOST:
        raise Refused(f"the file has more than {MOST >> 20} MiB; clear the outputs")
    try:
        cells = json.loads(data)["cells"]
        kinds = {"code": [], "markdown": []}
        for cell in cells:
            source = cell["source"]
            text = source if isinstance(source, str) else "".join(source)
            kinds.setdefault(cell["cell_type"], []).append(text)
    except (ValueError, KeyError, TypeError, RecursionError, AttributeError):
        raise Refused("the file is no Jupyter notebook") from None
    return kinds["code"], kinds["markdown"]


def belongs_to(code, assignments):
    """The assignment that a notebook answers: the one that has most functions named in it."""
    named = set(re.findall(r"\w+", "\n".join(code)))
    counts = {name: len(named & set(a.exercises)) for name, a in assignments.items()}
    best = max(counts, key=counts.get)
    if not counts[best]:
        raise Refused("none of the functions of an assignment is in it")
    return assignments[best]


def judge(data, assignments, seed):
    """The result of one submission, a dict; see `blank` for its keys."""
    code, text = read_cells(data)
    assignment = belongs_to(code, assignments)
    namespace = assignment.setup
    torch.set_num_threads(1)
    setup = [cell.source for cell in masters.parser.tagged(assignment.notebook, "exercise-setup")]
    pupil, begin = runner.Pupil(setup, code, assignment.settings), time.monotonic()
    exercises = {}
    try:
        for name, exercise in assignment.exercises.items():
            verdicts = masters.parser.judge(exercise, pupil.answer(name), namespace, seed)
            exercises[name] = [
                {
                    "check": check.name,
                    "title": check.title,
                    "points": check.points * (verdicts[check.name] is None),
                    "out_of": check.points,
                    "wrong": verdicts[check.name] and verdicts[check.name][:500],
                }
                for check in exercise.hidden
            ]
    finally:
        pupil.stop()
    return {
        "status": "graded",
        "why": pupil.dead or "",
        "assignment": assignment.name,
        "points": sum(check["points"] for checks in exercises.values() for check in checks),
        "out_of": assignment.points,
        "exercises": exercises,
        "cells": {str(number + 1): text for number, text in pupil.wrong.items()},
        "written": feedback.written(assignment, text),
        "seconds": round(time.monotonic() - begin, 1),
    }


def blank(status, why):
    """A result without marks."""
    keys = dict(assignment="", points=0, out_of=0, exercises={}, cells={}, written={}, seconds=0)
    return {"status": status, "why": why, **keys}


def judge_into(path, data, key, assignments, seed):
    """Judge one submission and write its result; the whole life of one process."""
    runner.die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run stops its judges itself
    with suppress(OSError, ValueError):  # what a student sends back must not fill the memory on this side
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + (4 << 30)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    try:
        result = judge(data, assignments, seed)
    except Refused as refusal:
        result = blank("refused", str(refusal))
    write_atomically(path, json.dumps(result | {"key": key}, indent=1).encode())


def submissions(folder):
    """name -> path of every notebook below a folder; the name is made from its path."""
    found = {}
    for path in sorted(Path(folder).rglob("*.ipynb")):
        relative = path.relative_to(folder)
        if not any(part.startswith(".") for part in relative.parts):
            name = re.sub(r"[^\w.+@-]", "_", "__".join(relative.with_suffix("").parts))
            if name in found:
                raise SystemExit(f"{path} and {found[name]} would have one name, {name}: rename one")
            found[name] = path
    return found


def key_of(data, assignments, seed):
    """What a result depends on: the submission, the masters and the seed, without giving the seed away."""
    masters_read = "".join(str(a.notebook.cells) for a in assignments.values())
    return hashlib.sha256(b"\0".join((data, masters_read.encode(), str(seed).encode()))).hexdigest()


def finished(path, key):
    """The result at `path` if it is there, still valid and not "not graded", else None."""
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return result if result.get("key") == key and result["status"] != "not graded" else None


def exclusive(out):
    """A lock on the folder of results.  Judges inherit it: a run after a kill waits."""
    lock = open(out / ".lock", "w")
    for _ in range(PATIENCE):
        with suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        time.sleep(1)
    raise SystemExit(f"OUT: another run is grading into {out}; wait until it has ended")


def grade(folder, out, seed, assignments, jobs=2, say=print):
    """Grade every notebook below `folder`; returns name -> result.  Results lie under `out`."""
    found, out = submissions(folder), Path(out)
    if not found:
        raise SystemExit(f"SUBMISSIONS: there is no .ipynb below {folder}")
    out.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = exclusive(out)
    by_hand(out / "marks.csv")  # if it cannot be read, say so now and not after an hour
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    isolation = runner.isolation()
    results, waiting, running, begin = {}, [], {}, time.monotonic()
    for name, path in found.items():
        data = path.read_bytes() if path.stat().st_size <= MOST else bytes(MOST + 1)
        target, key = out / "results" / f"{name}.json", key_of(data, assignments, seed)
        results[name] = finished(target, key)
        if results[name] is None:
            waiting.append((name, target, data, key))
    total = len(waiting)
    say(f"{len(found)} submissions, {len(found) - total} graded before; isolation: {isolation}")
    counts = {a.name: sum(len(e.hidden) for e in a.exercises.values()) for a in assignments.values()}
    longest = max(a.settings["total"] + RESTART * counts[a.name] for a in assignments.values())
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name, target, data, key = waiting.pop(0)
                process = context.Process(
                    target=judge_into, args=(target, data, key, assignments, seed), daemon=False
                )
                process.start()
                deadline = time.monotonic() + longest + runner.START + runner.SERVE
                running[process.sentinel] = process, name, target, key, deadline
            wait(list(running), timeout=1)
            for sentinel, (process, name, target, key, deadline) in list(running.items()):
                if process.is_alive() and time.monotonic() < deadline:
                    continue
                process.kill()
                process.join()
                del running[sentinel]
                results[name] = finished(target, key)
                if results[name] is None:
                    why = f"the judge ended with code {process.exitcode}: grade by hand, or run again"
                    results[name] = blank("not graded", why)
                    write_atomically(target, json.dumps(results[name] | {"key": key}, indent=1).encode())
                result = results[name]
                say(f"{name}: {result['status']}, {result['points']}/{result['out_of']} {result['why']}")
    finally:
        for process, *_ in running.values():
            process.kill()
            process.join()
    report(results, assignments, out, isolation)
    if total:
        spent = time.monotonic() - begin
        say(f"{total} graded in {spent:.0f} s, {spent / total:.1f} s each; see {out / 'marks.csv'}")
    lock.close()
    return results


def by_hand(path):
    """The marks that a person has entered in the table: submission -> write-up column -> mark."""
    try:
        text = path.read_text(
            "utf-8-sig"
        )  # spreadsheets put a mark in front, and semicolons in some countries
    except FileNotFoundError:
        return {}
    except UnicodeDecodeError:
        text = ""
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    table = csv.DictReader(io.StringIO(text), delimiter=delimiter)
    if "submission" not in (table.fieldnames or []):
        raise SystemExit(f"{path}: no table in UTF-8 with a column `submission`; save it so, or move it away")
    return {
        row["submission"]: {k: v for k, v in row.items() if k and k.startswith("write-up ")} for row in table
    }


def report(results, assignments, out, isolation):
    """Write marks.csv, keeping the marks by hand that are in it, and a feedback page for each submission."""
    used = [a for a in assignments.values() if any(r["assignment"] == a.name for r in results.values())]
    checks = [check.name for a in used for e in a.exercises.values() for check in e.hidden]
    hand = [feedback.column(a, label, w) for a in used for label, w in a.write_ups.items()]
    head = ["submission", "assignment", "status", "points", "out of", "seconds", "isolation", "note"]
    marked = by_hand(out / "marks.csv")
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([*head, *checks, *hand])
    for name, result in results.items():
        got = {check["check"]: check["points"] for c in result["exercises"].values() for check in c}
        marks = [result[key] for key in ("assignment", "status", "points", "out_of", "seconds")]
        if result["status"] != "graded":
            marks[2:4] = "", ""
        row = [name, *marks, isolation, result["why"], *(got.get(check, "") for check in checks)]
        kept = marked.get(plain(name), {})
        table.writerow([plain(x) for x in row] + [kept.get(column) or "" for column in hand])
        page = feedback.page(name, result, assignments, kept)
        write_atomically(out / "feedback" / f"{name}.html", page.encode())
    write_atomically(out / "marks.csv", text.getvalue().encode())


def plain(value):
    """The value as a cell that no spreadsheet takes for a formula."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@")) else value


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("submissions", help="folder with the notebooks")
    parser.add_argument("--out", help="where results go (default: SUBMISSIONS-graded)")
    parser.add_argument("--masters", default=masters.COURSE / "src", help="folder of the masters")
    parser.add_argument("--jobs", type=int, default=2, help="submissions at a time")
    parser.add_argument("--weak", action="store_true", help="go on where the system cannot isolate them")
    options = parser.parse_args(arguments)
    folder = Path(options.submissions)
    seed = os.environ.get("SEED", "")
    if not seed:
        parser.error("SEED is not set: choose one that no student knows, such as a long word, and keep it")
    if not options.submissions or not folder.is_dir():
        parser.error(f"SUBMISSIONS: there is no folder {options.submissions!r}")
    if options.jobs < 1:
        parser.error(f"--jobs must be 1 or more, not {options.jobs}")
    if runner.isolation() == "weak" and not options.weak:
        parser.error(
            "this system cannot isolate submissions from the network and from your files (it takes Linux "
            "with namespaces); course/README.md says what to do; --weak goes on all the same"
        )
    out = Path(options.out or f"{folder.resolve()}-graded")
    for name, path in (("SUBMISSIONS", folder), ("OUT", out), ("--masters", Path(options.masters))):
        if runner.readable(path):
            parser.error(f"{name}: submissions could read {path}, which lies beside programs that they need")
    assignments = {path.stem: masters.read(path) for path in masters.sources(options.masters)}
    if not assignments:
        parser.error(f"--masters: there is no aN_topic.md in {options.masters}")
    try:
        results = grade(folder, out, seed, assignments, options.jobs)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here")
        return 130
    return int(any(result["status"] == "not graded" for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
