"""Compiled kernels on disk: fresh after a change of any source, not needed where none can be kept."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sleeplib

KERNELS = Path(sleeplib.__file__).parent / "kernels"


def python(code, **env):
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_change_in_an_imported_file_makes_a_kernel_stale(tmp_path):
    """`exp` of jit.py is compiled into the kernel of gate.py."""
    package = tmp_path / "package" / "kernels"
    shutil.copytree(KERNELS, package, ignore=shutil.ignore_patterns("__pycache__", "__init__.py"))
    (package / "__init__.py").write_text("")
    for name in ("checks.py", "threads.py"):
        shutil.copy(KERNELS.parent / name, package.parent)
    code = """if True:
        import torch
        from package.kernels import gate
        y = gate.swiglu(torch.ones(1, 2)).item()
        print(round(y, 3), sum(gate._forward.stats.cache_hits.values()))
    """
    env = dict(PYTHONPATH=str(tmp_path), NUMBA_CACHE_DIR=str(tmp_path / "cache"))
    assert python(code, **env) == "0.731 0"
    assert python(code, **env) == "0.731 1"
    source = (package / "jit.py").read_text()
    changed = source.replace("(series * r * r + r + one)", "(0 * series + one)", 1)
    assert changed != source
    (package / "jit.py").write_text(changed)
    # e^-1 is 2^-1 e^-0.31 there: without the series one half, and 1 / (1 + 1/2) of 1 is 0.667
    assert python(code, **env) == "0.667 0"


def test_nothing_needs_a_folder_that_can_be_written():
    """No folder at import, and a full disk at the first call."""
    code = """if True:
        import numba.core.caching as caching
        def full(self, *args):
            raise OSError(28, "No space left on device")
        {fault}
        import torch, sleeplib as sl
        print(round(sl.kernels.swiglu(torch.ones(1, 2)).item(), 3))
    """
    for fault in (
        "caching._CacheLocator.ensure_cache_path = full",
        "caching.IndexDataCacheFile._save_index = full",
    ):
        assert python(code.format(fault=fault), NUMBA_CACHE_DIR="") == "0.731"


POOL = "import sleeplib.kernels.jit as jit; print(jit._pool()._max_workers)"


def test_it_imports_where_there_is_neither_fork_nor_affinity():
    code = f"import os, torch, numba; del os.register_at_fork, os.sched_getaffinity; {POOL}"
    assert int(python(code)) == os.cpu_count()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system binds no process to a core")
def test_the_pool_has_a_thread_for_each_core_that_is_ours():
    core = min(os.sched_getaffinity(0))
    assert python(f"import os; os.sched_setaffinity(0, {{{core}}}); {POOL}") == "1"
