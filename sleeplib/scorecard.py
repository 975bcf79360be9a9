"""The paper's claims beside what our records show, and a verdict that follows a rule, not a mood.

A claim is *reproduced* if runs at the paper's own settings show the order it states, *partly* if only smaller
runs do, *not* if finished runs show another order or none, *not run* if there are no finished runs.  Means
that differ by less than MARGIN from first to last are in no order: chance alone may do that.
"""

import json
from statistics import mean

from .records import data_dir, load_records

MARGIN = 0.02  # two standard errors of the difference of two accuracies, on 4,096 held-out sequences each


def judge(claim, out=None):
    """Judge one claim, an entry of ``data/paper/claims.json``, by the largest preset with runs to compare.

    Its `presets` list what can bear on it, the paper's own first; `out` is as in :func:`load_records`.  Gives
    a dict of ``figure``, ``claim``, ``paper``, ``ours``, ``scale``, ``seeds``, ``device`` and ``verdict``.

    Chapter: 11_rule110
    """
    row = {key: claim[key] for key in ("figure", "claim", "paper")}
    row |= dict(ours="-", scale="-", seeds="-", device="-", verdict="not run")
    by_steps = claim["kind"] == "falls with task.steps"  # a claim about N = 1
    for presets in claim["presets"]:
        found = [r for preset in presets for r in load_records(preset, 1 if by_steps else None, out)]
        done, groups = [r for r in found if r["status"] == "done"], {}
        for r in done:
            x = r["config"]["task"]["steps"] if by_steps else r["passes"]
            groups.setdefault(x, []).append(r["final"][claim["metric"]])
        if len(groups) < 2:
            continue
        means = [mean(groups[x]) for x in sorted(groups)]
        ordered = means == sorted(means, reverse=by_steps) and abs(means[0] - means[-1]) > MARGIN
        full, letter = "paper" in presets[0], "t" if by_steps else "N"
        row["ours"] = ", ".join(f"{letter} = {x} {mean(groups[x]):.3f}" for x in sorted(groups))
        used = ", ".join(preset for preset in presets if any(r["preset"] == preset for r in done))
        row["scale"] = "the paper's" if full else f"{used}, smaller than the paper's"
        row["seeds"] = str(min(len(scores) for scores in groups.values()))
        row["device"] = ", ".join(sorted({r["device"] for r in done}))
        row["verdict"] = ("reproduced" if full else "partly") if ordered else "not"
        break
    return row


def scorecard(out=None):
    """Judge every claim of ``data/paper/claims.json``: a list of the dicts of :func:`judge`.

    Chapter: 11_rule110
    """
    claims = json.loads((data_dir() / "paper" / "claims.json").read_text())
    return [judge(claim, out) for claim in claims]
