"""Sphinx extension: pages that ask the network for nothing."""


def drop_thebe(app, pagename, templatename, context, doctree):
    """Jupyter Book always adds thebe's loader, whose script lies on a CDN; no page here uses it."""

    def is_thebe(script):
        body = (getattr(script, "attributes", None) or {}).get("body") or ""
        return "thebe" in str(getattr(script, "filename", None) or "") or "THEBE_JS_URL" in body

    context["script_files"] = [s for s in context.get("script_files", []) if not is_thebe(s)]


def setup(app):
    app.connect("html-page-context", drop_thebe, priority=900)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
