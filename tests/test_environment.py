"""One set of versions: pyproject.toml, constraints.txt, environment.yml and what is installed agree."""

import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = ("book", "lab", "test", "pretrained", "course")


def read_pins(path):
    lines = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / path).read_text(), re.MULTILINE)
    return {canonicalize_name(name): version for name, version in lines}


def requirements(*extras):
    lines = PROJECT["dependencies"] + [line for e in extras for line in PROJECT["optional-dependencies"][e]]
    return {canonicalize_name(r.name): r.specifier for r in map(Requirement, lines)}


PINS = read_pins("constraints.txt")


def test_every_requirement_is_pinned_to_a_version_that_satisfies_it():
    for name, specifier in requirements(*EXTRAS).items():
        assert name in PINS, f"{name} has no pin in constraints.txt"
        assert specifier.contains(PINS[name]), f"{name}=={PINS[name]} is not {specifier}"


def test_colab_satisfies_the_floors():
    wanted = requirements("lab", "pretrained")
    for name, version in read_pins("constraints/colab.txt").items():
        assert wanted[name].contains(version.replace("*", "99")), (
            f"Colab's {name} {version} is below the floor"
        )
    assert wanted["torch"].contains("2.11"), "Colab's torch 2.11 is below the floor"
    assert SpecifierSet(PROJECT["requires-python"]).contains("3.13")


def test_the_core_needs_no_jupyter():
    core = requirements()
    assert set(core) == {"torch", "numpy", "numba", "safetensors", "tqdm"}


def test_environment_yml_equals_the_constraints():
    parts = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    python = next(p for p in parts if isinstance(p, str) and p.startswith("python="))
    assert SpecifierSet(PROJECT["requires-python"]).contains(python.removeprefix("python="))
    lines = next(p for p in parts if isinstance(p, dict))["pip"]
    pins = dict(line.split("==") for line in lines if "==" in line)
    assert pins == {name: PINS[name] for name in requirements(*EXTRAS)}
    assert "-c constraints.txt" in lines
    assert f"-e .[{','.join(EXTRAS)}]" in lines


@pytest.mark.skipif(Path(sys.prefix) != ROOT / ".venv", reason="not the Makefile's environment")
def test_what_is_installed_is_what_is_pinned():
    for name, version in PINS.items():
        try:
            installed = Version(metadata.version(name))
        except metadata.PackageNotFoundError:
            continue
        if name == "torch" and torch.version.cuda:
            continue  # a CUDA build is the host's choice
        assert installed.public == version, f"{name}: installed {installed}, pinned {version}"


def test_the_constraints_carry_no_local_builds_or_addresses():
    for path in ("constraints.txt", "constraints/colab.txt", "environment.yml"):
        assert not re.search(r"\+|://|@", (ROOT / path).read_text()), path


def test_the_version_is_said_once():
    import sleeplib

    version = PROJECT["version"]
    assert getattr(sleeplib, "__version__", version) == version
    said = {"CITATION.cff": "version: ", "book/intro.md": "Version ", "CHANGELOG.md": "## "}
    for path, words in said.items():
        assert f"{words}{version}" in (ROOT / path).read_text(), path
