"""Run records: one JSON file for each run, written whole or not at all, read by the chapters."""

import glob
import json
import os
import platform
import subprocess
import tempfile
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import torch

KEYS = "preset passes seed config config_hash command commit dirty data_hash versions device dtype".split()
KEYS += "seconds peak_bytes tokens curve chance final status".split()
LIBRARIES = ("sleeplib", "torch", "numpy", "numba")


def checkout():
    """Folder of the checkout that this sleeplib lies in; None if it is an installed package."""
    root = Path(__file__).resolve().parent.parent
    project = root / "pyproject.toml"
    return root if project.is_file() and 'name = "sleeplib"' in project.read_text() else None


def data_dir():
    """Folder of the shipped data, a Path: ``data/`` of a checkout, else the package's copy.

    Chapter: 11_rule110
    """
    root = checkout()
    return root / "data" if root else Path(__file__).resolve().parent / "data"


def results_dir():
    """Where runs leave records: ``data/results`` of a checkout, else ``./sleeplib-results``."""
    return data_dir() / "results" if checkout() else Path.cwd() / "sleeplib-results"


def kept_model_path(name, argument="name"):
    """Folder of a shipped model, by "rule110-quick/N4-seed0", or by the preset alone where it has only one.

    Raises FileNotFoundError if `name` fits none, ValueError if several; both list the choices, and call
    `name` by the caller's name for it, `argument`.

    Chapter: 11_rule110
    """
    root = data_dir() / "checkpoints"
    kept = {f.parent.relative_to(root).as_posix(): f.parent for f in sorted(root.glob("*/*/config.json"))}
    found = [key for key in kept if str(name) in (key, key.split("/")[0])]
    if not found:
        known = f"{str(name)!r} is no folder, and no model of the book; these are {', '.join(kept)}"
        raise FileNotFoundError(f"{argument}: {known}")
    if len(found) > 1:
        raise ValueError(f"{argument}: {str(name)!r} is ambiguous; write one of {', '.join(found)}")
    return kept[found[0]]


def write_atomically(path, content):
    """Write bytes to `path` so that a reader sees the old file or the new one, never a part.

    The folder is made if need be, and what writers of `path` that were killed on this machine left there is
    removed.  An OSError, say because the disk is full, leaves the old file and no temporary one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    mark = f".{path.name}.{platform.node()}-"
    for stray in path.parent.glob(glob.escape(mark) + "*"):
        if not _alive(stray.name.removeprefix(mark).partition(".")[0]):
            stray.unlink(missing_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{mark}{os.getpid()}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    with suppress(OSError):  # where a folder can be opened, the new name too outlives a loss of power
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _alive(pid):
    """Whether a process may still be running; Windows is not asked: signal 0 would end the process there."""
    try:
        return os.name != "posix" or os.kill(int(pid), 0) is None
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:  # it runs, as another user
        return True


def check_writable(name, folder):
    """Raise OSError, naming the argument, unless files can be made in `folder`; nothing is left behind."""
    try:
        there = Path(folder).absolute()
        nearest = next(path for path in (there, *there.parents) if path.exists())
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        raise OSError(error.errno, f"{name} cannot be written: {error.strerror}", str(folder)) from error


def record_path(preset, passes, seed, out=None):
    """Where the record of a run lives, below `out` (:func:`results_dir` if absent)."""
    return (results_dir() if out is None else Path(out)) / preset / f"N{passes}-seed{seed}.json"


def save_record(record, out=None):
    """Write a run record and return its path.

    Raises ValueError if a key is missing or unknown, or a number not finite; OSError, naming the file, if it
    cannot be written: an older record then stands.
    """
    if odd := sorted(set(record) ^ set(KEYS)):
        raise ValueError(f"record: missing or unknown keys {odd}")
    path = record_path(record["preset"], record["passes"], record["seed"], out)
    try:
        write_atomically(path, (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())
    except ValueError as error:
        raise ValueError(f"record: {error}") from error
    except OSError as error:
        what = f"record not written, nothing changed: {error.strerror}"
        raise OSError(error.errno, what, str(path)) from error
    return path


def load_record(path):
    """Read one run record; raise ValueError if the file is not one."""

    def refuse(word):
        raise ValueError(f"{word} is no JSON number")

    try:
        record = json.loads(Path(path).read_text(), parse_constant=refuse)
    except ValueError as error:
        raise ValueError(f"path: {path} is not JSON: {error}") from error
    if not isinstance(record, dict) or set(record) != set(KEYS) or not isinstance(record["status"], str):
        raise ValueError(f"path: {path} is not a run record")
    return record


def load_records(preset, passes=None, out=None):
    """Read every record of a preset, ordered by passes and seed; an empty list where none was run.

    Parameters
    ----------
    preset : str
    passes : int, optional
        Only the runs with this N.
    out : path_like, optional
        Folder of the records.  If absent, the shipped ones and your own: in a checkout both lie in
        ``data/results``; where sleeplib is installed, a run of your own in ``./sleeplib-results`` stands in
        for the shipped one with its N and seed.

    Chapter: 11_rule110
    """
    folders = [data_dir() / "results", results_dir()] if out is None else [Path(out)]
    found = {path.name: path for folder in folders for path in (folder / preset).glob("N*-seed*.json")}
    records = sorted(map(load_record, found.values()), key=lambda r: (r["passes"], r["seed"]))
    return [r for r in records if passes in (None, r["passes"])]


def own_records(experiment, out=None):
    """The records of an experiment's preset that were made with its settings, and no others: a list."""
    return [r for r in load_records(experiment.name, out=out) if r["config_hash"] == experiment.config_hash()]


