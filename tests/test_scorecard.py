"""Verdicts follow their rule, and intervals hold the truth as often as they say."""

import json

import numpy as np
import pytest

import sleeplib as sl
from sleeplib import records
from sleeplib.__main__ import main
from sleeplib.intervals import STUDENT, Interval, paired_interval, proportion_error, seed_interval
from sleeplib.scorecard import difference, judge, score, to_json

RISES = dict(figure="0", claim="more is better", paper="-", kind="rises with passes", score="exact")
RISES["runs"] = [
    {"presets": ["rule110-paper"], "full": True},
    {"presets": ["rule110-quick"], "seeds": [0, 1, 2]},
]


def record(preset, passes, seed, **final):
    run = dict.fromkeys(records.KEYS) | dict(preset=preset, passes=passes, seed=seed, status="done")
    e = sl.experiments.get(preset)
    return run | dict(final=final, device="abacus", config=e.config(), config_hash=e.config_hash())


def save(out, preset, scores, key="exact"):
    """Records of made-up runs: N -> one score a seed."""
    for passes, row in scores.items():
        for seed, x in enumerate(row):
            records.save_record(record(preset, passes, seed, **{key: x}), out)


def test_runs_that_a_claim_does_not_mean_change_nothing(tmp_path):
    claims = json.loads((records.data_dir() / "paper" / "claims.json").read_text())
    claim = next(claim for claim in claims if claim["figure"] == "3")

    def run(preset, passes, *scores):
        for seed in (3, 4, 5):
            final = {f"exact/{k}": x for k, x in zip((1, 2, 4), scores)}
            records.save_record(record(preset, passes, seed, **final), tmp_path)

    run("depo-ablation-ring8", 4, 1, 1, 1)
    run("depo-rival-sleep-8e-3", 1, 1, 1, 0)
    before = judge(claim, tmp_path)
    assert before["verdict"] == "partly" and len(before["commands"]) == 6
    run("depo-ablation-ring8", 2, 0, 0, 0)
    run("depo-rival-sleep-8e-3", 4, 0, 0, 0)
    assert judge(claim, tmp_path) == before


