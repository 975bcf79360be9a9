"""Interactive figures carry all they need, and say the same thing to every reader."""

import io
import json
import subprocess
import sys
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
from bs4 import BeautifulSoup
from PIL import Image

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from sleeplib import plots, widgets


def draw(t):
    fig, ax = plt.subplots(figsize=(4, 2))
    ax.plot([0, 1], [0, t])
    return fig


def page(count=3, **options):
    slider = widgets.frame_slider(
        [draw(t) for t in range(count)],
        [f"t = {t}" for t in range(count)],
        "A line at",
        'A "line" & time',
        **options,
    )
    return slider._repr_html_()


def test_frames_labels_and_alt_texts():
    soup = BeautifulSoup(page(), "html.parser")
    images = soup.find_all("img")
    assert [i["alt"] for i in images] == ["A line at t = 0", "A line at t = 1", "A line at t = 2"]
    assert ["display:none" in i["style"] for i in images] == [False, True, True]
    assert all(i["src"].startswith("data:image/webp;base64,") for i in images)
    control = soup.find("input")
    assert control["type"] == "range" and (control["min"], control["max"]) == ("0", "2")
    assert control["aria-valuetext"] == "t = 0"
    label, output = soup.find("label"), soup.find("output")
    assert [label["for"]] == output["for"] == [control["id"]]
    assert label.text == 'A "line" & time' and not label.find("output"), "a name, without the value"
    assert control["id"] != BeautifulSoup(page(2), "html.parser").find("input")["id"]
    assert json.loads(soup.find("figure")["data-labels"]) == ["t = 0", "t = 1", "t = 2"]
    assert soup.find("output").text == "t = 0"


def test_no_network_no_kernel_no_chance():
    text = page()
    assert "http" not in text and "<script" not in text
    assert text == page(), "the same figures give the same bytes"
    soup = BeautifulSoup(text, "html.parser")
    assert soup.find("figure")["id"].startswith("frames-")


def test_frames_are_small_and_opaque():
    data = plots.picture(draw(1))
    image = Image.open(io.BytesIO(data))
    assert image.format == "WEBP" and len(data) < 10_000
    pixels = np.asarray(image.convert("RGBA"))
    assert (pixels[..., 3] == 255).all() and (pixels[0, 0] == 255).all()
    assert not plt.get_fignums(), "figures are closed"


def test_only_charts_of_lines_turn_dark():
    def kind(fig, alt, caption=""):
        return BeautifulSoup(plots.img(fig, alt, caption), "html.parser").img.get("class")

    assert kind(draw(1), "A line") == ["sl-chart"]
    for words in ("Beyond the black line it fails.", "Palest is best", "greys", "A light-cone", "Darker"):
        assert kind(draw(1), "A line", words) is None
    for words in ("A palette", "Lightning", "A blacklist", "whitespace"):
        assert kind(draw(1), "A line", words) == ["sl-chart"]
    fig, ax = plt.subplots()
    ax.imshow(np.eye(3))
    assert kind(fig, "A map") is None
    fig, ax = plt.subplots()
    ax.pcolormesh(np.eye(3))
    assert kind(fig, "A map") is None


def test_colours_of_n_survive_the_palette():
    plots.use_style()
    fig, ax = plt.subplots()
    x = np.linspace(0, 1, 20)
    for n in (1, 2, 3, 4):
        plots.band(ax, x, [x**n, x**n + 0.1], color=plots.COLORS[n])
    pixels = np.asarray(Image.open(io.BytesIO(plots.picture(fig))).convert("RGB")).reshape(-1, 3).astype(int)
    for n in (1, 2, 3, 4):
        wanted = np.array([int(plots.COLORS[n][i : i + 2], 16) for i in (1, 3, 5)])
        assert abs(pixels - wanted).sum(1).min() <= 24, f"N = {n}"


@pytest.mark.parametrize(
    ("frames", "labels", "alt"),
    [(0, [], "x"), (2, ["a"], "x"), (1, ["a"], ["x", "y"]), (1, ["a"], ""), (1, ["a"], [" "])],
)
def test_bad_sliders_are_refused(frames, labels, alt):
    with pytest.raises(ValueError, match="alt"):
        widgets.frame_slider([draw(t) for t in range(frames)], labels, alt, "t")
    plt.close("all")


def test_show_wants_alt_text():
    with pytest.raises(ValueError, match="alt"):
        plots.show(draw(1), alt=" ")
    plt.close("all")


def test_interact_or_frames_shows_frames_without_a_kernel(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda *a, **k: shown.extend(a))
    monkeypatch.setattr("ipywidgets.interact", lambda *a, **k: pytest.fail("no kernel is live"))
    widgets.interact_or_frames(draw, "t", range(2), alt="A line at", title="Time")
    (slider,) = shown
    assert BeautifulSoup(slider._repr_html_(), "html.parser").label.text == "Time"
    assert "2 frames" in repr(slider) and 'alt="A line at t = 1"' in slider._repr_html_()


