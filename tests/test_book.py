"""Every chapter keeps the book's promises; nothing here executes a cell."""

import ast
import importlib.util
import inspect
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup

import sleeplib

ROOT = Path(__file__).resolve().parent.parent
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text())

# Chapters that docstrings point to and that are not written yet. A chapter that exists must not stay here.
NOT_WRITTEN = set()


def load_builder():
    spec = importlib.util.spec_from_file_location("book_build", ROOT / "book" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


builder = load_builder()
SOURCES = builder.sources()
LAB_RECORDS = [s for s in SOURCES if s.stem.endswith("_lab")]
each_chapter = pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.stem)
each_lesson = pytest.mark.parametrize("source", sorted(set(SOURCES) - set(LAB_RECORDS)), ids=lambda s: s.stem)


def read(source):
    return nbformat.read(builder.target(source), as_version=4)


def code_cells(notebook):
    return [c for c in notebook.cells if c.cell_type == "code"]


def section(notebook, title):
    """The text of one section, to the next heading of its level."""
    text = "\n\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return found[1] if found else ""


def pointers():
    """Public functions of sleeplib and the chapter that their docstring names."""
    for name in getattr(sleeplib, "__all__", ()):
        found = re.search(r"^Chapter: (\w+)", inspect.getdoc(getattr(sleeplib, name)) or "", re.MULTILINE)
        if found:
            yield name, found[1]


def test_notebooks_and_sources_pair():
    assert {builder.target(s) for s in SOURCES} == set((ROOT / "book").glob("*.ipynb"))


@each_chapter
def test_the_notebook_is_built_from_its_source(source):
    assert builder.is_current(source), "run make notebooks"


def test_the_pair_test_sees_an_edit_and_a_changed_tag(tmp_path):
    source = tmp_path / "src" / "00_tiny.md"
    header = (
        "---\njupytext: {text_representation: {extension: .md, format_name: myst}}\n"
        "kernelspec: {name: python3, display_name: Python 3}\n---\n"
    )
    one, two = (f"{header}# Tiny\n\n```{{code-cell}} ipython3\n{cell}\n```\n" for cell in ("1 + 1", "1 + 2"))
    tagged = one.replace("ipython3\n", "ipython3\n:tags: [hide-input]\n\n")
    notebooks = []
    source.parent.mkdir()
    for text in (one, two, tagged):
        source.write_text(text)
        notebooks.append(builder.inputs(builder.assemble(source)))
    assert notebooks[0] != notebooks[1] and notebooks[0] != notebooks[2]


def test_normalising_is_idempotent_and_forgets_chance():
    def noisy(identity, pieces):
        cell = nbformat.v4.new_code_cell(
            "x", id="a", execution_count=7, metadata={"execution": {"t": identity}}
        )
        cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=t) for t in pieces]
        view = {"application/vnd.jupyter.widget-view+json": {"model_id": identity}}
        cell.outputs.append(nbformat.v4.new_output("display_data", data=view))
        return builder.normalise(nbformat.v4.new_notebook(cells=[cell]))

    one, two = noisy("a1" * 16, ["0\n", "1\n"]), noisy("b2" * 16, ["0\n1\n"])
    assert nbformat.writes(one) == nbformat.writes(two) == nbformat.writes(builder.normalise(one))
    assert one.cells[0].execution_count == 1


@each_chapter
def test_size_and_privacy(source):
    content = builder.target(source).read_text()
    assert len(content.encode()) <= builder.LIMIT
    assert not re.search(r"/home/\w+|/root/|/Users/\w+|site-packages", content), "a folder of some machine"


@each_chapter
def test_the_first_code_cell_is_the_bootstrap(source):
    first = code_cells(read(source))[0]
    assert first.source == builder.bootstrap_cell().source
    assert first.metadata.tags == ["hide-input"]
    assert first.outputs == []


@each_chapter
def test_every_cell_ran_once_and_in_order(source):
    cells = code_cells(read(source))
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        errors = [o for o in cell.outputs if o.output_type == "error"]
        assert not errors or "raises-exception" in cell.metadata.get("tags", [])


