"""The wheel: built, installed alone, imported where there is no repository."""

import json
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TRACKED = subprocess.run(
    ["git", "-C", str(ROOT), "ls-files", "sleeplib", "data"], capture_output=True, text=True
).stdout.split()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of a copy of the tree, so that the build leaves nothing behind."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in TRACKED:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("sleeplib-*.whl")
    return path


def test_the_wheel_holds_the_package_and_its_data_and_nothing_else(wheel):
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    assert all(n.startswith("sleeplib/") for n in names)
    kinds = (".md", ".json", ".csv", ".safetensors")
    wanted = {n for n in TRACKED if n.startswith("sleeplib/") and n.endswith(".py")}
    wanted |= {f"sleeplib/{n}" for n in TRACKED if n.startswith("data/") and n.endswith(kinds)}
    assert wanted <= names, wanted - names
    assert all(n.endswith((".py", *kinds)) for n in names)
    license_files = [n for n in zipfile.ZipFile(wheel).namelist() if n.endswith("licenses/LICENSE")]
    assert license_files


@pytest.mark.slow
def test_the_wheel_works_alone(wheel, tmp_path):
    """Only the wheel and the five packages that it names: everything else is hidden from the interpreter."""
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
    ]
    subprocess.run([*pip, str(wheel)], check=True)
    hidden = (
        "seaborn matplotlib pandas ipywidgets IPython transformers jupyter_core hypothesis pytest".split()
    )
    code = f"""if True:
        import sys
        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in {hidden!r}:
                    raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
        sys.meta_path.insert(0, Absent())
        sys.path[:] = [p for p in sys.path if "site-packages" not in p]
        sys.path[:0] = [{str(target)!r}, {sysconfig.get_paths()["purelib"]!r}]
        import json, runpy, torch
        import sleeplib as sl
        from sleeplib import records
        model = sl.HybridLM(sl.ModelConfig(vocab_size=4, d_model=16, num_heads=2))
        sleeper = sl.Sleeper(model, window=4, passes=2)
        sleeper.feed(torch.zeros(1, 9, dtype=torch.int64))
        data = records.data_dir()
        found = dict(
            where=sl.__file__, naps=sleeper.naps, data=str(data),
            sample=json.loads((data / "samples" / "rule110.json").read_text())[0]["task"],
            loaded=[name for name in {hidden!r} if name in sys.modules],
        )
        print(json.dumps(found))
        sys.argv = ["sleeplib", "list"]
        runpy.run_module("sleeplib", run_name="__main__")
    """
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=elsewhere, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    found = json.loads(first)
    assert found["where"] == str(target / "sleeplib" / "__init__.py")
    assert found["data"] == str(target / "sleeplib" / "data") and found["sample"] == "default"
    assert found["naps"] == 2 and found["loaded"] == []
    assert rest[0].startswith("rule110-quick")
    assert not list(elsewhere.iterdir())