def final_scores(preset, passes, seeds=None, out=None, key="exact"):
    """Final score of every finished run of a preset with this N, ``{seed: score}``.

    `seeds` are the ones wanted, all if absent; `key` names a metric of the records; `out` is as in
    :func:`load_records`.

    Chapter: 11_rule110
    """
    runs = [r for r in load_records(preset, passes, out) if r["status"] == "done"]
    return {r["seed"]: r["final"][key] for r in runs if seeds is None or r["seed"] in seeds}


def score_table(arms, seeds, key="exact"):
    """Final scores as lines of text: one arm per line, a column for each seed, a dash where nothing was run.

    Parameters
    ----------
    arms : dict
        Label to (preset, N), or to (preset, N, folder) for records that lie elsewhere.
    seeds : sequence of int
    key : str
        A metric of the records.

    Returns
    -------
    str

    Chapter: 11_rule110
    """
    width = max(4, *map(len, arms))
    lines = [f"{'seed':{width}}  " + "  ".join(f"{seed:4}" for seed in seeds) + "    mean"]
    for label, (preset, passes, *folder) in arms.items():
        scores = final_scores(preset, passes, seeds, *folder, key=key)
        columns = "  ".join(f"{scores[seed]:.2f}" if seed in scores else "   -" for seed in seeds)
        mean = f"{sum(scores.values()) / len(scores):.2f}" if scores else "not run yet"
        lines.append(f"{label:{width}}  {columns}    {mean}")
    return "\n".join(lines)


def versions():
    """Versions of what a run depends on."""
    found = {"python": platform.python_version()} | dict.fromkeys(LIBRARIES, "not installed")
    for name in LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def commit():
    """The commit of the checkout that sleeplib lies in, and whether the package differs from it.

    (None, None) where sleeplib is installed: its version will do.  ("unknown: <reason>", None) where git is
    missing or refuses.  A repository that merely surrounds the checkout is not asked.
    """
    if (root := checkout()) is None:
        return None, None

    def git(*args):
        found = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, env=env)
        if found.returncode:
            raise OSError(" ".join(found.stderr.split("\n", 1)[0].split()))
        return found.stdout.strip()

    env = {k: v for k, v in os.environ.items() if k not in ("GIT_DIR", "GIT_WORK_TREE")}
    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return "unknown: the checkout is no repository of its own", None
        # Records and pages are made by runs; only code changes what a run computes.
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "sleeplib")
        return git("rev-parse", "HEAD"), bool(changed)
    except OSError as error:
        return f"unknown: {error}", None


def processor():
    """A line that names the processor and how many threads PyTorch uses."""
    name = platform.processor() or platform.machine()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return f"{name}, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
