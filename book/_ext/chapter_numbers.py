"""Sphinx extension: a chapter's number, from its file's name, before its title."""

import re

from docutils import nodes


def number_title(app, doctree):
    """Turn the title of ``book/08_sleep`` into "8. Sleep", in the page, the menu and the links to it.

    A lab record, ``book/11_rule110_lab``, lies under its chapter in the menu and has no number of its own.
    """
    found = re.match(r"book/(\d\d)_(?!.*_lab$)", app.env.docname)
    title = next(iter(doctree.findall(nodes.title)), None)
    if found and title is not None:
        title.insert(0, nodes.Text(f"{int(found[1])}. "))


def setup(app):
    app.connect("doctree-read", number_title, priority=100)  # before Sphinx collects the titles
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
