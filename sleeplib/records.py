"""Run records: one JSON file a run, written whole or not at all, read by the chapters."""

import json
import os
import platform
import subprocess
import tempfile
from importlib import metadata
from pathlib import Path

KEYS = (
    "preset passes seed config config_hash command commit dirty data_hash versions device dtype seconds "
    "peak_bytes tokens curve chance final status"
).split()


def data_dir():
    """Folder of the shipped data: the repository's ``data/`` in a checkout, else the package's copy.

    Returns
    -------
    pathlib.Path

    Notes
    -----
    Chapter: 11_rule110
    """
    here = Path(__file__).resolve().parent
    checkout = here.parent / "data"
    return checkout if (checkout.parent / "pyproject.toml").is_file() else here / "data"


def write_atomically(path, content):
    """Write bytes to `path` so that a reader sees the old file or the new one, never a part.

    Parameters
    ----------
    path : path_like
        Its folder is made if need be.
    content : bytes

    Raises
    ------
    OSError
        If the disk is full, say; the old file stands, no temporary file is left.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
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


def record_path(preset, passes, seed, out=None):
    """Where the record of a run lives, below `out` (``data/results`` if absent)."""
    out = data_dir() / "results" if out is None else Path(out)
    return out / preset / f"N{passes}-seed{seed}.json"


def save_record(record, out=None):
    """Write a run record and return its path.

    Raises
    ------
    ValueError
        If a key is missing or unknown.
    OSError
        If it cannot be written; the message names the file, and an older record stands.
    """
    if set(record) != set(KEYS):
        odd = sorted(set(record) ^ set(KEYS))
        raise ValueError(f"record: missing or unknown keys {odd}")
    path = record_path(record["preset"], record["passes"], record["seed"], out)
    try:
        write_atomically(path, (json.dumps(record, indent=1) + "\n").encode())
    except OSError as error:
        raise OSError(
            error.errno, f"record not written, nothing changed: {error.strerror}", str(path)
        ) from error
    return path


def load_record(path):
    """Read one run record.

    Raises
    ------
    ValueError
        If the file is not a record.
    """
    try:
        record = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"path: {path} is not JSON: {error}") from error
    if not isinstance(record, dict) or set(record) != set(KEYS):
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
        Folder of the records, ``data/results`` if absent.

    Returns
    -------
    list of dict

    Notes
    -----
    Chapter: 11_rule110
    """
    folder = record_path(preset, 0, 0, out).parent
    records = [load_record(path) for path in folder.glob("N*-seed*.json")]
    records.sort(key=lambda r: (r["passes"], r["seed"]))
    return [r for r in records if passes is None or r["passes"] == passes]


def versions():
    """Versions of what a run depends on."""
    names = ("sleeplib", "torch", "numpy", "numba")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit():
    """The commit that sleeplib runs from and whether its files differ from it; (None, None) without git."""

    def git(*args):
        command = ["git", "-C", str(Path(__file__).parent), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # Records and pages are made by runs; only code changes what a run computes.
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no", "--", "."))
    except (OSError, subprocess.CalledProcessError):
        return None, None


def processor():
    """A line that names the processor and how many threads PyTorch uses."""
    import torch

    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
