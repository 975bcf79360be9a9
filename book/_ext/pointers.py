"""Sphinx extension: the chapter that a docstring names becomes a link on the API page."""

import re
from pathlib import Path


def link_chapter(app, what, name, thing, options, lines):
    """Turn ``Chapter: NN_topic`` into a link where that chapter exists."""
    for i, line in reversed(list(enumerate(lines))):
        found = re.fullmatch(r"(\s*Chapter: )(\w+)", line)
        if found and (Path(app.srcdir) / "book" / f"{found[2]}.ipynb").exists():
            lines[i] = f"{found[1]}:doc:`/book/{found[2]}`"
            if not any(head.strip() == "Notes" for head in lines):  # else it would belong to the last section
                lines[i:i] = [f"{found[1][: -len('Chapter: ')]}{rest}" for rest in ("Notes", "-----")]


def setup(app):
    app.connect("autodoc-process-docstring", link_chapter, priority=100)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
