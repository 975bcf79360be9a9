"""Interactive figures that need neither a kernel nor a network: frames under a slider, `interact` on top."""

import hashlib
import html
import json
import os
import re

from .plots import img

# The whole behaviour: show the frame that the slider names, say its label.
_ON_INPUT = (
    "const f=this.closest('figure'),n=+this.value;"
    "f.querySelectorAll('img').forEach((p,i)=>{p.style.display=i===n?'':'none'});"
    "const t=JSON.parse(f.dataset.labels)[n];"
    "f.querySelector('output').textContent=t;"
    "this.setAttribute('aria-valuetext',t)"
)


def frame_slider(frames, labels, alt, title, **options):
    """Show figures one at a time under a range slider.

    Each frame is embedded as a small picture, so the page works without a kernel and without a network, by
    mouse, touch and arrow keys.

    Parameters
    ----------
    frames : list of matplotlib.figure.Figure
        They are closed.
    labels : list of str
        What the slider announces at each frame, such as ``"t = 3"``.
    alt : str or list of str
        Text for readers who cannot see the frames; a single text is put before each label.
    title : str
        Names the slider.
    **options
        ``colors`` and ``dpi`` of :func:`sleeplib.plots.picture`.

    Returns
    -------
    FrameSlider
        Displays itself as the last value of a cell.

    Raises
    ------
    ValueError
        If there are no frames, or not exactly one label and one alt text for each.
    """
    frames, labels = list(frames), [str(label) for label in labels]
    alts = [f"{alt} {label}" for label in labels] if isinstance(alt, str) and alt.strip() else list(alt)
    if not frames or not len(frames) == len(labels) == len(alts):
        raise ValueError(
            "frames, labels and alt must be of one length, at least 1; "
            f"got {len(frames)}, {len(labels)}, {len(alts)}"
        )
    options = {"colors": 32, "dpi": 115} | options  # there are many of them
    pictures = [img(figure, text, **options) for figure, text in zip(frames, alts)]
    return FrameSlider(pictures, labels, title)


class FrameSlider:
    """The HTML that :func:`frame_slider` makes."""

    def __init__(self, pictures, labels, title):
        self.pictures, self.labels, self.title = pictures, labels, title

    def _repr_html_(self):
        # A page may hold any number of sliders, so each has an id of its own, made from its words: the bytes
        # of pictures differ from machine to machine.
        words = [self.title, *self.labels, *(re.sub('src="[^"]*"', "", p) for p in self.pictures)]
        identity = f"frames-{hashlib.sha256(chr(10).join(words).encode()).hexdigest()[:8]}"
        title, first = html.escape(self.title), html.escape(self.labels[0])
        hidden = [p.replace('style="', 'style="display:none;', 1) for p in self.pictures[1:]]
        return (
            f'<figure class="sl-frames" id="{identity}" style="margin:1em 0;max-width:100%" '
            f'data-labels="{html.escape(json.dumps(self.labels))}">'
            f"{self.pictures[0]}{''.join(hidden)}"
            '<div class="sl-control" style="display:flex;flex-wrap:wrap;gap:.5em 1em;align-items:center">'
            f'<span><label for="{identity}-at">{title}</label>: '
            # Silent: the slider itself announces its value.
            f'<output for="{identity}-at" aria-live="off">{first}</output></span>'
            f'<input id="{identity}-at" type="range" min="0" max="{len(self.labels) - 1}" step="1" value="0" '
            f'autocomplete="off" aria-valuetext="{first}" style="flex:1 1 12em;min-height:2.5em" '
            f'oninput="{html.escape(_ON_INPUT)}">'
            "</div></figure>"
        )

    def __repr__(self):
        return f"{self.title}: a slider over {len(self.labels)} frames, {self.labels[0]} to {self.labels[-1]}"


# A guess is redrawn when a slider moves; opening the details shows the measured curve beside it.
_ON_GUESS = (
    "const v=[...this.querySelectorAll('input')].map(i=>+i.value),t=event.target;"
    "t.setAttribute('aria-valuetext',(t.value/100).toFixed(2));"
    "const s=+this.dataset.step,p=v.map((y,i)=>(60+i*s)+','+(190-1.7*y)).join(' ');"
    "this.querySelector('.sl-guess').setAttribute('points',p);"
    "const d=this.querySelector('details');if(d.open)d.dispatchEvent(new Event('toggle'))"
)
_ON_REVEAL = (
    "const f=this.closest('figure'),v=[...f.querySelectorAll('input')].map(i=>i.value/100);"
    "f.querySelector('.sl-measured').style.display=this.open?'':'none';"
    "const m=JSON.parse(f.dataset.measured),e=m.reduce((a,y,i)=>a+Math.abs(y-v[i]),0)/m.length;"
    "f.querySelector('output').textContent='Your guess is off by '+e.toFixed(2)+' on average.'"
)


