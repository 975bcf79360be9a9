"""The built pages in headless Chromium: no error, nothing cut off, all works by touch and by keyboard."""

import functools
import gzip
import http.server
import io
import json
import re
import threading
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PHONE, TABLET, WIDE = (375, 812), (820, 1180), (1280, 900)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("site"),  # one build serves both
    pytest.mark.browser,
]

# A page is ready when it leads nowhere else and its formulas, if any, are set. MathJax comes late.
READY = """async () => !document.querySelector('meta[http-equiv="refresh" i]') &&
  (!document.querySelector('script[src*="mathjax"]') ||
    (window.MathJax?.startup?.promise ? (await MathJax.startup.promise, true) : false))"""

# Whatever reaches beyond the right edge of the page, and is not inside a box that scrolls on its own.
TOO_WIDE = """() => {
  const edge = document.documentElement.clientWidth + 1, found = [];
  if (document.documentElement.scrollWidth > edge) found.push("the page scrolls sideways");
  for (const node of document.querySelectorAll(".bd-article *")) {
    const box = node.getBoundingClientRect();
    if (!box.width || box.right <= edge) continue;
    let outer = node;
    while (outer && getComputedStyle(outer).overflowX === "visible") outer = outer.parentElement;
    if (!outer || outer === document.documentElement) found.push(`${node.tagName}.${node.className}`);
  }
  return found;
}"""
FORMULAS = """() => [...document.querySelectorAll('.bd-article mjx-container[display="true"]')]
  .filter((m) => m.scrollWidth <= m.clientWidth + 1).map((m) => m.getBoundingClientRect())
  .map((b) => [b.left, b.top + scrollY, b.right, b.bottom + scrollY])"""


@pytest.fixture
def visit(chromium, site):
    """Open a page at a size and in a theme; what goes wrong on it is collected in ``page.faults``."""
    contexts = []

    def visit(name, size=WIDE, theme="light", loaded=None, **options):
        context = chromium.new_context(viewport=dict(zip(("width", "height"), size)), **options)
        contexts.append(context)
        context.add_init_script(f"localStorage.mode = localStorage.theme = '{theme}'")
        page = context.new_page()
        page.faults = []
        page.on("console", lambda message: message.type == "error" and page.faults.append(message.text))
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.on("request", lambda asked: outside(asked.url) and page.faults.append(asked.url))
        if loaded is not None:
            page.on(
                "requestfinished",
                lambda asked: asked.url.startswith("file:") and loaded.add(local(asked.url)),
            )
        page.goto((site / f"{name}.html").resolve().as_uri())
        page.wait_for_function(READY)
        return page

    yield visit
    for context in contexts:
        context.close()


def outside(address):
    return not address.startswith(("file:", "data:", "blob:"))


def local(address):
    return Path(unquote(urlsplit(address).path))


def names(site):
    found = (path.relative_to(site).with_suffix("") for path in site.rglob("*.html"))
    return sorted(str(name) for name in found if not {"_static", "_modules"} & set(name.parts))


def test_every_page_fits_a_phone_without_an_error(visit, site):
    assert len(names(site)) > 20
    for name in names(site):
        page = visit(name, PHONE)
        assert not page.faults, f"{name}: {page.faults}"
        assert not page.evaluate(TOO_WIDE), f"{name}: {page.evaluate(TOO_WIDE)}"
        page.context.close()


def test_a_box_that_is_too_wide_is_found(visit):
    page = visit("book/intro", PHONE)
    page.evaluate("document.querySelector('.bd-article p').style.width = '900px'")
    assert page.evaluate(TOO_WIDE)


def cut_off(page):
    """Formulas that lose ink to their own box: pixels that change when the box no longer clips."""
    boxes = page.evaluate(FORMULAS)
    before = gray(page)
    page.add_style_tag(content='mjx-container[display="true"] { overflow: visible !important; }')
    after = gray(page)
    assert before.shape == after.shape
    strips = [(slice(int(t) - 12, int(b) + 12), slice(int(x), int(r))) for x, t, r, b in boxes]
    return len(boxes), sum(bool((abs(before[s] - after[s]) > 40).any()) for s in strips)


