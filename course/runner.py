"""The grader's side: a student's notebook in a process of its own, and its functions as if they were here.

How well the process is isolated depends on the system; ``isolation()`` says how.  What comes back is data
only, and it is judged here, so that nothing over there but a right answer can raise a mark.
"""

import ctypes
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import wire

import sleeplib

COURSE = Path(__file__).resolve().parent
LIBRARY = Path(sleeplib.__file__).resolve().parent
NOBODY = 65534
SCRATCH = 64  # MiB of files
START = 180  # seconds for the libraries to load, before any line of a student's runs
CALLBACK = 1 << 20  # bytes that a student's code may send to a function of the grader's
SERVE = 300  # seconds that a submission may keep such functions busy; they do not count as its own


class Failed(Exception):
    """The student's function raised an exception, or does not exist."""


class Ended(Exception):
    """The student's process is gone, or was ended because it took too long."""


class Broken(BaseException):
    """The grader itself has failed.  No check may take this for a wrong answer."""


@functools.cache
def isolation():
    """Say "full" where namespaces can be had (Linux), else "weak"."""
    with tempfile.TemporaryDirectory() as root:
        try:
            with Pupil.process(["true"], root=root) as process:
                return "full" if process.wait(60) == 0 else "weak"
        except (OSError, subprocess.SubprocessError):
            return "weak"


def die_with_parent():
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG; only Linux has it


def environment(folder):
    """A new environment with nothing from the grader's own, where seeds and passwords may stand."""
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    own = dict.fromkeys(("HOME", "TMPDIR", "MPLCONFIGDIR"), str(folder))
    # kernels would be compiled anew for each process, which takes longer than plain PyTorch at our sizes
    plain = {"LC_ALL": "C.UTF-8", "MPLBACKEND": "Agg", "SLEEPLIB_NUMBA": "0"}
    return {"PATH": "/usr/local/bin:/usr/bin:/bin", **plain, **one, **own}


def shown(library):
    """Files and folders that a submission may read besides the system's; with `library`, sleeplib too."""
    paths = [str(COURSE / name) for name in ("child.py", "wire.py")]
    paths += [sys.prefix, sys.base_prefix, str(Path(sys.executable).resolve().parent)]
    paths += [str(Path(sys.prefix).resolve())]  # .venv may be a link to a larger disk
    if library:
        paths += [str(LIBRARY)]
        if (LIBRARY.parent / "pyproject.toml").exists():  # a checkout
            paths += [str(LIBRARY.parent / name) for name in ("data", "pyproject.toml")]
    return [path for path in dict.fromkeys(paths) if not path.startswith("/usr/")]


def readable(path):
    """Whether submissions could read `path` despite the isolation, because they need a folder around it."""
    path = Path(path).resolve()
    return any(path.is_relative_to(place) for place in ("/usr", *shown(True)))