@each_chapter
def test_few_outputs_are_ignored_and_an_assert_follows_each(source):
    cells = code_cells(read(source))
    ignored = [i for i, c in enumerate(cells) if "nbval-ignore-output" in c.metadata.get("tags", [])]
    assert 10 * len(ignored) <= len(cells), f"{len(ignored)} of {len(cells)} code cells are not compared"
    for i in ignored:
        assert i + 1 < len(cells) and "assert" in cells[i + 1].source, f"not asserted: {cells[i].source}"
    assert not any("nbval-skip" in c.metadata.get("tags", []) for c in cells)


@each_chapter
def test_every_picture_has_alt_text(source):
    for cell in code_cells(read(source)):
        for output in cell.outputs:
            data = output.get("data", {})
            if any(kind.startswith("image/") for kind in data):
                alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt")
                assert alt, f"use sleeplib.plots.show, which wants alt text: {cell.source[:80]}"
            for img in BeautifulSoup(data.get("text/html", ""), "html.parser").find_all("img"):
                assert img.get("alt", "").strip(), cell.source[:80]


@each_chapter
def test_no_output_reaches_for_the_network(source):
    for cell in code_cells(read(source)):
        for output in cell.outputs:
            page = output.get("data", {}).get("text/html", "")
            assert not re.search(r"""(src|href)=["']?(https?:)?//""", page), cell.source[:80]


@each_chapter
def test_the_header_says_minutes_and_memory(source):
    first = read(source).cells[0].source
    assert first.startswith("# ")
    assert re.search(r"Measured: .*minute.*[MG]B", first), "say 'Measured: 5 minutes, 0.9 GB on 2 CPU cores.'"


@each_lesson
def test_functions_by_hand_are_named_where_this_lives(source):
    notebook = read(source)
    by_hand = {
        node.name
        for cell in code_cells(notebook)[1:]
        for node in ast.walk(ast.parse(re.sub(r"^\s*[%!].*$", "", cell.source, flags=re.MULTILINE)))
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_by_hand")
    }
    assert by_hand, "a chapter builds something by hand"
    home = section(notebook, "Where this lives")
    assert home, "a chapter ends with '## Where this lives'"
    assert not {name for name in by_hand if name not in home}


@pytest.mark.parametrize("source", LAB_RECORDS, ids=lambda s: s.stem)
def test_a_lab_record_lies_under_its_lesson_and_both_link_each_other(source):
    lesson = source.with_name(f"{source.stem.removesuffix('_lab')}.md")
    for page, other in ((source, lesson), (lesson, source)):
        assert f"<{other.stem}>`" in page.read_text(), f"{page.stem} does not link {other.stem}"
    parts = yaml.safe_load((ROOT / "_toc.yml").read_text())["parts"]
    under = {c["file"]: c.get("sections", ()) for part in parts for c in part["chapters"]}
    assert {"file": f"book/{source.stem}"} in under[f"book/{lesson.stem}"]


SECOND_HALF = [s for s in SOURCES if "08" <= s.stem < "16"]


@pytest.mark.parametrize("source", sorted(set(SECOND_HALF) - set(LAB_RECORDS)), ids=lambda s: s.stem)
def test_a_lesson_has_goals_a_summary_and_five_questions_with_folded_answers(source):
    text = source.read_text()
    assert "After this chapter you can\n" in text
    assert re.search(r"\{admonition\} (Summary|In short)\n", text)
    questions = re.split(r"paper and pencil", text, flags=re.IGNORECASE)[1]
    assert re.findall(r"^(?:\*\*)?([1-5])\.", questions, re.MULTILINE)[:5] == list("12345")
    assert re.search(r"\{admonition\} Answers?\n:class: dropdown", questions)


@pytest.mark.parametrize("source", SECOND_HALF, ids=lambda s: s.stem)
def test_code_in_plain_view_fits_the_page(source):
    for cell in code_cells(builder.assemble(source))[1:]:
        if "hide-input" not in cell.metadata.get("tags", []):
            assert max(map(len, cell.source.splitlines())) <= 84, cell.source[:200]


