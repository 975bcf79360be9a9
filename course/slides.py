"""Slides from the book: ``make slides`` writes _build/course/slides/NAME.html, one file for each lecture.

course/slides.yml says what is on a slide.  Every part of it is a piece of a chapter, found by its first
words, so that a slide cannot say what the book does not; a piece that is no longer there is an error.  A file
holds all that it needs, pictures as data and formulas as MathML, and needs no library.
"""

import ast
import functools
import re
import sys
from html import escape
from pathlib import Path

import nbformat
import yaml
from bs4 import BeautifulSoup
from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from sleeplib.records import write_atomically

ROOT = Path(__file__).resolve().parent.parent
DECKS = Path(__file__).resolve().parent / "slides.yml"
BUILT = ROOT / "_build" / "course" / "slides"
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width">
<style>{style}</style></head><body>
{slides}
<script>
const all = [...document.querySelectorAll("section")];
const now = () => all.findIndex((s) => s.getBoundingClientRect().bottom > innerHeight / 2);
const go = (n) => all[Math.min(Math.max(n, 0), all.length - 1)].scrollIntoView();
addEventListener("keydown", (e) => {{
  const forward = ["ArrowRight", "ArrowDown", "PageDown", " "].includes(e.key);
  const step = forward - ["ArrowLeft", "ArrowUp", "PageUp"].includes(e.key);
  if (step) {{ e.preventDefault(); go(now() + step); }}
  if (e.key === "Home" || e.key === "End") {{ e.preventDefault(); go(e.key === "Home" ? 0 : all.length); }}
}});
</script></body></html>
"""
STYLE = (Path(__file__).resolve().parent / "slides.css").read_text()


class Missing(ValueError):
    """A slide asks for a piece that its chapter does not have."""


@functools.cache
def chapter(name):
    """A chapter's text and its code cells."""
    notebook = nbformat.read(ROOT / "book" / f"{name}.ipynb", as_version=4)
    text = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    text = re.sub(r"\s*\{cite\}`[^`]*`", "", text)
    text = re.sub(r"\{[\w:]+\}`~?([^`<]*?)\s*(?:<[^`]*>)?`", r"\1", text)  # a link is its words
    return text, [cell for cell in notebook.cells if cell.cell_type == "code"]


def quote(name, words):
    """The text of a chapter from these words to the end of their block; "A ... B" ends with B instead."""
    start, _, end = (r"\s+".join(map(re.escape, x.split())) for x in words.partition(" ... "))
    text = chapter(name)[0]
    places = [place.start() for place in re.finditer(start, text)]
    if len(places) != 1:
        raise Missing(f"{name}: {words!r} begins in {len(places)} places, not in one")
    found = text[places[0] :].split("\n\n")[0]
    if end:
        place = re.search(end, found)
        if not place:
            raise Missing(f"{name}: the block of {words!r} does not end so")
        found = found[: place.end()]
    return found


def code(name, function):
    """The source of a function that a chapter defines."""
    for cell in chapter(name)[1]:
        for node in ast.parse(cell.source).body if f"def {function}(" in cell.source else ():
            if isinstance(node, ast.FunctionDef) and node.name == function:
                return ast.get_source_segment(cell.source, node)
    raise Missing(f"{name} defines no function {function}")


def outputs(name):
    return [output for cell in chapter(name)[1] for output in cell.outputs]


def output(name, words):
    """What a cell printed, by its first words."""
    for found in outputs(name):
        if found.get("text", "").startswith(words):
            return found["text"]
    raise Missing(f"{name}: no cell prints {words!r}")


def figure(name, words):
    """A picture of a chapter, by the first words of its description."""
    for found in outputs(name):
        page = BeautifulSoup(found.get("data", {}).get("text/html", ""), "html.parser")
        for picture in page.select("figure.sl-figure img"):
            if picture.get("alt", "").startswith(words):
                return f'<img src="{picture["src"]}" alt="{escape(picture["alt"])}">'
    raise Missing(f"{name}: no figure is described by {words!r}")


def formula(content, options):
    content = content.replace("{aligned}", "{align*}")  # the converter knows this one
    return convert(content, display="block" if options["display_mode"] else "inline")


MARKDOWN = MarkdownIt("commonmark").enable("table").use(dollarmath_plugin, renderer=formula)
PYGMENTS = HtmlFormatter(nowrap=True, style="default")


def part(name, kind, words):
    """One part of a slide as HTML."""
    if kind in ("text", "formula"):
        return MARKDOWN.render(quote(name, words))
    if kind == "code":
        return f'<pre class="highlight">{highlight(code(name, words), PythonLexer(), PYGMENTS)}</pre>'
    return figure(name, words) if kind == "figure" else f"<pre>{escape(output(name, words).rstrip())}</pre>"


def slide(entry, number):
    """One slide: formulas on top, text to the left; code, what it prints, and pictures to the right."""
    if set(entry) != {"title", "from", "show"}:
        raise ValueError(f"slide {number}: wants title, from and show; got {', '.join(entry)}")
    top, left, right = [], [], []
    sides = dict(formula=top, text=left, code=right, output=right, figure=right)
    for piece in entry["show"]:
        ((kind, words),) = piece.items()
        if kind not in sides:
            raise ValueError(f"slide {number}: {kind} is none of {', '.join(sides)}")
        sides[kind].append(part(entry["from"], kind, words))
    columns = [f"<div>{''.join(parts)}</div>" for parts in (left, right) if parts]
    layout = "parts two" if len(columns) == 2 else "parts"
    above = f'<div class="top">{"".join(top)}</div>' if top else ""
    foot = f"<footer><span>book/{entry['from']}</span><span>{number}</span></footer>"
    title = MARKDOWN.renderInline(entry["title"])
    return f'<section><h2>{title}</h2>{above}<div class="{layout}">{"".join(columns)}</div>{foot}</section>'


def deck(entry):
    """One lecture as a page."""
    title, about = escape(entry["title"]), escape(entry["about"])
    first = f'<section class="title"><h1>{title}</h1><p>{about}</p></section>'
    slides = [first, *(slide(x, n) for n, x in enumerate(entry["slides"], 2))]
    style = STYLE + PYGMENTS.get_style_defs(".highlight") + " .highlight { background: #f4f4f4 }"
    return PAGE.format(title=title, style=style, slides="\n".join(slides))


def build(folder=BUILT):
    """Write every lecture; returns the paths."""
    written = []
    for entry in yaml.safe_load(DECKS.read_text()):
        written.append(Path(folder) / f"{entry['name']}.html")
        write_atomically(written[-1], deck(entry).encode())
    return written


if __name__ == "__main__":
    try:
        for path in build():
            print(path.relative_to(ROOT))
    except ValueError as error:
        sys.exit(f"slides.yml: {error}")
