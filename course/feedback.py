"""What a student reads after grading: one page of HTML, without a script."""

from html import escape

MARKER = "**Your answer ({label}).**"
STYLE = """
body { font: 16px/1.5 sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem }
body { background: #fff; color: #111 }
table { border-collapse: collapse; width: 100% }
td, th { border: 1px solid #888; padding: .3rem .5rem; text-align: left; vertical-align: top }
pre { white-space: pre-wrap; background: #f2f2f2; padding: .5rem }
"""


def written(assignment, texts):
    """The student's own words, label -> text, found by the marker that the handout puts before them."""
    found = dict.fromkeys(assignment.write_ups, "")
    for label in found:
        for text in texts:
            _, mark, answer = text.partition(MARKER.format(label=label))
            if mark:
                found[label] = answer.replace("*Write here.*", "").strip()[:20_000]
    return found


def table(checks):
    rows = "".join(
        f"<tr><td>{escape(c['title'])}</td><td>{c['points']} of {c['out_of']}</td>"
        f"<td>{escape(c['wrong'] or 'right')}</td></tr>"
        for c in checks
    )
    return f"<table><tr><th>what was checked</th><th>points</th><th>what was found</th></tr>{rows}</table>"


def column(assignment, label, write_up):
    """The heading of a write-up's column in the table."""
    return f"write-up {assignment.name} {label} (of {write_up.points})"


def page(name, result, assignments, marked=None):
    """The page of one submission; `marked` is column -> mark, for what a person has already marked."""
    assignment = assignments.get(result["assignment"])
    title = f"{assignment.title}: {name}" if assignment else name
    body = [f"<h1>{escape(title)}</h1>"]
    if result["status"] == "graded":
        body.append(f"<p><b>{result['points']} of {result['out_of']} points</b> by the automatic checks.</p>")
    if result["status"] != "graded" or result["why"]:
        body.append(f"<p><b>{escape(result['status'])}</b>: {escape(result['why'])}</p>")
    for exercise, checks in result["exercises"].items():
        body.append(f"<h2><code>{escape(exercise)}</code></h2>{table(checks)}")
    if result["cells"]:
        lines = "".join(
            f"<li>code cell {escape(number)}: <code>{escape(text)}</code></li>"
            for number, text in result["cells"].items()
        )
        body.append(f"<h2>Cells that stopped with an error</h2><ul>{lines}</ul>")
    for label, text in result["written"].items():
        write_up = assignment.write_ups[label]
        mark = (marked or {}).get(column(assignment, label, write_up))
        points = f"<b>{escape(mark)}</b> of {write_up.points}" if mark else f"of {write_up.points}"
        body.append(
            f"<h2>Write-up: {escape(label)}</h2><p>Marked by a person, {points} points:</p>"
            f"<pre>{escape(write_up.rubric)}</pre>"
            f"<h3>Your answer</h3><pre>{escape(text) or '(nothing was found)'}</pre>"
        )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>{''.join(body)}</body></html>"
    )
