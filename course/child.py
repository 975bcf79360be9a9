"""The student's side: runs a notebook's cells and then answers calls, as data.  Nobody believes what it says.

``python child.py FD SLEEPLIB [USER]``: FD is the socket to the grader, SLEEPLIB the folder to import sleeplib
from, or empty where answers may not use it.  USER is the user to become where jail.py has not done so.
"""

import ast
import builtins
import os
import re
import resource
import signal
import socket
import sys
import warnings

# What a notebook allows besides Python: magics, shell commands, questions.
NOT_PYTHON = re.compile(r"(\s*)(?:[%!?].*|[\w.]+\?{1,2}\s*|[\w., ]+=\s*[%!].*)$")


def limit(megabytes, seconds):
    """Allow from here on only so much more memory and CPU time, small files, and no new process or thread."""
    try:
        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:  # not Linux: the libraries' own share is guessed
        now = 8 << 30
    bounds = {
        "RLIMIT_AS": now + (megabytes << 20),
        "RLIMIT_CPU": seconds,
        "RLIMIT_NPROC": 0,
        "RLIMIT_FSIZE": 16 << 20,
        "RLIMIT_CORE": 0,
        "RLIMIT_NOFILE": 64,
    }
    for name, most in bounds.items():
        kind = getattr(resource, name, None)
        try:
            resource.setrlimit(kind, (most, most))
        except (ValueError, OSError, TypeError):  # not on this system
            continue


def silence():
    """Send what a submission prints nowhere, and let nothing be read from the keyboard."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nothing, fd)


def said(error):
    return f"{type(error).__name__}: {error}"[:300]


def parsed(source):
    """The syntax tree of a cell, without the lines that only a notebook understands."""
    lines = source.splitlines()
    while True:
        try:
            return ast.parse("\n".join(lines))
        except SyntaxError as error:
            number = (error.lineno or 0) - 1
            found = NOT_PYTHON.match(lines[number]) if 0 <= number < len(lines) else None
            if not found:
                raise
            lines[number] = found[1] + "pass"


def runnable(source):
    """Code of a cell without magics and without visible checks, which are the student's own business."""
    if source.startswith("#@title Run me first"):  # it would install the library
        source = ""
    tree = parsed(source)

    def is_check(node):
        call = node.value if isinstance(node, ast.Expr) else None
        name = call.func.id if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) else ""
        return name == "report" or name.startswith("check_")

    tree.body = [node for node in tree.body if not is_check(node)]
    return compile(tree, "notebook", "exec")


def run_cells(cells, namespace, seconds, progress=lambda number: None):
    """Run the cells in order, and those that failed once more at the end, except where time ran out.

    Returns number -> what went wrong.  A name that several cells bind belongs to the last of them, as when a
    notebook is run from top to bottom.
    """

    def too_long(*_):
        raise TimeoutError(f"the cell took more than {seconds} s")

    signal.signal(signal.SIGALRM, too_long)
    order, wrong, giver = list(range(len(cells))), {}, {}
    for _ in range(2):
        for number in order:
            progress(number)
            before = dict(namespace)
            signal.alarm(seconds)
            try:
                exec(runnable(cells[number]), namespace)
                wrong.pop(number, None)
            except BaseException as error:
                wrong[number] = said(error)
            finally:
                signal.alarm(0)
            for name in [name for name, x in namespace.items() if x is not before.get(name, before)]:
                if giver.setdefault(name, number) <= number:
                    giver[name] = number
                elif name in before:
                    namespace[name] = before[name]
                else:
                    del namespace[name]
        order = [number for number in wrong if not wrong[number].startswith("TimeoutError")]
    return wrong


def main():
    sock = socket.socket(fileno=int(sys.argv[1]))
    silence()
    import wire

    warnings.simplefilter("ignore")
    order = wire.receive(sock)
    text = "".join((*order["setup"], *order["cells"]))
    if sys.argv[2]:
        sys.path.insert(0, sys.argv[2])
        import sleeplib  # noqa: F401
    else:
        sys.modules["sleeplib"] = None
    if "torch" in text or sys.argv[2]:
        import torch

        torch.set_num_threads(1)
    if "matplotlib" in text:  # it starts a thread, which will not be allowed later
        import matplotlib.pyplot  # noqa: F401
    if user := "".join(sys.argv[3:]):
        import numpy.random  # noqa: F401  it would load itself late, when its files may be out of reach

        os.setgroups([])
        os.setgid(int(user))
        os.setuid(int(user))
    limit(order["memory"], order["total"])
    wire.send(sock, wire.encode({"started": True}))

    namespace = {"__name__": "__main__", "display": print}  # a notebook has one

    def progress(number):
        wire.send(sock, wire.encode({"cell": number}))

    run_cells(order["setup"], namespace, order["call"])
    wrong = run_cells(order["cells"], namespace, order["call"], progress)
    wire.send(sock, wire.encode({"ready": True, "wrong": wrong}))

    def given(number):
        """Stand for a function of the grader, which is called there."""

        def function(*args, **kwargs):
            wire.send(sock, wire.encode({"callback": number, "args": args, "kwargs": kwargs}))
            reply = wire.receive(sock, given)
            if "value" in reply:
                return reply["value"]
            name, _, text = reply["raise"].partition(": ")
            raise getattr(builtins, name)(text)

        return function

    while True:
        try:
            call = wire.receive(sock, given)
        except EOFError:
            return
        try:
            if not callable(namespace.get(call["name"])):
                raise NameError(f"there is no function {call['name']}")
            reply = wire.encode({"value": namespace[call["name"]](*call["args"], **call["kwargs"])})
        except BaseException as error:
            failed = isinstance(error, AssertionError)
            reply = wire.encode({"raise": said(error), "assertion": failed})
        wire.send(sock, reply)


if __name__ == "__main__":
    main()
