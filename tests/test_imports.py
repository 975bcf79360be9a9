"""Imports run one way, and the core needs neither Jupyter nor plots."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sleeplib

PACKAGE = Path(sleeplib.__file__).parent
MODULES = {
    ".".join(p.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): p
    for p in PACKAGE.rglob("*.py")
}
# A module may import what stands on a line above its own.  Its first name is the file or folder.
LAYERS = [
    {"checks", "threads", "device", "processes", "intervals"},
    {"records", "muon", "state"},
    {"kernels"},
    {"layers", "interface"},
    {"model"},
    {"algorithm"},
    {"sleeper"},
    {"tasks"},
    {"baselines", "pretrained", "ttt"},
    {"experiments"},
    {"presets", "flops", "evaluation", "checkpoints", "finetune", "optimizers"},
    {"training"},
    {"runs", "budget"},
    {"bench", "scorecard", "reproduce", "doctor"},
    {"gpu_check", "throughput"},
    {"plots"},
    {"widgets"},
    {"__init__"},
    {"__main__"},
]
OUTSIDE = {"seaborn": {"plots"}, "pandas": {"plots"}, "ipywidgets": {"widgets"}}
OUTSIDE |= {"matplotlib": {"plots", "widgets"}}
OUTSIDE |= {"IPython": {"plots", "widgets"}, "fla": {"kernels.fla"}}
OUTSIDE |= {"transformers": {"bench", "pretrained"}, "peft": {"pretrained"}}  # a folder's name: all in it
OUTSIDE |= {"triton": {"kernels.fla"}, "book": set()}


def imports(module):
    """Absolute names that a module imports anywhere, and the line of each."""
    tree = ast.parse(MODULES[module].read_text())
    package = ["sleeplib", *module.split(".")]
    if MODULES[module].name != "__init__.py":
        package = package[:-1]
    elif module == "__init__":
        package = ["sleeplib"]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - (node.level - 1)] if node.level else []
            stem = ".".join(base + ([node.module] if node.module else []))
            for alias in node.names:
                full = f"{stem}.{alias.name}"
                known = full.removeprefix("sleeplib.") in MODULES or full.startswith("sleeplib.data")
                yield full if known else stem, node.lineno


def rank(name):
    return next(i for i, names in enumerate(LAYERS) if name in names)


def test_every_module_has_its_place():
    assert {m.split(".")[0] for m in MODULES} <= set().union(*LAYERS)


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module):
    own = module.split(".")[0]
    for name, line in imports(module):
        if name == "sleeplib" or not name.startswith("sleeplib."):
            assert name != "sleeplib" or own in ("plots", "widgets", "__main__"), f"{module}:{line}"
            continue
        used = name.split(".")[1]
        assert used == own or rank(used) < rank(own), f"{module}:{line} imports {used}"
        if own == "tasks":
            assert used in ("tasks", "kernels", "checks"), f"{module}:{line}: a task imports no model"
        if used in ("plots", "widgets"):
            assert own in ("__main__", "plots", "widgets"), f"{module}:{line} imports {used}"


@pytest.mark.parametrize("module", MODULES)
def test_optional_packages_stay_in_their_modules(module):
    for name, line in imports(module):
        allowed = OUTSIDE.get(name.split(".")[0])
        places = {module, module.split(".")[0]}
        assert allowed is None or places & allowed, f"{module}:{line} imports {name}"


def test_the_walk_sees_imports():
    """Else the tests above could not fail."""
    found = {(m, name) for m in MODULES for name, _ in imports(m)}
    assert {
        ("layers", "sleeplib.kernels"),
        ("algorithm", "sleeplib.state"),
        ("__init__", "sleeplib.tasks"),
    } <= found
    assert ("tasks.rule110", "sleeplib.tasks.rollouts") in found and (
        "kernels.fla",
        "fla.ops.simple_gla",
    ) in found


def test_import_loads_no_jupyter_no_plots_and_is_quick():
    code = """if True:
        import sys, time
        import torch
        began = time.process_time()
        import sleeplib
        print(time.process_time() - began)
        heavy = "seaborn matplotlib pandas ipywidgets IPython transformers fla jupyter_core"
        print(" ".join(name for name in heavy.split() if name in sys.modules))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, loaded = done.stdout.split("\n")[:2]
    assert loaded == "" and float(seconds) < 3