@contextmanager
def alarm(seconds):
    """Raise TimeoutError in this process after so many seconds."""

    def too_long(*_):
        raise TimeoutError("it took too long")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Pupil:
    """One submission's process.  ``pupil.answer(name)`` stands for the function `name` of the submission.

    Parameters
    ----------
    setup, cells : list of str
        Texts of the assignment's setup cells and of the submission's code cells.
    settings : dict
        Of the master: sleeplib, call, total, memory.
    """

    def __init__(self, setup, cells, settings):
        self.order = {"setup": setup, "cells": cells, **settings}
        self.settings = settings
        self.left = settings["total"]  # seconds of the student's own time
        self.service = SERVE
        self.wrong = {}  # number of a cell -> what went wrong in it
        self.dead = None  # why the notebook cannot be loaded
        self.process = self.sock = None

    @staticmethod
    def process(command, root, fd=None, library=False):
        """Start a command in a world of its own, `root` being an empty folder to build it on."""
        spec = {
            "root": root,
            "show": shown(library),
            "scratch": SCRATCH,
            "user": NOBODY if os.geteuid() == 0 else None,
            "command": command,
            "env": environment("/tmp"),
            "fd": fd if fd is not None else 0,
        }
        world = ["unshare", "--mount", "--net", "--ipc", "--pid", "--fork", "--kill-child"]
        if os.geteuid() != 0:
            world += ["--user", "--map-root-user"]
        return subprocess.Popen(
            [*world, sys.executable, "-I", "-S", str(COURSE / "jail.py"), json.dumps(spec)],
            pass_fds=[fd] if fd is not None else [],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=die_with_parent,
            start_new_session=True,
        )

    @staticmethod
    def weak_process(command, folder, fd):
        """The same command where there are no namespaces: with limits only."""
        user = str(NOBODY) if os.geteuid() == 0 else ""
        if user:
            os.chown(folder, NOBODY, NOBODY)
        return subprocess.Popen(
            [*command, user],
            pass_fds=[fd],
            cwd=folder,
            env=environment(folder),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=die_with_parent,
            start_new_session=True,
        )

    def start(self):
        """Start the process and load the notebook; Broken if it does not start, Ended if it does not load."""
        if self.dead:
            raise Ended(self.dead)
        self.folder = tempfile.mkdtemp(prefix="pupil-")
        self.sock, theirs = socket.socketpair()
        for end in (self.sock, theirs):  # large arrays in few pieces
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        library = str(LIBRARY.parent) if self.settings["sleeplib"] else ""
        command = [sys.executable, "-E", "-s", str(COURSE / "child.py"), str(theirs.fileno()), library]
        if isolation() == "full":
            self.process = Pupil.process(command, self.folder, theirs.fileno(), bool(library))
        else:
            self.process = Pupil.weak_process(command, self.folder, theirs.fileno())
        theirs.close()
        cell = None
        try:
            self.sock.settimeout(START)
            wire.send(self.sock, wire.encode(self.order))
            if self.receive(START) != {"started": True}:
                raise OSError("the process did not start")
        except (Ended, OSError, wire.Malformed) as error:
            self.stop()
            raise Broken(f"the grader could not start a process: {error}") from error
        try:
            begin = time.monotonic()
            while True:
                message = self.receive(self.left - (time.monotonic() - begin))
                if "ready" in message:
                    break
                cell = message["cell"]
            self.left -= time.monotonic() - begin
            self.wrong = {int(key): str(text)[:300] for key, text in message["wrong"].items()}
        except (Ended, wire.Malformed, TypeError, KeyError, ValueError, AttributeError) as error:
            self.stop()
            where = f"code cell {cell + 1}" if type(cell) is int else "its first cell"
            self.dead = f"the notebook could not be loaded: in {where}, {error}"
            raise Ended(self.dead) from error

    def stop(self):
        """End the process and whatever it has started."""
        if self.process:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.sock.close()
            shutil.rmtree(self.folder, ignore_errors=True)
            self.process = self.sock = None

    def receive(self, seconds, function=None, limit=wire.LIMIT):
        """Return the next message; raise Ended if there is none in time."""
        deadline = time.monotonic() + seconds
        sock = self.sock

        class Timed:
            @staticmethod
            def recv_into(view):
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError
                sock.settimeout(left)
                return sock.recv_into(view)

        try:
            return wire.receive(Timed, function, limit)
        except TimeoutError:
            raise Ended("it took too long and was ended") from None
        except (EOFError, OSError):
            raise Ended("the process ended of itself") from None

    def answer(self, name):
        """The function `name` of the submission."""

        def call(*args, **kwargs):
            if self.left <= 0:
                raise Ended(f"the {self.settings['total']} s for the whole submission are used up")
            if self.process is None:
                self.start()
            begin, service = time.monotonic(), self.service
            try:
                return self.ask({"name": name, "args": list(args), "kwargs": kwargs})
            except (Ended, wire.Malformed) as error:
                self.stop()
                raise Ended(f"{name}: {error}") from None
            finally:
                self.left -= time.monotonic() - begin - (service - self.service)

        return call

    def ask(self, request):
        """Send one call, serve what it calls back, and return its result."""
        functions = []

        def number(function):
            functions.append(function)
            return len(functions) - 1

        limit = min(self.settings["call"], self.left)
        deadline = time.monotonic() + limit
        self.sock.settimeout(limit)
        try:
            wire.send(self.sock, wire.encode(request, number))
            while True:
                left = deadline - time.monotonic()
                reply = self.receive(left, limit=wire.LIMIT)
                if type(reply) is not dict:
                    raise wire.Malformed("no reply")
                if "callback" not in reply:
                    break
                begin = time.monotonic()
                with alarm(self.service):
                    served = serve(functions, reply, number)
                spent = time.monotonic() - begin
                self.service, deadline = self.service - spent, deadline + spent
                if self.service <= 0:
                    raise Ended(f"it kept the grader busy for more than {SERVE} s")
                self.sock.settimeout(limit)
                wire.send(self.sock, served)
        except TimeoutError:
            raise Ended("it took too long and was ended") from None
        except OSError:
            raise Ended("the process ended of itself") from None
        if "value" in reply:
            return reply["value"]
        text = str(reply.get("raise"))[:300]
        raise AssertionError(text) if reply.get("assertion") is True else Failed(text)


def serve(functions, request, number):
    """Call one of the grader's functions for a student; return its result or its error as bytes."""
    try:
        function = functions[request["callback"]]
        args, kwargs = request["args"], request["kwargs"]
        if sum(map(len, wire.encode([args, kwargs]))) > CALLBACK:
            raise ValueError(f"the arguments are larger than {CALLBACK >> 20} MiB")
        return wire.encode({"value": function(*args, **kwargs)}, number)
    except Exception as error:
        kinds = (AssertionError, ValueError, TypeError, IndexError, KeyError, ZeroDivisionError)
        kind = next((kind.__name__ for kind in kinds if isinstance(error, kind)), "RuntimeError")
        return wire.encode({"raise": f"{kind}: {error}"[:300]})