def test_every_claim_is_judged_by_presets_that_exist(capsys):
    claims = json.loads((records.data_dir() / "paper" / "claims.json").read_text())
    assert main(["scorecard"]) == 0
    out = capsys.readouterr().out
    for claim in claims:
        assert f"Figure {claim['figure']}: {claim['claim']}: " in out
        for runs in claim["runs"]:
            assert all(sl.experiments.get(name) for name in runs["presets"])
    assert main(["scorecard", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["claim"] for row in rows] == [claim["claim"] for claim in claims]
    for row in rows:
        assert bool(row["commands"]) == (row["verdict"] != "not judged")
        assert all("run" in command and "--seed" in command for command in row["commands"])


NEAR = (0.0, 0.01, -0.01)  # how seeds differ
CASES = {
    "every step rises": ({1: 0.5, 2: 0.6, 4: 0.7}, "reproduced", "partly"),
    "one step is open": ({1: 0.5, 2: 0.505, 4: 0.7}, "partly", "partly"),
    "one step falls": ({1: 0.5, 2: 0.4, 4: 0.7}, "not", "not"),
    "the order is reversed": ({1: 0.7, 2: 0.6, 4: 0.5}, "not", "not"),
    "no difference": ({1: 0.5, 2: 0.5, 4: 0.5}, "not", "not"),
    "two are learned alike": ({1: 0.5, 2: 0.9999, 4: 0.9997}, "reproduced", "partly"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_verdict_follows_from_paired_differences(tmp_path, case):
    means, full, small = CASES[case]
    assert judge(RISES, tmp_path)["verdict"] == "not judged"
    noise = {1: (0, 0, 0), 2: NEAR, 4: (0.01, 0, 0.012)}
    if case == "no difference":
        noise = {1: (0, 0, 0), 2: (0, 0.02, -0.02), 4: (0.001, 0, -0.001)}
    if case == "two are learned alike":
        noise = {1: NEAR, 2: (0, 0, 0), 4: (0, 0, 0)}
    shared = (0, 0, 0) if case == "two are learned alike" else (0, 0.1, -0.1)  # what pairing takes away
    scores = {n: [x + s + e for s, e in zip(shared, noise[n])] for n, x in means.items()}
    save(tmp_path, "rule110-quick", scores)
    row = judge(RISES, tmp_path)
    assert row["verdict"] == small and row["seeds"] == "3"
    assert row["scale"] == "rule110-quick, smaller than the paper's"
    save(tmp_path, "rule110-paper", scores)
    row = judge(RISES, tmp_path)
    assert row["verdict"] == full and row["scale"] == "the paper's"


def test_runs_with_other_settings_are_none_of_the_preset(tmp_path):
    for passes, row in {1: (0.5, 0.51), 4: (0.7, 0.71)}.items():
        for seed, x in enumerate(row):
            other = record("rule110-paper", passes, seed, exact=x) | dict(config_hash="smaller")
            records.save_record(other, tmp_path)
    assert judge(RISES, tmp_path)["verdict"] == "not judged"


def test_seeds_that_disagree_leave_a_claim_open(tmp_path):
    save(tmp_path, "rule110-quick", {1: [0.4, 0.5, 0.6], 4: [0.7, 0.45, 0.65]})
    assert judge(RISES, tmp_path)["verdict"] == "open"


def test_a_mean_over_fewer_seeds_says_so_and_notes_are_shown(tmp_path):
    save(tmp_path, "rule110-quick", {1: [0.5, 0.5, 0.5], 2: [0.6, 0.6], 4: [0.7, 0.7, 0.7]})
    claim = RISES | dict(note="nothing fair yet")
    claim["runs"] = [dict(presets=["rule110-quick"], note="two rings")]
    row = judge(claim, tmp_path)
    assert row["ours"] == "N = 1: 0.500, N = 2: 0.600 (2 seeds), N = 4: 0.700"
    assert row["scale"] == "rule110-quick, smaller than the paper's; two rings"
    assert judge(claim, tmp_path / "empty")["ours"] == "nothing fair yet"


def test_seeds_that_a_setting_was_chosen_on_do_not_count(tmp_path):
    save(tmp_path, "rule110-quick", {1: [0.5, 0.51, 0.52, 9.0], 4: [0.6, 0.61, 0.62, 0.0]})
    assert judge(RISES, tmp_path)["whole"].value == pytest.approx(0.1)


def test_a_claim_about_depth_is_judged_without_sleep(tmp_path):
    claim = RISES | dict(kind="falls with task.steps")
    claim["runs"] = [{"presets": ["rule110-ablation-t2", "rule110-quick"]}]
    save(tmp_path, "rule110-ablation-t2", {1: [0.9, 0.91, 0.89]})
    # With sleep the order is another; it does not count.
    save(tmp_path, "rule110-quick", {1: [0.5, 0.51, 0.5], 4: [1.0, 1.0, 1.0]})
    row = judge(claim, tmp_path)
    assert row["verdict"] == "partly" and row["ours"] == "t = 2: 0.900, t = 6: 0.503"
    assert row["steps"].startswith("2 to 6: -0.397 ± ")


def test_a_single_seed_decides_nothing(tmp_path):
    save(tmp_path, "rule110-paper", {1: [0.1], 4: [0.9]})
    row = judge(RISES, tmp_path)
    assert row["verdict"] == "open" and row["seeds"] == "1" and row["whole"].half == np.inf
    assert json.loads(to_json([row | dict(commands=[])]))[0]["whole"] == dict(value=0.8, half=None, seeds=1)
    # Of seeds that only one side has nothing is compared, where there is a shared one.
    assert difference({0: 0.2, 1: 0.8}, {1: 0.7}).value == pytest.approx(-0.1)
    assert difference({0: 0.2, 1: 0.4}, {2: 0.7}) == Interval(pytest.approx(0.4), np.inf, 0)


def test_each_claim_has_its_own_measure():
    final = {
        "exact": 0.5,
        "exact/1": 0.9,
        "exact/2": 0.7,
        "exact/4": 0.3,
        "exact/8": 0.65,
        "exact/1_train_split": 0,
    }
    assert score(final, "exact") == 0.5
    assert score(final, {"learned": 0.6}) == 2  # eight hops without four are luck
    assert score(final, {"learned": 0.2}) == 4 and score(final, {"learned": 0.95}) == 0
    assert score(final, "deep") == pytest.approx((0.3 + 0.65) / 2)
    # Three seeds that agree on a number of hops have not made it certain.
    assert difference({0: 1, 1: 1, 2: 1}, {0: 2, 1: 2, 2: 2}).half == pytest.approx(1 / 3)


def test_intervals_by_hand():
    assert proportion_error(0.5, 100) == 0.05 and proportion_error(1, 7) == 0
    found = seed_interval([1.0, 2.0, 3.0])
    assert found.value == 2 and found.half == pytest.approx(4.303 / np.sqrt(3)) and found.seeds == 3
    paired = paired_interval({0: 0.1, 1: 0.5, 7: 9.0}, {1: 0.7, 0: 0.3, 2: 0.0})
    assert (
        paired.value == pytest.approx(0.2)
        and paired.half == pytest.approx(0, abs=1e-12)
        and paired.seeds == 2
    )
    assert [Interval(x, 0.1, 3).sign for x in (0.2, 0.05, -0.05, -0.2)] == [1, 0, 0, -1]
    assert Interval(np.float64(-0.2), np.float64(0.1), 3).sign == -1
    assert str(Interval(0.1534, 0.0612, 3)) == "+0.153 ± 0.061"


@pytest.mark.parametrize("seeds", [2, 3, 6, 10, 14])
def test_intervals_hold_the_truth_19_times_in_20(seeds):
    draws = np.random.default_rng(seeds).normal(0.3, 0.1, (4000, seeds))
    held = np.mean([abs(found.value - 0.3) <= found.half for found in map(seed_interval, draws.tolist())])
    assert abs(held - 0.95) < (0.012 if seeds <= len(STUDENT) + 1 else 0.02)


def test_intervals_refuse_what_says_nothing():
    with pytest.raises(ValueError, match="^values must be of at least two seeds; got 1"):
        seed_interval([0.5])
    with pytest.raises(ValueError, match=r"^before and after must share .* two seeds; they share \[1\]"):
        paired_interval({0: 1.0, 1: 2.0}, {1: 1.0, 2: 0.0})
    for p, count in ((1.2, 5), (-0.1, 5), (0.5, 0), (float("nan"), 5)):
        with pytest.raises(ValueError, match="^p must lie in"):
            proportion_error(p, count)
