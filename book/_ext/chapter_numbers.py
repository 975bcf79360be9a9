"""Sphinx extension: a chapter's number, from its file's name, for its title and its exercises."""

import re

from docutils import nodes


def chapter(docname):
    """8 for ``book/08_sleep``; None for a page that is no chapter, such as the lab record of one."""
    found = re.match(r"book/(\d\d)_(?!.*_lab$)", docname)
    return found and int(found[1])


def number_title(app, doctree):
    """Turn the title of ``book/08_sleep`` into "8. Sleep", in the page, the menu and the links to it.

    A lab record, ``book/11_rule110_lab``, lies under its chapter in the menu and has no number of its own.
    """
    title = next(iter(doctree.findall(nodes.title)), None)
    if chapter(app.env.docname) and title is not None:
        title.insert(0, nodes.Text(f"{chapter(app.env.docname)}. "))


def number_exercises(app, env):
    """Count exercises anew in each chapter, 8.1, 8.2, ...: Sphinx numbers them through the whole book."""
    for docname, kinds in env.toc_fignumbers.items():
        if chapter(docname) and "exercise" in kinds:
            kinds["exercise"] = {name: (chapter(docname), i) for i, name in enumerate(kinds["exercise"], 1)}
    return []


def setup(app):
    app.connect("doctree-read", number_title, priority=100)  # before Sphinx collects the titles
    app.connect("env-get-updated", number_exercises, priority=900)  # after Sphinx has counted
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
