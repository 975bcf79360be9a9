"""The paper's claims beside what our records show, and a verdict that follows a rule, not a mood.

A comparison of several N is judged only if it is fair: at the paper's settings, or at a rate that was chosen,
for N = 1 or for each N by itself, on seeds that are not judged.  Every step of an order gets a difference
with its interval, paired by seed.  A difference is none if it is surely smaller than MARGIN.

==========  ==============================================================================================
verdict     when
==========  ==============================================================================================
reproduced  at the paper's own settings every step goes the claimed way by more than its interval, or is none
partly      from first to last it does and no step goes against it; some step is open, or runs are smaller
not         a step or the whole goes the other way by more than its interval, or the whole is none
open        neither: the runs cannot tell; a single seed never can
not judged  no fair comparison has been run
==========  ==============================================================================================
"""

import json
from dataclasses import asdict, replace
from itertools import pairwise
from math import inf, isfinite
from statistics import mean

from .experiments import get
from .intervals import Interval, paired_interval
from .records import data_dir, own_records

MARGIN = 0.02


def score(final, how):
    """What a run is worth for a claim, from its final metrics.

    `how` is the name of one of them; or ``{"learned": share}``, the number of hops up to which, from the
    fewest on, accuracy reaches that share; or "deep", the mean accuracy at the deeper half of the questions.
    """
    if isinstance(how, str) and how in final:
        return final[how]
    depths = sorted(int(key[6:]) for key in final if key[:6] == "exact/" and key[6:].isdigit())
    scores = [final[f"exact/{depth}"] for depth in depths]
    if how == "deep":
        return mean(scores[len(scores) // 2 :])
    return [*(x >= how["learned"] for x in scores), False].index(False)


def difference(a, b):
    """Scores `b` minus scores `a`, both by seed, as an Interval: endless with fewer than two shared seeds."""
    shared = a.keys() & b.keys()
    if len(shared) < 2:
        a, b = ({seed: x[seed] for seed in shared or x} for x in (a, b))
        return Interval(mean(b.values()) - mean(a.values()), inf, len(shared))
    found = paired_interval(a, b)
    whole = all(isinstance(x, int) for x in (*a.values(), *b.values()))
    # Seeds often agree on a number of hops; that does not make the difference certain.
    return replace(found, half=max(found.half, 1 / found.seeds)) if whole else found


def judge(claim, out=None):
    """Judge one claim, an entry of ``data/paper/claims.json``, by the first of its runs that can be compared.

    Its `runs` list what can bear on it, those at the paper's own settings first, marked as `full`.  Each
    entry has `presets` and may have the `seeds` on which no setting was chosen, the `passes` of a preset
    that are meant, and a `note` on what it can show; the claim's `score` is as in :func:`score`.

    Returns a dict of ``figure``, ``claim``, ``paper``, ``ours`` (the mean for each N or t; if nothing was
    compared, the claim's own `note`), ``steps``, ``whole`` (an :class:`Interval`), ``scale``, ``seeds``,
    ``device``, ``verdict`` and ``commands``, what made the runs; `out` is as in :func:`load_records`.

    Chapter: 14_scorecard
    """
    row = {key: claim[key] for key in ("figure", "claim", "paper")}
    row |= dict(ours=claim.get("note", "-"), steps="-", whole=None, scale="-", seeds="-", device="-")
    row |= dict(verdict="not judged", commands=[])
    by_steps = claim["kind"] == "falls with task.steps"  # a claim about N = 1
    for runs in claim["runs"]:
        used, groups = [], {}
        for r in [r for p in runs["presets"] for r in own_records(get(p), out)]:
            own_seed = r["seed"] in runs.get("seeds", [r["seed"]])
            wanted = r["passes"] in runs.get("passes", {}).get(r["preset"], [r["passes"]])
            if r["status"] == "done" and own_seed and wanted and (r["passes"] == 1 or not by_steps):
                x = r["config"]["task"]["steps"] if by_steps else r["passes"]
                groups.setdefault(x, {})[r["seed"]] = score(r["final"], claim["score"])
                used.append(r)
        if len(groups) < 2:
            continue
        order, full = sorted(groups), runs.get("full", False)
        steps = [difference(groups[a], groups[b]) for a, b in pairwise(order)]
        whole = difference(groups[order[0]], groups[order[-1]])
        letter, names = "t" if by_steps else "N", {r["preset"] for r in used}
        most = max(map(len, groups.values()))
        digits = ".3f" if isinstance(claim["score"], str) else ".1f"  # a share, or a number of hops
        means = [f"{letter} = {x}: {mean(groups[x].values()):{digits}}" for x in order]
        few = [f" ({len(groups[x])} seeds)" if len(groups[x]) < most else "" for x in order]
        row["ours"] = ", ".join(map("".join, zip(means, few)))
        row["steps"] = ", ".join(f"{a} to {b}: {step}" for (a, b), step in zip(pairwise(order), steps))
        small = ", ".join(p for p in runs["presets"] if p in names) + ", smaller than the paper's"
        small += f"; {runs['note']}" if "note" in runs else ""
        row["scale"], row["seeds"], row["whole"] = "the paper's" if full else small, str(whole.seeds), whole
        row["device"] = ", ".join(sorted({r["device"] for r in used}))
        row["commands"] = [r["command"] for r in used]
        row["verdict"] = verdict(steps, whole, -1 if by_steps else 1, full)
        break
    return row


def verdict(steps, whole, way, full):
    """The verdict by the table above; `way` is 1 if the claim is that scores rise, -1 if that they fall.

    Parameters
    ----------
    steps : list of Interval
        From each value of N (or t) to the next.
    whole : Interval
        From the first to the last.
    way : {1, -1}
    full : bool
        Whether the runs have the paper's own settings.

    Chapter: 14_scorecard
    """

    def none(x):
        return abs(x.value) + x.half < MARGIN

    if none(whole) or any(way * x.sign < 0 and not none(x) for x in (*steps, whole)):
        return "not"
    if not whole.sign:
        return "open"
    return "reproduced" if full and all(x.sign or none(x) for x in steps) else "partly"


def scorecard(out=None):
    """Judge every claim of ``data/paper/claims.json``; return a list of the dicts of :func:`judge`.

    Chapter: 14_scorecard
    """
    claims = json.loads((data_dir() / "paper" / "claims.json").read_text())
    return [judge(claim, out) for claim in claims]


def to_json(rows):
    """The rows of :func:`scorecard` as JSON; an endless interval, of a single seed, has ``null`` as its half.

    Chapter: 14_scorecard
    """
    plain = []
    for row in rows:
        whole = row["whole"] and {k: v if isfinite(v) else None for k, v in asdict(row["whole"]).items()}
        plain.append(row | dict(whole=whole))
    return json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False)
