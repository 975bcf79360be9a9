"""Slides: every piece is in its chapter, a page needs nothing else, and nothing runs over its edge."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "course"))
import slides  # noqa: E402

OVER = """() => [...document.querySelectorAll("section")].flatMap((s, i) =>
  [...s.querySelectorAll(".parts, .parts > div, .top")].some((e) =>
    e.scrollHeight > e.clientHeight + 2 || e.scrollWidth > e.clientWidth + 2) ? [i + 1] : [])"""


@pytest.fixture(scope="module")
def decks(tmp_path_factory):
    return slides.build(tmp_path_factory.mktemp("slides"))


def test_a_page_needs_nothing_else(decks):
    assert len(decks) == 4
    for path in decks:
        page = path.read_text()
        assert page.count("<section") >= 10 and "<math" in page and "{cite}" not in page
        assert not re.search(r'(?:src|href)="(?!data:)', page) and "@import" not in page
        assert not re.search(r"<mi>&amp;|<mi>&<|\\[a-z]+\{", page), "a formula was not understood"


@pytest.mark.browser
def test_nothing_runs_over_the_edge(decks, chromium):
    page = chromium.new_page(viewport={"width": 1280, "height": 720})
    for path in decks:
        page.goto(path.as_uri())
        assert page.evaluate(OVER) == [], path.name
        page.keyboard.press("End")
        assert page.evaluate("now()") == page.evaluate("all.length") - 1


def test_the_guide_counts_the_pages(decks):
    guide = (ROOT / "course" / "GUIDE.md").read_text()
    for path in decks:
        assert f"slides `{path.stem}`: {path.read_text().count('<section')} pages" in guide


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        ("text", "These words are in no chapter", "begins in 0 places"),
        ("text", "The", "places, not in one"),
        ("text", "Two things go from pass to pass ... nowhere", "does not end so"),
        ("code", "no_such_function", "no_such_function"),
        ("output", "nothing prints this", "no cell prints"),
        ("figure", "no such picture", "no figure"),
    ],
)
def test_a_missing_piece_is_an_error(kind, words, message):
    with pytest.raises(slides.Missing, match=message):
        slides.part("08_sleep", kind, words)
