"""A student's process: what it can reach, how it is ended, and what may pass between it and the grader."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import sleeplib as sl

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "course"))
import child  # noqa: E402
import runner  # noqa: E402
import wire  # noqa: E402

full = pytest.mark.skipif(runner.isolation() != "full", reason="this system has no namespaces for us")


@full
def test_there_is_no_network_and_no_other_file(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("x")
    cell = (
        "import os, socket\n"
        "def reach():\n    socket.create_connection(('127.0.0.1', 22), 1)\n"
        f"def peek(): return [os.path.exists(p) for p in {[str(secret), str(ROOT / 'course' / 'src')]!r}]\n"
        "def who(): return os.getuid(), len([p for p in os.listdir('/proc') if p.isdigit()])\n"
        "def regain(): os.setuid(0)\n"
    )
    pupil = runner.Pupil([], [cell], dict(sleeplib=False, call=5, total=30, memory=256))
    try:
        with pytest.raises(runner.Failed, match="unreachable|refused"):
            pupil.answer("reach")()
        assert pupil.answer("peek")() == [False, False]
        user, processes = pupil.answer("who")()
        assert processes <= 3
        if os.geteuid() == 0:
            assert user == runner.NOBODY
            with pytest.raises(runner.Failed, match="PermissionError"):
                pupil.answer("regain")()
    finally:
        pupil.stop()


@full
def test_the_environment_may_be_a_link(tmp_path):
    linked = tmp_path / ".venv"
    linked.symlink_to(sys.prefix, target_is_directory=True)
    code = (
        "import runner\n"
        "limits = dict(sleeplib=False, call=5, total=30, memory=256)\n"
        "pupil = runner.Pupil([], ['def f(): return 7'], limits)\n"
        "try: print(pupil.answer('f')(), runner.readable('secret'))\n"
        "finally: pupil.stop()\n"
    )
    places = os.pathsep.join([str(ROOT / "course"), str(ROOT)])
    command = [linked / "bin" / Path(sys.executable).name, "-c", code]
    options = dict(env=os.environ | {"PYTHONPATH": places}, cwd=tmp_path, text=True)
    assert subprocess.check_output(command, **options) == "7 False\n"


def test_functions_go_over_as_calls_back(monkeypatch):
    monkeypatch.setattr(runner, "SERVE", 4)
    cell = (
        "def finds(f):\n    assert f(2) == 4, 'not the square'\n    return f.__name__\n"
        "def sends(f): return f(bytes(2 << 20))\n"
        "def waits(f):\n    f()\n    return 'done'\n"
    )
    pupil = runner.Pupil([], [cell], dict(sleeplib=False, call=1, total=30, memory=256))
    try:
        assert pupil.answer("finds")(lambda x: x * x) == "function"
        with pytest.raises(AssertionError, match="not the square"):
            pupil.answer("finds")(lambda x: x)
        with pytest.raises(runner.Failed, match="ZeroDivisionError"):
            pupil.answer("finds")(lambda x: 1 / 0)
        with pytest.raises(runner.Failed, match="larger than 1 MiB"):
            pupil.answer("sends")(len)
        # what the grader itself needs is not the student's time, but it has an end too
        assert pupil.answer("waits")(lambda: time.sleep(2)) == "done"
        with pytest.raises(runner.Ended, match="kept the grader busy"):
            pupil.answer("waits")(lambda: time.sleep(30))
    finally:
        pupil.stop()


@pytest.mark.parametrize(
    "cell, value",
    [
        ("%matplotlib inline\nx = 1", 1),
        ("!pip install numpy\nfiles = !ls\nhere = %pwd\nprint?\nprint.x??\n?print\nx = 2", 2),
        ("%%time\nx = 3", 3),
        ("def f():\n    %time 1\n    return 4\nx = f()", 4),
        ("x = ('%d'\n    % (5))", "5"),
        ("x = (6\n    != 7)", True),
        ("display(1)\nx = 7", 7),
    ],
)
def test_a_cell_may_hold_what_a_notebook_allows(cell, value):
    namespace = {"display": print}
    assert child.run_cells([cell], namespace, 5) == {} and namespace["x"] == value


def test_a_cell_that_is_not_python_is_told_so():
    wrong = child.run_cells(["x = 1", "def f(:\n    pass", "if x:\n%%pass"], {}, 5)
    assert set(wrong) == {1, 2} and all("Error" in text for text in wrong.values())


def test_the_last_version_counts_though_an_earlier_cell_is_tried_again():
    cells = [
        "def f(): return 'first'\nassert f() == 'last'",  # an attempt with a check of its own
        "y = g()",  # too early
        "def g(): return 'late'",
        "def f(): return 'last'",
    ]
    namespace = {}
    wrong = child.run_cells(cells, namespace, 5)
    assert set(wrong) == {0} and "AssertionError" in wrong[0]
    assert namespace["f"]() == "last" and namespace["y"] == "late"


def test_a_name_that_was_deleted_later_stays_deleted():
    namespace = {}
    cells = ["x = g()", "x = 1", "del x", "def g(): return 1"]
    assert child.run_cells(cells, namespace, 5) == {} and "x" not in namespace and "g" in namespace


def test_models_and_states_go_over():
    torch.manual_seed(0)
    model = sl.HybridLM(sl.ModelConfig(vocab_size=5, d_model=16, pattern="ag", num_heads=2))
    tokens = torch.tensor([[1, 2, 3]])
    cell = (
        "import torch\n"
        "def reads(model, tokens):\n    with torch.no_grad():\n"
        "        return model(tokens, model.initial_state(1))\n"
    )
    pupil = runner.Pupil([], [cell], dict(sleeplib=True, call=60, total=120, memory=2048))
    try:
        logits, state = pupil.answer("reads")(model, tokens)
    finally:
        pupil.stop()
    with torch.no_grad(), sl.kernels.use_numba(False):
        wanted, last = model(tokens, model.initial_state(1))
    assert torch.allclose(logits, wanted, atol=1e-6) and state.position == 3
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(state.tensors(), last.tensors()))


@pytest.mark.parametrize(
    "tree",
    [
        "[",
        '{"is": "array", "dtype": "|O8", "shape": [1]}',
        '{"is": "array", "dtype": "<f8", "shape": [9]}',
        '{"is": "array", "dtype": "<f8", "shape": [-1]}',
        '{"is": "function", "number": 0}',
        '{"is": "model", "config": {}, "weights": {}}',
        '{"is": "state", "items": [["position", 1]]}',
        '{"is": "os.system"}',
        '{"no": "kind"}',
        "[" * 10**5,
        "9" * 5000,
    ],
)
def test_a_message_that_is_none_is_refused(tree):
    with pytest.raises(wire.Malformed):
        wire.decode(tree.encode(), memoryview(b"\0" * 8))


def test_without_namespaces_limits_still_hold(monkeypatch):
    monkeypatch.setattr(runner, "isolation", lambda: "weak")
    cells = ["import os\ndef double(x): return 2 * x", "def endless():\n    while True: pass"]
    cells += ["def forks(): os.fork()", "def who(): return os.getuid()"]
    pupil = runner.Pupil([], cells, dict(sleeplib=False, call=2, total=30, memory=256))
    try:
        assert pupil.answer("double")(np.ones(2)).tolist() == [2, 2]
        assert pupil.answer("who")() == (os.getuid() or runner.NOBODY)
        with pytest.raises(runner.Ended, match="too long"):
            pupil.answer("endless")()
        with pytest.raises(runner.Failed, match="BlockingIOError"):
            pupil.answer("forks")()
    finally:
        pupil.stop()
