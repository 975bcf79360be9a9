"""Sphinx extension: the rocket opens the plain notebook of ``colab/``, made for runners."""


def to_runner(app, pagename, templatename, context, doctree):
    """Replace the folder in every launch link of the page's header."""

    def visit(button):
        for inner in button.get("buttons", ()):
            visit(inner)
        if "colab.research" in button.get("url", ""):
            button["url"] = button["url"].replace("/book/", "/colab/")

    for button in context.get("header_buttons", ()):
        visit(button)


def setup(app):
    app.connect("html-page-context", to_runner, priority=900)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
