"""The notebooks for Colab are made from the chapters' sources, and nothing of MyST is left in them."""

import ast
import re
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "book"))
from build import inputs, sources  # noqa: E402
from runners import FOLDED, OUT, Converter  # noqa: E402


@pytest.fixture(scope="module")
def convert():
    return Converter()


@pytest.mark.parametrize("source", sources(), ids=lambda s: s.stem)
def test_a_runner_is_current_and_plain(convert, source):
    notebook = nbformat.read(OUT / f"{source.stem}.ipynb", as_version=4)
    assert inputs(notebook) == inputs(convert(source)), "run python book/runners.py"
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not re.findall(r"\{[a-z-]+\}`|^`{3,}\{|^:[a-z]+:", prose, re.MULTILINE)
    assert prose.count("<details>") == prose.count("</details>")
    assert not any(cell.outputs or cell.metadata.get("tags") for cell in code)
    for cell in code:
        ast.parse(cell.source)
    # Every exercise keeps its title, its stub in the open, and its solution folded.
    exercises = prose.count("### Exercise: ")
    folded = [cell.source for cell in code if cell.metadata.get("cellView") == "form"]
    assert exercises == source.read_text().count("{exercise-start}")
    assert sum(FOLDED["exercise-solution"] in text for text in folded) == exercises
    shown = [cell.source for cell in code if cell.source not in folded]
    assert not any(re.search(r"def \w+_(solution|mistake)\(", text) for text in shown)


def test_the_first_cell_says_in_one_line_what_went_wrong(convert, capsys):
    class Failed:
        returncode, stderr = 1, "something\nERROR: no network\n"

    import importlib.util
    import subprocess

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        patch.setattr(subprocess, "run", lambda *a, **k: Failed)
        exec(compile(convert.setup, "setup", "exec"), {})
    assert capsys.readouterr().out == "sleeplib could not be installed: ERROR: no network\n"


def test_a_chapter_on_transformers_brings_them(convert):
    for source in sources():
        first = next(cell.source for cell in convert(source).cells if cell.cell_type == "code")
        assert first == convert.setup + (convert.more if source.stem == "16_pretrained" else "")
    assert '"transformers>=5.23", "peft' in convert.more and "--upgrade" not in convert.more


def test_what_does_not_exist_is_refused(convert):
    with pytest.raises(ValueError, match="there is no page 'nowhere'"):
        convert.inline("{doc}`there <nowhere>`")
    with pytest.raises(KeyError):
        convert.inline("{cite}`nobody1900nothing`")
    assert convert.inline("{cite}`vaswani2017attention`").startswith(
        "([Vaswani et al. 2017](https://arxiv.org/abs/"
    )


def test_terms_become_links_and_functions_become_code(convert):
    glossary = f"{convert.base}/book/glossary.md"
    assert convert.inline("the {term}`caches <cache>`, a {term}`cache`") == (
        f"the [caches]({glossary}), a [cache]({glossary})"
    )
    assert convert.inline("{py:func}`~sleeplib.kernels.softmax_attention`") == "`softmax_attention`"
    assert convert.inline("{py:func}`sl.sleep <sleeplib.algorithm.sleep>`") == "`sl.sleep`"
