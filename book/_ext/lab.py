"""Sphinx extension: what the sleep lab and the home page's picture show, from data/ into the built site."""

import base64
import json
from pathlib import Path

MODELS = {4: "rule110-quick/N4-seed0", 1: "rule110-quick/N1-seed0"}  # by the N of their training


def write_models(app, error):
    """Write ``_static/lab/models.js``, which needs no network and no server: weights as base64."""
    if error or app.builder.format != "html":
        return
    models = {}
    for passes, name in MODELS.items():
        folder = Path(app.srcdir) / "data" / "checkpoints" / name
        weights = base64.b64encode((folder / "model.safetensors").read_bytes()).decode()
        models[passes] = {"config": json.loads((folder / "config.json").read_text()), "weights": weights}
    out = Path(app.outdir) / "_static" / "lab"
    out.mkdir(parents=True, exist_ok=True)
    (out / "models.js").write_text(f"const SLEEP_LAB_MODELS = {json.dumps(models)};\n")


def write_nap(app, error):
    """Write ``_static/nap/record.js``, the run of ``data/chapters/intro.json`` for the moving picture."""
    if error or app.builder.format != "html":
        return
    made = json.loads((Path(app.srcdir) / "data" / "chapters" / "intro.json").read_text())
    out = Path(app.outdir) / "_static" / "nap"
    out.mkdir(parents=True, exist_ok=True)
    (out / "record.js").write_text(f"const NAP = {json.dumps(made['result'])};\n")


def setup(app):
    app.connect("build-finished", write_models)
    app.connect("build-finished", write_nap)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
