"""Figures of the book: one style, one colour for each N, several seeds as one band, always an alt text."""

import base64
import html
import io
import re
from collections import defaultdict

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.collections import QuadMesh
from matplotlib.image import AxesImage
from PIL import Image

# N sleep passes -> colour (Okabe and Ito, told apart by colour-blind readers) and dash, for print.
COLORS = {1: "#555555", 2: "#E69F00", 3: "#009E73", 4: "#0072B2", 6: "#CC79A7", 8: "#D55E00"}
DASHES = {1: (4, 2), 2: (2, 1), 3: (5, 1, 1, 1), 4: ()}


def use_style():
    """Set the book's style: opaque white, also on dark pages, and the font that ships with matplotlib."""
    rc = {
        "figure.facecolor": "white",
        "savefig.facecolor": "white",
        "savefig.transparent": False,
        "font.family": "DejaVu Sans",
        "figure.figsize": (6.4, 3.6),
        "figure.dpi": 100,
        "figure.constrained_layout.use": True,
        "axes.titlesize": "medium",
        "lines.linewidth": 2,
        "axes.prop_cycle": plt.cycler(color=[COLORS[n] for n in (4, 2, 3, 8, 6, 1)]),
    }
    sns.set_theme(context="notebook", style="whitegrid", rc=rc)


def picture(fig, colors=64, dpi=160):
    """Render a figure to a small lossless WebP and close it.

    Parameters
    ----------
    fig : matplotlib.figure.Figure
    colors : int
        Size of the palette.
    dpi : int
        160 gives about 1.5 pixels for each pixel of a page.

    Returns
    -------
    bytes
    """
    raw, small = io.BytesIO(), io.BytesIO()
    fig.savefig(raw, format="png", dpi=dpi, facecolor="white")
    plt.close(fig)
    image = (
        Image.open(raw)
        .convert("RGB")
        .quantize(colors, method=Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE)
    )
    image.convert("RGB").save(small, format="webp", lossless=True, quality=100, method=6)
    return small.getvalue()


def is_chart(fig, words):
    """Whether a dark page may invert a figure: it holds no colour map, and its words name no shade."""
    parts = [part for ax in fig.axes for part in (*ax.images, *ax.collections)]
    maps = any(isinstance(part, AxesImage | QuadMesh) for part in parts)
    return not maps and not re.search(
        r"\b(black|white|gr[ae]y|dark|pale|light)(e?r|e?st|s)?\b", words.lower()
    )


def img(fig, alt, caption="", **options):
    """Make of a figure an HTML ``<img>`` that carries its own bytes and its alt text."""
    if not alt or not alt.strip():
        raise ValueError("alt must say what the figure shows; got an empty text")
    kind = 'class="sl-chart" ' if is_chart(fig, f"{alt} {caption}") else ""
    size = f'width="{round(fig.get_figwidth() * 110)}" style="max-width:100%;height:auto"'
    data = base64.b64encode(picture(fig, **options)).decode()
    return f'<img {kind}src="data:image/webp;base64,{data}" alt="{html.escape(alt)}" {size}>'


def show(fig, alt, caption=None, *, colors=64, dpi=160):
    """Display a figure with alt text and a caption; make it the last line of a cell.

    Parameters
    ----------
    fig : matplotlib.figure.Figure
        It is closed, so that the notebook does not draw it a second time.
    alt : str
        What a reader who cannot see the figure needs to know.
    caption : str, optional
        What to see in it.
    colors, dpi : int
        As in :func:`picture`.

    Raises
    ------
    ValueError
        If `alt` is empty.
    """
    from IPython.display import display

    below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    shown = img(fig, alt, caption or "", colors=colors, dpi=dpi)
    page = f'<figure class="sl-figure" style="margin:1em 0">{shown}{below}</figure>'
    display({"text/html": page, "text/plain": f"Figure: {alt}"}, raw=True)


