"""The built pages, as a reader without a network gets them. SLEEPLIB_TEST_SITE=1 builds them first."""

import re
from pathlib import Path

import pytest
from bs4 import BeautifulSoup

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.xdist_group("site"), pytest.mark.slow]

# Attributes by which a page makes the browser fetch something; links that a reader follows are none.
FETCHED = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "embed": "src",
    "link": "href",
}
REMOTE = re.compile(r"^\s*(https?:)?//")


@pytest.fixture(scope="session")
def pages(site):
    files = [path for path in site.rglob("*.html") if "_static" not in path.parts]
    found = {path.relative_to(site): BeautifulSoup(path.read_text(), "html.parser") for path in files}
    assert Path("book/intro.html") in found
    return found


def test_nothing_is_fetched_from_elsewhere(pages):
    for path, soup in pages.items():
        for tag, attribute in FETCHED.items():
            for node in soup.find_all(tag, attrs={attribute: REMOTE}):
                if tag == "link" and "canonical" in node.get("rel", []):
                    continue
                pytest.fail(f"{path}: {node}")
        for script in soup.find_all("script", src=False):
            assert not re.search(r"https?://[^\"' ]+\.(m?js|css|woff2?)", script.text), (
                f"{path}: {script.text[:99]}"
            )
        for style in soup.find_all("style"):
            assert not re.search(r"url\([\"']?(https?:)?//", style.text), f"{path}: {style.text[:200]}"


def test_style_sheets_fetch_nothing_from_elsewhere(site):
    for path in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", path.read_text()), path.name


def test_every_local_file_that_a_page_asks_for_is_there(site, pages):
    for path, soup in pages.items():
        for tag, attribute in FETCHED.items():
            for node in soup.find_all(tag, attrs={attribute: True}):
                address = node[attribute].split("?")[0].split("#")[0]
                if address and not re.match(r"^(data:|https?:|//|javascript:)", address):
                    assert (site / path.parent / address).resolve().exists(), f"{path}: {address}"


def test_every_picture_has_alt_text(pages):
    for path, soup in pages.items():
        for node in soup.find_all("img"):
            assert node.get("alt", "").strip(), f"{path}: {str(node)[:200]}"


def test_mathjax_is_local_and_has_its_fonts(site, pages):
    name = re.compile("mathjax", re.IGNORECASE)
    scripts = [s["src"].split("?")[0] for soup in pages.values() for s in soup.find_all("script", src=name)]
    assert scripts and all(s.endswith("_static/vendor/mathjax/startup.js") for s in scripts)
    fonts = site / "_static/vendor/mathjax/output/chtml/fonts/woff-v2"
    assert (fonts / "MathJax_Main-Regular.woff").exists()


def test_sliders_came_through_the_build(pages):
    for path, soup in pages.items():
        for figure in soup.find_all("figure", class_="sl-frames"):
            control = figure.find("input", type="range")
            assert control and control.get("oninput"), path
            assert len(figure.find_all("img")) == int(control["max"]) + 1, path


def test_no_page_names_a_folder_of_this_machine(pages):
    for path, soup in pages.items():
        assert str(ROOT) not in str(soup), path


def test_launch_links_derive_from_the_configuration(pages):
    import yaml

    repository = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]
    name = repository["url"].removeprefix("https://github.com/")
    for source in sorted((ROOT / "book" / "src").glob("*.md")):
        soup = pages[Path("book") / f"{source.stem}.html"]
        links = [a["href"] for a in soup.find_all("a", href=re.compile("colab"))]
        assert links == [
            f"https://colab.research.google.com/github/{name}/blob/{repository['branch']}/colab/{source.stem}.ipynb"
        ]