def predict(labels, measured, title):
    """Ask the reader to guess a few shares, and show the measured ones only on demand.

    It works without a kernel and without a network: sliders for the guess, a curve, and details to unfold.

    Parameters
    ----------
    labels : list of str
        What is asked for, such as ``"t = 4"``.
    measured : list of float
        Shares from 0 to 1, one for each label.
    title : str
        The question.

    Returns
    -------
    Prediction
        Displays itself as the last value of a cell.

    Raises
    ------
    ValueError
        If there are fewer than two labels, not exactly one share for each, or a share outside 0 to 1.
    """
    labels, measured = [str(label) for label in labels], [float(x) for x in measured]
    if len(labels) < 2 or len(labels) != len(measured):
        raise ValueError(
            f"labels and measured must be of one length, at least 2; got {len(labels)}, {len(measured)}"
        )
    if not all(0 <= x <= 1 for x in measured):
        raise ValueError(f"measured must be shares from 0 to 1; got {measured}")
    return Prediction(labels, measured, title)


class Prediction:
    """The HTML that :func:`predict` makes."""

    def __init__(self, labels, measured, title):
        self.labels, self.measured, self.title = labels, measured, title

    def _repr_html_(self):
        step = 400 // (len(self.labels) - 1)
        xs, title = [60 + i * step for i in range(len(self.labels))], html.escape(self.title)

        def line(shares, kind, style):
            points = " ".join(f"{x},{190 - 170 * y:.1f}" for x, y in zip(xs, shares))
            return f'<polyline class="{kind}" points="{points}" fill="none" stroke-width="3" {style}/>'

        words = [html.escape(label) for label in self.labels]
        ticks = "".join(f'<text x="{x}" y="210" text-anchor="middle">{w}</text>' for x, w in zip(xs, words))
        scale = "".join(
            f'<line x1="50" x2="{xs[-1] + 10}" y1="{190 - 170 * y}" y2="{190 - 170 * y}" stroke="#ccc"/>'
            f'<text x="44" y="{194 - 170 * y}" text-anchor="end">{y}</text>'
            for y in (0, 0.5, 1)
        )
        sliders = "".join(
            '<label style="display:flex;gap:.5em;align-items:center">'
            f'<span style="min-width:4.5em">{w}</span>'
            '<input type="range" min="0" max="100" value="50" autocomplete="off" aria-valuetext="0.50" '
            f'style="flex:1;min-height:2em" aria-label="your guess at {w}"></label>'
            for w in words
        )
        told = ", ".join(f"{w}: {y:.2f}" for w, y in zip(words, self.measured))
        guess = line([0.5] * len(xs), "sl-guess", 'stroke="#777777" stroke-dasharray="6 4"')
        found = line(self.measured, "sl-measured", 'stroke="#0072B2" style="display:none"')
        return (
            f'<figure class="sl-predict" style="margin:1em 0;max-width:520px" data-step="{step}" '
            f'oninput="{html.escape(_ON_GUESS)}" '
            f'data-measured="{html.escape(json.dumps(self.measured))}">'
            f"<figcaption><b>Predict first.</b> {title}</figcaption>"
            '<svg viewBox="0 0 480 220" style="width:100%;background:#fff;font:13px sans-serif" role="img" '
            f'aria-label="Your guess as a dashed line">{scale}{ticks}{guess}{found}</svg>{sliders}'
            f'<details ontoggle="{html.escape(_ON_REVEAL)}"><summary>Show what was measured</summary>'
            f"<p>{told}. <output></output></p></details></figure>"
        )

    def __repr__(self):
        return f"{self.title} (a guess, then the measured values of {len(self.labels)} points)"


def interact_or_frames(draw, name, values, alt, live=None, title=None, **options):
    """Show `draw` under a slider: frames for everyone, and `ipywidgets.interact` where a kernel is live.

    Parameters
    ----------
    draw : callable
        Takes one value and returns a figure.
    name : str
        What is moved; an argument name for `interact`.
    values : sequence
        One frame for each.
    alt : str or callable
        Alt text; a callable takes the value.
    live : optional
        What `interact` moves over, perhaps finer than `values`, such as ``(0, 32)``; `values` if absent.
    title : str, optional
        Names the slider to a reader; `name` if absent.
    **options
        ``colors`` and ``dpi`` of :func:`sleeplib.plots.picture`.
    """
    from IPython.display import display

    values = list(values)
    texts = [alt(v) if callable(alt) else f"{alt} {name} = {v}" for v in values]
    display(frame_slider([draw(v) for v in values], values, texts, title or name, **options))
    if building():
        return
    import ipywidgets
    import matplotlib.pyplot as plt

    def picture(**moved):
        display(draw(moved[name]))
        plt.close("all")

    control = ipywidgets.SelectionSlider(options=values, description=title or name) if live is None else live
    ipywidgets.interact(picture, **{name: control})


def building():
    """Whether pages are being built or checked, or IPython is not there: outputs then need no live kernel."""
    if os.environ.get("SLEEPLIB_BUILDING"):
        return True
    try:
        get_ipython()  # IPython defines it
    except NameError:
        return True
    return False