def band(ax, x, ys, *, color=None, label=None, **line):
    """Draw several seeds as one curve: their mean, and a band from the lowest to the highest.

    Parameters
    ----------
    ax : matplotlib.axes.Axes
    x : array_like, shape (points,)
    ys : array_like, shape (seeds, points)
    color, label
        As in ``ax.plot``.

    Returns
    -------
    matplotlib.lines.Line2D
    """
    ys = np.atleast_2d(np.asarray(ys, dtype=float))
    (curve,) = ax.plot(x, ys.mean(0), color=color, label=label, **line)
    if len(ys) > 1:
        ax.fill_between(x, ys.min(0), ys.max(0), color=curve.get_color(), alpha=0.2, linewidth=0)
    return curve


def draw_records(ax, records, metric="exact", x="tokens", chance=True):
    """Draw run records, one band for each N over its seeds.

    Parameters
    ----------
    ax : matplotlib.axes.Axes
    records : list of dict
        As :func:`sleeplib.records.load_records` returns them; or one record, a Trainer, its curve, or a list
        of records and Trainers.
    metric : str
        A key of the curve's metrics, on held-out data; where an entry has no such metric, a key of the entry
        itself, such as ``"loss"`` in training.
    x : {"tokens", "step"} or callable
        A key of the curve, or a function of the record and an entry of its curve.
    chance : bool
        Also draw what guessing gives.

    Raises
    ------
    ValueError
        If runs with one N were measured at no step that all of them share.
    """
    records, runs = _as_records(records), defaultdict(list)
    for record in records:
        runs[record["passes"]].append(record)
    for passes, group in sorted(runs.items()):
        # All runs of one N are drawn where all were measured: as far as the shortest of them goes.
        curves = [{p["step"]: p for p in r["curve"]} for r in group if r["curve"]]
        if not curves:
            continue
        shared = sorted(set.intersection(*map(set, curves)))
        if not shared:
            raise ValueError(f"records: the runs with N = {passes} were measured at no step that they share")
        curves = [[curve[step] for step in shared] for curve in curves]
        ys = [[_value(p, metric) for p in curve] for curve in curves]
        xs = [x(group[0], p) if callable(x) else p[x] for p in curves[0]]
        style = {"color": COLORS.get(passes), "dashes": DASHES.get(passes, ())}
        band(ax, xs, ys, label=f"N = {passes}" if passes else "this run", **style)
    if chance and records and metric in records[0]["chance"]:
        guess = records[0]["chance"][metric]
        ax.axhline(guess, color="black", linewidth=0.8, linestyle=":", label="guessing")
    ax.set(xlabel="" if callable(x) else {"tokens": "training tokens"}.get(x, x), ylabel=metric)
    if records:
        ax.legend()


def _as_records(runs):
    """Turn whatever can be drawn into a list of records; a curve alone does not know its N."""
    if isinstance(runs, dict) or hasattr(runs, "curve"):
        runs = [runs]
    elif runs and isinstance(runs[0], dict) and "curve" not in runs[0]:
        runs = [{"passes": 0, "curve": runs, "chance": {}}]
    return [
        {"passes": r.passes, "curve": r.curve, "chance": r.experiment.task.chance()}
        if hasattr(r, "curve")
        else r
        for r in runs
    ]


def _value(point, metric):
    return point["metrics"][metric] if metric in point.get("metrics", {}) else point[metric]


def provenance(records):
    """One line to stand under a figure: device, commit and number of seeds of its runs."""
    if not records:
        return "not run yet"
    devices = ", ".join(sorted({str(r["device"]) for r in records}))
    # A plus sign: the code differed from its commit.
    commits = {(r["commit"] or "no git ")[:7].strip() + "+" * bool(r["dirty"]) for r in records}
    seeds = len({r["seed"] for r in records})
    return f"device: {devices}; commit: {', '.join(sorted(commits))}; seeds: {seeds}"
