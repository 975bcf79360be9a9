"""Make the notebooks that Colab, Kaggle, Binder and VS Code open: ``python book/runners.py``.

``colab/NN_topic.ipynb`` says the same as ``book/NN_topic.ipynb``, in plain Markdown: these programs would
show MyST's citations, links, exercises and boxes as raw text.  Checks, solutions and drawing code are folded.
"""

import re
import sys
import tomllib

import nbformat
import yaml
from build import ROOT, assemble, sources, write
from pybtex.database import parse_file

OUT = ROOT / "colab"
SETUP = """\
#@title Run me first: sets up sleeplib, and leaves your torch as it is
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("sleeplib") is None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "git+{url}@{branch}"]
    done = subprocess.run(command, capture_output=True, text=True)
    why = (done.stderr.strip() or "no message").splitlines()[-1]
    print("sleeplib is ready" if done.returncode == 0 else f"sleeplib could not be installed: {{why}}")"""
MORE = """

# The models of this chapter come from transformers. What you have stays, if it is new enough.
command = [sys.executable, "-m", "pip", "install", "--quiet", {wanted}]
done = subprocess.run(command, capture_output=True, text=True)
if done.returncode != 0:
    why = (done.stderr.strip() or "no message").splitlines()[-1]
    print(f"transformers could not be installed: {{why}}")"""
FOLDED = {  # by tag, the first that fits
    "exercise-solution": "Solution (double-click to see it)",
    "exercise-mistake": "A likely mistake (double-click to see it)",
    "exercise-check": "Check: run me",
    "hide-input": "Drawing and helpers: run me",
}


class Converter:
    """Turn MyST into plain Markdown, with the book's bibliography and addresses."""

    def __init__(self):
        repository = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]
        self.setup = SETUP.format(**repository)
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        self.more = MORE.format(wanted=", ".join(f'"{name}"' for name in extras["pretrained"]))
        self.base = f"{repository['url']}/blob/{repository['branch']}"
        self.bibliography = parse_file(str(ROOT / "book" / "references.bib")).entries
        self.titles = {source.stem: title(source.read_text()) for source in sources()}
        pages = {page.stem: page for page in (ROOT / "book").glob("*.md")}
        self.titles |= {name: title(page.read_text()) for name, page in pages.items()}

    def citation(self, found):
        """``{cite}`a,b``` as names and years, linked where there is a preprint."""
        return "(" + "; ".join(map(self.reference, found[1].split(","))) + ")"

    def reference(self, key):
        entry = self.bibliography[key.strip()]
        names = [" ".join(person.last_names) for person in entry.persons["author"]]
        who = " and ".join(names) if len(names) < 3 else f"{names[0]} et al."
        said = re.sub(r"[{}]|\\['\"`^o~]", "", f"{who} {entry.fields['year']}")
        address = entry.fields.get("eprint")
        return f"[{said}](https://arxiv.org/abs/{address})" if address else said

    def link(self, found):
        """``{doc}`text <page>``` as a link into the repository."""
        text, name = re.fullmatch(r"(?:(.*?)\s*<)?([\w/]+)>?", found[1], re.DOTALL).groups()
        if name not in self.titles:
            raise ValueError(f"{{doc}}: there is no page {name!r}")
        chapter = (ROOT / "book" / "src" / f"{name}.md").exists()
        place = f"colab/{name}.ipynb" if chapter else f"book/{name}.md"
        return f"[{text or self.titles[name]}]({self.base}/{place})"

    def term(self, found):
        """``{term}`text <term>``` as a link to the glossary."""
        return f"[{spoken(found[1])}]({self.base}/book/glossary.md)"

    def box(self, found):
        """An admonition as a quotation or, if it is folded on the page, as a ``<details>`` element."""
        head, options, body = found[1].strip(), found[2], self.inline(found[3].strip())
        if "dropdown" in options:
            return f"<details><summary><b>{head}</b></summary>\n\n{body}\n\n</details>"
        return "\n".join(f"> {line}".rstrip() for line in (f"**{head}**", "", *body.splitlines()))

    def inline(self, text):
        text = re.sub(r"\{cite\}`([^`]*)`", self.citation, text)
        text = re.sub(r"\{term\}`([^`]*)`", self.term, text)
        text = re.sub(r"\{py:\w+\}`([^`]*)`", lambda found: f"`{spoken(found[1])}`", text)
        return re.sub(r"\{doc\}`([^`]*)`", self.link, text)

    def markdown(self, text):
        """Turn one cell of MyST into plain Markdown."""
        text = re.sub(r"```\{exercise-start\} (.*)\n(?::.*\n)*```", r"### Exercise: \1", text)
        text = re.sub(r"````\{solution-start\}.*\n(?::.*\n)*````", "#### Solution", text)
        text = re.sub(r"`{3,4}\{(?:exercise|solution)-end\}\n`{3,4}", "", text)
        box = r"```\{admonition\} ([^\n]*)\n((?::[^\n]*\n)*)(.*?)\n```"
        return self.inline(re.sub(box, self.box, text, flags=re.DOTALL)).strip()

    def __call__(self, source):
        """Make the runner's notebook from a chapter's source."""
        notebook, cells, first = assemble(source), [], True
        code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
        setup = self.setup + (self.more if "import transformers" in code else "")
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = self.markdown(cell.source)
                if not cell.source:
                    continue
            else:
                tags = cell.metadata.pop("tags", [])
                name = next((FOLDED[tag] for tag in FOLDED if tag in tags), None)
                if first:
                    cell.source, first = setup, False
                elif name:
                    cell.source = f"#@title {name}\n{cell.source}"
                    cell.metadata.cellView = "form"
                    cell.metadata.jupyter = {"source_hidden": True}
            cells.append(cell)
        notebook.cells = cells
        notebook.metadata.colab = {"provenance": []}
        return notebook


def spoken(target):
    """What a role shows: the text of ``text <target>``, or the last part of ``~package.name``."""
    if found := re.fullmatch(r"(.*?)\s*<[^>]*>", target, re.DOTALL):
        return found[1]
    return target.rpartition(".")[2] if target.startswith("~") else target


def title(text):
    """The first heading of a page."""
    return re.search(r"^# (.*)$", text, re.MULTILINE)[1]


def main():
    """Write every runner notebook, and remove those whose chapter is gone."""
    convert = Converter()
    OUT.mkdir(exist_ok=True)
    for stray in {path.stem for path in OUT.glob("*.ipynb")} - {source.stem for source in sources()}:
        (OUT / f"{stray}.ipynb").unlink()
    for source in sources():
        write(nbformat.from_dict(convert(source)), OUT / f"{source.stem}.ipynb")
    return 0


if __name__ == "__main__":
    sys.exit(main())
