"""The paper's claims beside what our records show, and a verdict that follows a rule, not a mood.

Only fair comparisons are judged: those whose rate was chosen for N = 1, or for each N.  Every step of an
order gets a difference with its interval, paired by seed.

==========  ===============================================================================================
verdict     when
==========  ===============================================================================================
reproduced  at the paper's own settings every step goes the claimed way by more than its interval
partly      from first to last it does and no step goes against it; some step is open, or runs are smaller
not         a step or the whole goes the other way by more than its interval, or all lies within MARGIN
open        none of these: the runs cannot tell
not run     there is nothing to compare
==========  ===============================================================================================
"""

import json
from itertools import pairwise
from math import hypot, inf
from statistics import mean

from .intervals import Interval, paired_interval, proportion_error
from .records import data_dir, load_records

MARGIN = 0.02  # a difference surely smaller than this is none


def score(final, how):
    """What a run is worth for a claim, from its final metrics.

    `how` is one of their names; or ``{"learned": share}``, the number of hops, fewest first, that are
    answered by that share; or "deep - shallow", the accuracy at the deeper half of the questions minus that
    at the other half.
    """
    if isinstance(how, str) and how in final:
        return final[how]
    depths = sorted(int(key[6:]) for key in final if key[:6] == "exact/" and key[6:].isdigit())
    scores = [final[f"exact/{depth}"] for depth in depths]
    if how == "deep - shallow":
        half = len(scores) // 2
        return mean(scores[-half:]) - mean(scores[:half])
    return [*(x >= how["learned"] for x in scores), False].index(False)


def difference(a, b, how):
    """Score of the runs `b` minus that of `a`, both by seed, as an Interval.

    With one seed each it is the interval of the held-out sample alone: how seeds differ is then unknown.
    """
    one, two = ({seed: score(r["final"], how) for seed, r in runs.items()} for runs in (a, b))
    if len(one.keys() & two.keys()) > 1:
        return paired_interval(one, two)
    (p, r), (q, s) = ((next(iter(x.values())), next(iter(runs.values()))) for x, runs in ((one, a), (two, b)))
    known = isinstance(how, str) and how in r["final"]  # for the other scores no error of the sample is known
    errors = [
        proportion_error(x, 8 * y["config"]["train"]["eval_batch"]) for x, y in ((p, r), (q, s)) if known
    ]
    return Interval(q - p, 1.96 * hypot(*errors) if known else inf, 1)


def judge(claim, out=None):
    """Judge one claim, an entry of ``data/paper/claims.json``, by the largest runs that there are to compare.

    Its `runs` list what can bear on it, the paper's own first: `presets`, and the `seeds` that no setting was
    chosen on; `score` is as in :func:`score`.  Gives a dict of ``figure``, ``claim``, ``paper``, ``ours``,
    ``steps``, ``whole`` (an :class:`Interval`), ``scale``, ``seeds``, ``device`` and ``verdict``; `out` is as
    in :func:`load_records`.

    Chapter: 11_rule110
    """
    row = {key: claim[key] for key in ("figure", "claim", "paper")}
    row |= dict(ours="-", steps="-", whole=None, scale="-", seeds="-", device="-", verdict="not run")
    by_steps = claim["kind"] == "falls with task.steps"  # a claim about N = 1
    for runs in claim["runs"]:
        groups = {}
        for r in [r for p in runs["presets"] for r in load_records(p, 1 if by_steps else None, out)]:
            if r["status"] == "done" and r["seed"] in runs.get("seeds", [r["seed"]]):
                x = r["config"]["task"]["steps"] if by_steps else r["passes"]
                groups.setdefault(x, {})[r["seed"]] = r
        if len(groups) < 2:
            continue
        order, how, way = sorted(groups), claim["score"], -1 if by_steps else 1
        steps = [difference(groups[a], groups[b], how) for a, b in pairwise(order)]
        whole = difference(groups[order[0]], groups[order[-1]], how)
        full, letter = "paper" in runs["presets"][0], "t" if by_steps else "N"
        means = {x: mean(score(r["final"], how) for r in g.values()) for x, g in groups.items()}
        row["ours"] = ", ".join(f"{letter} = {x} {means[x]:.3f}" for x in order)
        row["steps"] = ", ".join(f"{a} to {b}: {step}" for (a, b), step in zip(pairwise(order), steps))
        used = {r["preset"] for g in groups.values() for r in g.values()}
        names = ", ".join(p for p in runs["presets"] if p in used)
        row["scale"] = "the paper's" if full else f"{names}, smaller than the paper's"
        row["seeds"], row["whole"] = str(whole.seeds), whole
        row["device"] = ", ".join(sorted({r["device"] for g in groups.values() for r in g.values()}))
        row["verdict"] = verdict([way * s.sign for s in steps], way * whole.sign, whole, full)
        break
    return row


def verdict(steps, whole, interval, full):
    """The verdict of the table above, from the signs of the steps and of the whole, 1 for the claimed way."""
    if -1 in (*steps, whole) or abs(interval.value) + interval.half < MARGIN:
        return "not"
    if not whole:
        return "open"
    return "reproduced" if full and all(steps) else "partly"


def scorecard(out=None):
    """Judge every claim of ``data/paper/claims.json``: a list of the dicts of :func:`judge`.

    Chapter: 11_rule110
    """
    claims = json.loads((data_dir() / "paper" / "claims.json").read_text())
    return [judge(claim, out) for claim in claims]