def test_every_docstring_points_to_a_chapter_that_points_back():
    written = {s.stem: s for s in SOURCES}
    assert not NOT_WRITTEN & set(written), "written by now: take it off the list"
    for name, chapter in pointers():
        assert chapter in written or chapter in NOT_WRITTEN, f"{name}: {chapter} is no chapter"
        if chapter in written:
            home = section(read(written[chapter]), "Where this lives")
            assert re.search(rf"\b{name}\b", home), f"{chapter} does not say where {name} lives"


def test_the_tag_is_this_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert CONFIG["repository"]["branch"] == f"v{version}"


def test_the_repository_is_named_in_one_place():
    url = CONFIG["repository"]["url"]
    assert f"git+{url}@{CONFIG['repository']['branch']}" in builder.bootstrap_cell().source
    folders = ((ROOT / "book", "*.md"), (ROOT / "book", "*.py"), (ROOT / "sleeplib", "*.py"))
    assert not [p for folder, kind in folders for p in folder.rglob(kind) if url in p.read_text()]


def test_the_bootstrap_leaves_the_host_alone():
    text = builder.bootstrap_cell().source
    assert "--no-deps" in text
    assert not re.search(r"torch|numpy|ipywidgets|upgrade|-U\b", text)
    # Where sleeplib is importable, the condition is false; elsewhere than on Colab too.
    condition = re.search(r"^if (.*):$", text, re.MULTILINE)[1]
    for importable, colab in ((True, False), (True, True), (False, False), (False, True)):
        util = SimpleNamespace(find_spec=lambda name, found=importable: found or None)
        modules = {"google.colab": None} if colab else {}
        names = {"importlib": SimpleNamespace(util=util), "sys": SimpleNamespace(modules=modules)}
        assert eval(condition, names) == (colab and not importable)


def test_the_table_of_contents_has_every_page():
    toc = (ROOT / "_toc.yml").read_text()
    for source in SOURCES:
        assert f"book/{source.stem}" in toc


FIRST_HALF = pytest.mark.parametrize("source", [s for s in SOURCES if s.stem < "08"], ids=lambda s: s.stem)


@FIRST_HALF
def test_goals_a_summary_and_five_answered_questions(source):
    text = source.read_text()
    assert re.search(r"^After this chapter you can$", text, re.MULTILINE)
    assert "```{admonition} Summary\n" in text
    found = re.search(
        r"^## Paper and pencil\n(.*?)^```\{admonition\} Answers\n:class: dropdown\n(.*?)^```$",
        text,
        re.MULTILINE | re.DOTALL,
    )
    assert found, "five questions, and a folded box with five answers"
    for part in found.groups():
        assert re.findall(r"^(\d+)\. ", part, re.MULTILINE) == list("12345")


@FIRST_HALF
def test_code_fits_the_page(source):
    for cell in code_cells(builder.assemble(source))[1:]:
        assert max(map(len, cell.source.splitlines())) <= 84, cell.source[:200]


def test_chapter_5_says_who_wins_on_its_clock():
    """Timings differ from build to build; the words must be those of the build that is on the page."""
    notebook = nbformat.read(ROOT / "book" / "05_chunks.ipynb", as_version=4)
    printed = "".join(o.get("text", "") for c in code_cells(notebook) for o in c.outputs)
    rows = re.findall(r"S +(\d+) x +\d+, ms:.*Numba loop +([\d.]+), PyTorch chunks +([\d.]+)", printed)
    assert [int(K) for K, _, _ in rows] == [16, 32, 64, 128] * 2
    ratios = [(int(K), float(chunks) / float(loop)) for K, loop, chunks in rows]
    assert all(ratio > 1.5 for K, ratio in ratios if K < 128)
    assert all(0.75 < ratio < 1.3 for K, ratio in ratios if K == 128)
    page = " ".join("\n".join(c.source for c in notebook.cells if c.cell_type == "markdown").split())
    assert "there loop and chunks take about the same time, forward and in training" in page
