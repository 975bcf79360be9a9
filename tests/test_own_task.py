"""A task of one's own: the example of book/own_task.md, trained a little, and the protocol that it meets."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import sleeplib as sl
from sleeplib.algorithm import awake_chunks
from sleeplib.tasks import Batch, Task, score

QUICK = [sl.experiments.get(f"{name}-quick").task for name in sl.tasks.TASKS]
PAGE = Path(__file__).resolve().parent.parent / "book" / "own_task.md"


@dataclass(frozen=True)
class FirstToken:
    """Read one window of random tokens, then name its first."""

    window: int = 6
    symbols: int = 4

    vocab = property(lambda self: (*map(str, range(self.symbols)), "<answer>"))
    vocab_size = property(lambda self: self.symbols + 1)
    length = property(lambda self: self.window + 1)

    def batch(self, count, rng, split="train"):
        inputs = torch.from_numpy(rng.integers(0, self.symbols, (count, self.length)))
        inputs[:, -1] = self.symbols
        labels = torch.full_like(inputs, -100)
        labels[:, -1] = inputs[:, 0]
        return Batch(inputs, labels)

    def score(self, logits, batch):
        return score(logits, batch)

    def chance(self):
        return {"loss": np.log(self.symbols), "token": 1 / self.symbols, "exact": 1 / self.symbols}


@pytest.mark.parametrize("task", [FirstToken(), *QUICK], ids=lambda task: type(task).__name__)
def test_a_task_meets_the_protocol(task):
    assert isinstance(task, Task) and not isinstance(object(), Task)
    assert task.vocab_size == len(task.vocab) == len(set(task.vocab))
    for split in ("train", "test"):
        one, two = (task.batch(5, np.random.default_rng(3), split) for _ in range(2))
        assert torch.equal(one.inputs, two.inputs) and torch.equal(one.labels, two.labels)
        assert one.inputs.shape == one.labels.shape == (5, task.length)
        assert one.inputs.dtype == one.labels.dtype == torch.int64
        assert any(awake_chunks(one.labels, task.window)), "all rows are asked in the same windows"
        asked = int((one.labels >= 0).sum())
    assert set(task.score(torch.zeros(asked, task.vocab_size), one)) <= set(task.chance())


def test_a_model_learns_it():
    task, rng = FirstToken(), np.random.default_rng(0)
    torch.manual_seed(0)
    model = sl.HybridLM(sl.ModelConfig(vocab_size=task.vocab_size, d_model=32, pattern="ag", num_heads=2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        batch = task.batch(64, rng)
        loss = sl.sleep_forward(model, *batch[:2], window=task.window, passes=2, return_logits=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    held_out = task.batch(256, np.random.default_rng(1), split="test")
    result = sl.evaluate(model, task, held_out, passes=2)
    assert set(result) == set(task.chance())
    assert result["token"] > task.chance()["token"] + 0.3


def test_the_page_runs_and_shows_this_very_task(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    first, *rest = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(first, names)
    theirs = names["FirstToken"]().batch(4, np.random.default_rng(0))
    ours = FirstToken().batch(4, np.random.default_rng(0))
    assert torch.equal(theirs.inputs, ours.inputs) and torch.equal(theirs.labels, ours.labels)
    assert isinstance(names["FirstToken"](), Task)
    for code in rest:
        exec(code.replace("range(60)", "range(2)").replace("steps=60", "steps=2"), names)
    assert (tmp_path / "my-runs" / "first-token" / "N2-seed0.json").is_file()
    last = capsys.readouterr().out.splitlines()[-1]
    assert f"It prints: `{last}`" in PAGE.read_text()
