"""The sleep lab: the model in plain JavaScript gives the numbers of sleeplib, alone and in a browser."""

import json
import re
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
