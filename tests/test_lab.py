"""The sleep lab: the model in plain JavaScript gives the numbers of sleeplib, alone and in a browser.

And the run that the home page shows is one of sleeplib, and as its words say.
"""

import json
import re
import runpy
import shutil
import subprocess
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch

import sleeplib as sl
from sleeplib.records import kept_model_path

ROOT = Path(__file__).resolve().parent.parent
NODE, BROWSER = shutil.which("node"), shutil.which("chromium")
SCRIPT = """
const fs = require("fs"), { Hybrid } = require("./book/_assets/lab/model.js");
const { folder, rows, passes } = JSON.parse(fs.readFileSync(0));
const config = JSON.parse(fs.readFileSync(folder + "/config.json"));
const model = new Hybrid(config, new Uint8Array(fs.readFileSync(folder + "/model.safetensors")));
const found = rows.map((row) => {
  let S = model.emptyState();
  for (const start of [0, 12]) S = model.sleep(row.slice(start, start + 12), S, passes).at(-1);
  const last = model.read(row.slice(24), S);
  return { logits: last.logits.map((x) => [...x]), S: last.S.map((part) => part && [...part]) };
});
console.log(JSON.stringify(found));
"""


def kept(passes):
    """A shipped model in float32: its weights are kept in half precision."""
    return sl.HybridLM.from_checkpoint(kept_model_path(f"rule110-quick/N{passes}-seed0")).float()


@pytest.mark.skipif(NODE is None, reason="needs node")
@pytest.mark.parametrize("trained, passes", [(4, 4), (4, 2), (1, 1)])
def test_the_model_of_the_lab_is_that_of_sleeplib(trained, passes):
    model, task = kept(trained), sl.experiments.get("rule110-quick").task
    batch = task.batch(4, np.random.default_rng(5), split="test")
    out = sl.sleep_forward(model, batch.inputs, batch.labels, window=task.window, passes=passes)
    folder = str(kept_model_path(f"rule110-quick/N{trained}-seed0"))
    asked = dict(folder=folder, rows=batch.inputs.tolist(), passes=passes)
    done = subprocess.run(
        [NODE, "-e", SCRIPT], input=json.dumps(asked), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    logits = torch.tensor([row["logits"] for row in found])
    assert torch.allclose(logits, out.logits[:, task.context :], atol=1e-4, rtol=0)
    for block, S in enumerate(out.state.fast_weights):
        if S is not None:
            theirs = torch.tensor([row["S"][block] for row in found])
            assert torch.allclose(theirs, S.flatten(1), atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.xdist_group("site")
@pytest.mark.browser
def test_the_lab_answers_in_a_browser_without_a_server(site):
    page = (site / "book" / "lab.html").resolve().as_uri()
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--dump-dom"]
    dom = subprocess.run([BROWSER, *options, page], capture_output=True, text=True, timeout=120).stdout
    assert 'data-ready="yes"' in dom
    logits = torch.tensor(json.loads(unescape(re.search(r'data-logits="([^"]+)"', dom)[1])))
    rings = re.findall(r'aria-label="ring [12], cell \d+: ([01])"', dom)
    assert len(rings) == 24
    tokens = torch.tensor([[*map(int, rings), 2, int(logits[0, 1] > logits[0, 0])]])
    labels = torch.full_like(tokens, -100)
    labels[:, 24:] = 0
    out = sl.sleep_forward(kept(4), tokens, labels, window=12, passes=4)
    assert torch.allclose(logits, out.logits[0, 24:], atol=1e-4, rtol=0)


def test_the_models_of_the_lab_are_small():
    files = [kept_model_path(f"rule110-quick/N{n}-seed0") / "model.safetensors" for n in (1, 4)]
    assert sum(file.stat().st_size for file in files) * 4 / 3 < 2_000_000  # as base64


@pytest.fixture(scope="module")
def shown():
    """What the home page's moving picture shows."""
    return json.loads((ROOT / "data" / "chapters" / "intro.json").read_text())["result"]


def test_the_home_pages_run_is_that_of_sleeplib(shown):
    now = runpy.run_path(ROOT / "book" / "intro.py")["record"]()
    rest = [{k: v for k, v in run.items() if k not in ("moments", "exact")} for run in (now, shown)]
    assert rest[0] == rest[1] and abs(now["exact"] - shown["exact"]) <= 0.002
    for ours, theirs in zip(now["moments"], shown["moments"], strict=True):
        assert [ours[k] for k in ("kind", "cache")] == [theirs[k] for k in ("kind", "cache")]
        assert abs(ours["change"] - theirs["change"]) < 0.002
        assert np.allclose(ours.get("woken", []), theirs.get("woken", []), atol=0.002)
        steps = [np.frombuffer(m["S"].encode(), np.uint8).astype(int) for m in (ours, theirs)]
        assert abs(steps[0] - steps[1]).max() <= 1, "in steps of 0.02"


def test_the_home_pages_words_fit_its_run(shown):
    page = " ".join((ROOT / "book" / "intro.md").read_text().split())
    naps = [[m for m in shown["moments"] if m.get("number", 0) > first] for first in (0, 1)]
    for nap in (naps[1][:3], naps[1][3:]):  # passes 2 to 4 on each window
        assert [m["change"] for m in nap] == sorted((m["change"] for m in nap), reverse=True)
    shares = [[abs(1 - label - p) for label, p in zip(shown["labels"], m["woken"])] for m in naps[0][4:]]
    assert [[p > 0.5 for p in row] for row in shares] == [[True, False]] * 2 + [[True, True]] * 2
    one, two = (100 * row[1] for row in shares[:2])
    for words in (
        "three more passes over it change S again, each less than the one before",
        "after two passes over the second window the model would give the right answer about the first",
        "after three and after four it gives both",
        f"wrong after one pass ({one - 0.05:.1f} %) and after two ({two:.0f} %)",  # the picture rounds down
        f"right in {100 * shown['exact']:.0f} of 100 such pairs",
        f"Guessing would get {100 * shown['guessing']:.0f}.",
    ):
        assert words in page, words


def test_the_moving_picture_is_small():
    files = [ROOT / "data" / "chapters" / "intro.json", ROOT / "book" / "_assets" / "nap" / "nap.js"]
    assert sum(len(file.read_bytes()) for file in files) < 150_000
