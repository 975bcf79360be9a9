"""The trained models in data/checkpoints: small, loadable, and as good as their records say."""

import pytest

import sleeplib as sl
from sleeplib import records
from sleeplib.evaluation import evaluate, held_out

FOLDER = records.data_dir() / "checkpoints"
KEPT = sorted(file.parent for file in FOLDER.glob("*/*/config.json"))


def test_there_are_some_and_they_are_small():
    assert KEPT and sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) < 20e6


@pytest.mark.parametrize("folder", KEPT, ids=lambda f: f"{f.parent.name}-{f.name}")
def test_a_kept_model_scores_as_its_record_says(folder):
    own = folder / "record.json"  # of a run that was made again, to keep its model
    path = own if own.exists() else records.record_path(folder.parent.name, *numbers(folder.name))
    record = records.load_record(path)
    experiment = sl.experiments.get(record["preset"])
    model = sl.HybridLM.from_checkpoint(folder).float()
    batch = held_out(experiment.task, experiment.train.eval_batch, record["seed"])
    scores = evaluate(model, experiment.task, batch, passes=record["passes"])
    for name in ("token", "exact"):  # half precision turns a few close answers
        assert scores[name] == pytest.approx(record["curve"][-1]["metrics"][name], abs=0.01)


def numbers(name):
    """The N and the seed in ``N4-seed0``."""
    passes, seed = name.removeprefix("N").split("-seed")
    return int(passes), int(seed)