def gray(page):
    return np.asarray(Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("L")).astype(int)


@pytest.mark.parametrize("name", ["04_delta_rule", "05_chunks", "08_sleep"])
def test_no_formula_loses_ink(visit, name):
    count, cut = cut_off(visit(f"book/{name}"))
    assert count and not cut


def test_a_formula_without_room_is_found(visit):
    page = visit("book/05_chunks")
    page.add_style_tag(content='mjx-container[display="true"] { padding: 0 !important; }')
    assert cut_off(page)[1]


WIDE_FORMULAS = """() => [...document.querySelectorAll('.bd-article mjx-container[display="true"]')]
  .map((m) => [m.scrollWidth > m.clientWidth, m.tabIndex === 0, getComputedStyle(m).maskImage !== "none"])"""


def test_a_formula_wider_than_a_phone_fades_until_its_end_and_scrolls_by_keyboard(visit):
    page = visit("book/05_chunks", PHONE)
    page.wait_for_selector(".goes-on")
    found = page.evaluate(WIDE_FORMULAS)
    assert {wide for wide, *_ in found} == {True, False}
    assert all(wide == reached == faded for wide, reached, faded in found)
    formula = page.locator(".goes-on").first.element_handle()
    formula.focus()
    for _ in range(60):
        page.keyboard.press("ArrowRight")
    page.wait_for_function("(m) => m.scrollLeft > 0 && getComputedStyle(m).maskImage === 'none'", arg=formula)
    page.set_viewport_size(dict(zip(("width", "height"), WIDE)))
    page.wait_for_function(f"() => !({WIDE_FORMULAS})().flat().includes(true)")


# Formulas in the text that the mark after them has left: it stands on another line.
LEFT_BEHIND = """() => [...document.querySelectorAll(".bd-article p span.math")].filter((formula) => {
  const after = formula.nextSibling;
  if (after?.nodeType !== Node.TEXT_NODE || !/^[.,:;!?)]/.test(after.data)) return false;
  const mark = document.createRange();
  mark.setStart(after, 0);
  mark.setEnd(after, 1);
  return mark.getBoundingClientRect().left < formula.getBoundingClientRect().right - 2;
}).length"""


@pytest.mark.parametrize("name", ["03_fast_weights", "04_delta_rule", "08_sleep"])
def test_a_comma_stays_with_its_formula(visit, name):
    page = visit(f"book/{name}", PHONE)
    for width in range(320, 420, 5):
        page.set_viewport_size({"width": width, "height": 812})
        assert not page.evaluate(LEFT_BEHIND), width
    page.add_style_tag(content='span[style*="nowrap"] { white-space: normal !important; }')
    widths = []
    for width in range(320, 420, 5):
        page.set_viewport_size({"width": width, "height": 812})
        widths.append(page.evaluate(LEFT_BEHIND))
    assert any(widths)


@pytest.mark.parametrize("size", [PHONE, TABLET])
def test_both_menus_open_by_touch(visit, size):
    page = visit("book/08_sleep", size, has_touch=True)
    page.locator("button.primary-toggle:visible").tap()
    page.locator("#pst-primary-sidebar-modal[open]").wait_for()
    page.locator("#pst-primary-sidebar-modal a:visible", has_text="Streaming").tap()
    page.wait_for_url("**/09_streaming.html")
    page.locator("button.secondary-toggle:visible").tap()
    page.locator("#pst-secondary-sidebar-modal[open] a:visible").first.tap()
    assert "#" in page.url and not page.faults


def test_wide_all_columns_of_a_table_and_of_a_line_of_code_are_in_sight(visit):
    page = visit("book/notation")
    hidden = """() => [...document.querySelectorAll(".bd-article table")]
      .filter((table) => table.scrollWidth > table.parentElement.clientWidth + 1).length"""
    assert page.locator(".bd-article table").count() == 3 and not page.evaluate(hidden)
    page = visit("book/08_sleep")
    page.locator(".bd-article .cell:not(.tag_hide-input) .cell_input pre").first.evaluate(
        "box => { box.textContent = 'x'.repeat(84); box.id = 'wide' }"  # as wide as a cell may be
    )
    assert page.evaluate("wide.scrollWidth <= wide.clientWidth")