def test_interact_or_frames_adds_interact_where_a_kernel_is_live(monkeypatch):
    shown, moved = [], {}
    monkeypatch.setattr("IPython.display.display", lambda *a, **k: shown.extend(a))
    monkeypatch.setattr("ipywidgets.interact", lambda f, **k: moved.update(k) or f(t=1))
    monkeypatch.setattr(widgets, "building", lambda: False)
    widgets.interact_or_frames(draw, "t", range(2), alt=lambda t: f"A line to {t}", live=(0, 9))
    assert moved == {"t": (0, 9)}
    assert isinstance(shown[0], widgets.FrameSlider) and isinstance(shown[1], plt.Figure)
    plt.close("all")


def test_a_build_counts_as_no_kernel(monkeypatch):
    monkeypatch.setenv("SLEEPLIB_BUILDING", "1")
    assert widgets.building()
    monkeypatch.delenv("SLEEPLIB_BUILDING")
    assert widgets.building(), "outside IPython nothing is live"


def test_records_are_drawn_as_one_band_for_each_n():
    point = {"step": 0, "tokens": 0, "loss": 1.0, "metrics": {"exact": 0.1}}
    record = {
        "curve": [point, {**point, "tokens": 9, "step": 1}],
        "chance": {"exact": 0.0625},
        "device": "cpu",
    }
    record |= {"commit": "abcdef123", "dirty": False}
    records = [{**record, "passes": n, "seed": s} for n in (1, 4) for s in (0, 1)]
    fig, ax = plt.subplots()
    plots.draw_records(ax, records)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["N = 1", "N = 4", "guessing"]
    assert len(ax.collections) == 2
    assert plots.provenance(records) == "device: cpu; commit: abcdef1; seeds: 2"
    assert plots.provenance([]) == "not run yet"
    plt.close(fig)


def test_runs_of_one_n_are_averaged_at_the_steps_that_they_share():
    def run(*steps):
        points = [{"step": s, "tokens": 9 * s, "metrics": {"exact": s / 100}} for s in steps]
        return {"curve": points, "passes": 1, "chance": {}}

    fig, ax = plt.subplots()
    plots.draw_records(ax, [run(50, 100), run(10, 20, 50)])
    assert ax.lines[0].get_xydata().tolist() == [[450.0, 0.5]]
    with pytest.raises(ValueError, match="records: .* N = 1 were measured at no step that they share"):
        plots.draw_records(ax, [run(50, 100), run(10, 20)])
    plt.close(fig)


def test_a_trainer_and_its_curve_are_drawn_like_a_record():
    points = [{"step": s, "tokens": 9 * s, "loss": 1.0, "metrics": {"exact": 0.1 * s}} for s in (1, 2)]
    task = SimpleNamespace(chance=lambda: {"exact": 0.5})
    trainer = SimpleNamespace(curve=points, passes=4, experiment=SimpleNamespace(task=task))
    record = {"curve": points, "passes": 4, "chance": {"exact": 0.5}}
    for runs in (record, trainer, [trainer], points):
        fig, ax = plt.subplots()
        plots.draw_records(ax, runs)
        labels = ["this run"] if runs is points else ["N = 4", "guessing"]
        assert [t.get_text() for t in ax.get_legend().get_texts()] == labels
        assert ax.lines[0].get_xydata().tolist() == [[9.0, 0.1], [18.0, 0.2]]
        plt.close(fig)


def test_sleeplib_itself_imports_no_plots():
    code = "import sys, sleeplib; sys.exit(bool({'seaborn', 'ipywidgets', 'IPython'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_prediction_hides_what_was_measured_until_it_is_asked_for():
    page = widgets.predict(["t = 4", "a < b"], [1.0, 0.25], "How many?")._repr_html_()
    soup = BeautifulSoup(page, "html.parser")
    assert soup.find(class_="sl-measured")["style"] == "display:none"
    assert [i["aria-label"] for i in soup.find_all("input")] == ["your guess at t = 4", "your guess at a < b"]
    assert json.loads(soup.figure["data-measured"]) == [1.0, 0.25]
    assert "t = 4: 1.00, a < b: 0.25" in soup.details.p.text
    assert "points" in soup.find(class_="sl-guess").attrs and "http" not in page
    for labels, measured in ((["a"], [0.5]), (["a", "b"], [0.5]), (["a", "b"], [0.5, 1.5])):
        with pytest.raises(ValueError, match="^(labels|measured)"):
            widgets.predict(labels, measured, "?")
