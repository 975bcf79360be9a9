"""Sphinx extension: the trained models of the sleep lab, from data/checkpoints into the built site."""

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


def setup(app):
    app.connect("build-finished", write_models)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