@pytest.fixture
def server(site):
    """The pages over HTTP: a search shows excerpts, which a browser does not fetch from files."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_wide_the_menu_is_open_and_the_search_finds(visit, server):
    page = visit("book/intro")
    assert page.locator("#pst-primary-sidebar a:visible", has_text="8. Sleep").count()
    page.goto(f"{server}/book/intro.html")
    page.keyboard.press("Control+k")
    page.keyboard.type("hippocampus")
    page.keyboard.press("Enter")
    page.wait_for_url("**/search.html?q=hippocampus*")
    page.locator("#search-results li").first.wait_for()
    assert all(fault.startswith(server) for fault in page.faults)


def test_a_click_on_a_solutions_title_opens_it_and_does_not_leave(visit):
    page = visit("book/08_sleep")
    solution = page.locator(".solution").first
    body = solution.locator("> *:not(.admonition-title)").first
    title, address = solution.locator(".admonition-title"), page.url
    assert not body.is_visible()
    title.scroll_into_view_if_needed()
    box = title.locator("a").bounding_box()  # on the very words that link to the exercise
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    body.wait_for(state="visible")
    assert page.url == address


def test_sliders_move_by_keyboard(visit):
    page = visit("book/08_sleep")
    figure = page.locator("figure.sl-frames").first
    slider = figure.get_by_role("slider", name="Passes", exact=True)
    slider.focus()
    page.keyboard.press("ArrowRight")
    assert slider.get_attribute("aria-valuetext") == figure.locator("output").inner_text() == "2"
    shown = figure.locator("img").evaluate_all("all => all.map((one) => one.style.display !== 'none')")
    assert shown.index(True) == 1 and sum(shown) == 1


def test_a_prediction_stays_beside_the_measured_curve(visit):
    page = visit("book/11_rule110", PHONE, has_touch=True)
    figure = page.locator("figure.sl-predict").first
    guess = figure.locator(".sl-guess").get_attribute("points")
    figure.locator("input").first.fill("90")
    assert figure.locator(".sl-guess").get_attribute("points") != guess
    assert not figure.locator(".sl-measured").is_visible()
    figure.locator("summary").tap()
    figure.locator(".sl-measured").wait_for(state="visible")
    assert "off by" in figure.locator("output").last.inner_text()
    measured = json.loads(figure.get_attribute("data-measured"))
    for slider, share in zip(figure.locator("input").all(), measured):
        slider.fill(str(round(100 * share)))
    assert "off by 0.00" in figure.locator("output").last.inner_text()  # the verdict follows the guess


@pytest.mark.parametrize("size, options", [(PHONE, {"has_touch": True}), (WIDE, {})])
def test_the_lab_by_touch_and_by_keyboard(visit, size, options):
    page = visit("book/lab", size, **options)
    lab = page.locator("#sleep-lab")
    page.locator("[data-ready=yes]").wait_for()
    cell = lab.locator(".lab-cell").first
    before = cell.get_attribute("aria-pressed")
    if options:
        cell.tap()
    else:
        cell.focus()
        page.keyboard.press("Enter")
    assert lab.locator(".lab-cell").first.get_attribute("aria-pressed") != before
    assert re.search(r"\d+\.\d %", lab.locator(".lab-result").inner_text()) and not page.faults


def test_the_labs_film_stops_where_it_is_told(visit):
    page = visit("book/lab")
    page.locator("[data-ready=yes]").wait_for()
    play, slider = page.get_by_role("button", name="Play"), page.locator("#lab-moment")
    for stop in (lambda: page.get_by_role("button", name="Pause").click(), lambda: slider.fill("1")):
        play.click()
        stop()
        stopped = slider.input_value()
        page.wait_for_timeout(1500)  # a step of the film takes 0.9 s
        assert slider.input_value() == stopped and play.is_visible()
    assert not page.faults


MOMENT = "document.getElementById('nap-moment').value"


def test_the_moving_picture_moves_and_pauses_by_keyboard(visit):
    page = visit("book/intro")
    page.locator("#nap .nap-stage").scroll_into_view_if_needed()
    page.wait_for_function(f"{MOMENT} >= 3")  # it starts by itself
    assert page.evaluate("document.querySelectorAll('#nap .nap-full').length") >= 2
    page.locator("#nap button").focus()
    page.keyboard.press("Enter")
    stopped = page.evaluate(MOMENT)
    page.wait_for_timeout(1500)
    assert page.evaluate(MOMENT) == stopped and page.locator("#nap button").inner_text() == "Play"
    page.keyboard.press("Enter")
    page.wait_for_function(f"{MOMENT} != {stopped}")
    page.locator("#nap-moment").press("End")
    assert "The model says" in page.locator("#nap-moment").get_attribute("aria-valuetext")
    assert "emptied" in page.locator("#nap .nap-stage").get_attribute("aria-label") and not page.faults


def test_the_moving_picture_stands_still_where_motion_is_unwanted(visit):
    page = visit("book/intro", PHONE, reduced_motion="reduce")
    page.locator("#nap .nap-stage").scroll_into_view_if_needed()
    first = page.evaluate(MOMENT)
    page.wait_for_timeout(2500)  # the first wait is 1.5 s
    assert page.evaluate(MOMENT) == first and "The model says" in page.locator("#nap .nap-said").inner_text()
    drawn = page.evaluate("""() => { const c = document.querySelector('#nap canvas');
        return c.getContext('2d').getImageData(0, 0, c.width, c.height).data.filter((x) => x).length }""")
    assert drawn > 1000


def test_print_hides_nothing(visit):
    page = visit("book/08_sleep", theme="dark")
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    closed, hidden, wrap, ground = page.evaluate(
        """() => [document.querySelectorAll(".bd-article details:not([open])").length,
             document.querySelectorAll(".bd-article .toggle-hidden").length,
             getComputedStyle(document.querySelector(".bd-article pre")).whiteSpace,
             getComputedStyle(document.querySelector(".bd-article")).backgroundColor]"""
    )
    assert (closed, hidden, wrap, ground) == (0, 0, "pre-wrap", "rgb(255, 255, 255)")
    assert not page.evaluate("""() => [...document.querySelectorAll(".bd-article pre")]
        .filter((box) => box.scrollWidth > box.clientWidth + 1).length""")
    pale = page.evaluate(r"""() => [...document.querySelectorAll(
            ".bd-article :is(p, li, td, th, figcaption, code, a, h2, .admonition-title)")]
        .filter((one) => one.textContent.trim() && one.offsetParent)
        .filter((one) => getComputedStyle(one).color.match(/\d+/g).slice(0, 3).some((x) => x > 118))
        .map((one) => one.outerHTML.slice(0, 80))""")
    assert not pale  # at most #767676, 4.5 to 1 on white


PAGES = ["intro", "lab", "03_fast_weights", "11_rule110", "15_argument", "api", "references"]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_axe_finds_nothing_serious(visit, name, theme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = visit(f"book/{name}", theme=theme)
    found = axe.run(page, options={"resultTypes": ["violations"]}).response["violations"]
    serious = [
        (one["id"], one["nodes"][0]["target"], one["help"])
        for one in found
        if one["impact"] in ("serious", "critical")
    ]
    assert not serious


def test_axe_finds_a_planted_fault(visit):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = visit("book/intro")
    page.evaluate("document.querySelector('.bd-article p').style.color = '#ddd'")
    found = axe.run(page, options={"resultTypes": ["violations"]}).response["violations"]
    assert "color-contrast" in {one["id"] for one in found}


def test_a_page_weighs_less_than_1500_kilobytes(visit, site):
    """With everything that it loads, as a server sends it: text is compressed, fonts are already.

    The sleep lab brings two trained models along, and may weigh 2 MB.
    """
    for name in names(site):
        page = visit(name, loaded=(files := set()))
        size = 0
        for path in files:
            data = path.read_bytes()
            size += len(data if path.suffix.startswith(".woff") else gzip.compress(data, 5))
        assert size < (2_000_000 if name == "book/lab" else 1_500_000), f"{name}: {size}"
        page.context.close()
