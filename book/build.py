"""Build the chapters: book/src/NN_topic.md (edited) becomes book/NN_topic.ipynb (executed, committed).

A notebook is a function of its source, of sleeplib and of the machine: ids, counts and metadata hold nothing
random and no times, so that building twice gives the same bytes.
"""

import argparse
import hashlib
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import jupytext
import nbformat
import yaml
from nbclient import NotebookClient

BOOK = Path(__file__).resolve().parent
ROOT = BOOK.parent
LIMIT = 300_000  # bytes a notebook

BOOTSTRAP = """\
# On Colab this fetches sleeplib, and nothing else, at the version of this page. Elsewhere it does nothing.
import importlib.util
import sys

if importlib.util.find_spec("sleeplib") is None and "google.colab" in sys.modules:
    %pip install --quiet --no-deps git+{url}@{branch}"""


def bootstrap_cell():
    """The first code cell of every chapter; address and tag come from _config.yml."""
    repository = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]
    cell = nbformat.v4.new_code_cell(BOOTSTRAP.format(**repository))
    cell.metadata.tags = ["hide-input"]
    return cell


def sources():
    """The sources of all chapters, in order."""
    return sorted((BOOK / "src").glob("*.md"))


def target(source):
    """The notebook that `source` becomes."""
    return BOOK / f"{source.stem}.ipynb"


def assemble(source):
    """Read a source and return its notebook, with the bootstrap cell, without outputs."""
    notebook = jupytext.reads(source.read_text(), fmt="md:myst")
    first = next((i for i, c in enumerate(notebook.cells) if c.cell_type == "code"), len(notebook.cells))
    notebook.cells.insert(first, bootstrap_cell())
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    seen = set()
    for cell in notebook.cells:
        # An id from the text moves with its cell and changes with nothing else.
        text, copy = f"{cell.cell_type}\n{cell.source}", 0
        while (identity := hashlib.sha256(f"{text}{copy or ''}".encode()).hexdigest()[:8]) in seen:
            copy += 1
        seen.add(identity)
        cell.id = identity
    return notebook


def inputs(notebook):
    """What the source of a chapter determines: type, text and metadata of each cell."""
    return [(c.cell_type, c.source, {k: v for k, v in c.metadata.items() if v}) for c in notebook.cells]


def is_current(source):
    """Whether the notebook exists and was built from the source as it is now."""
    path = target(source)
    return path.exists() and inputs(nbformat.read(path, as_version=4)) == inputs(assemble(source))


def peak_mib(pid):
    """Peak memory of a running process in MiB, or None where /proc does not say."""
    try:
        return int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024
    except (OSError, TypeError):
        return None


def execute(notebook):
    """Run every cell in a fresh kernel; return the seconds and the kernel's peak MiB."""
    os.environ |= {"SLEEPLIB_BUILDING": "1", "PYTHONHASHSEED": "0"}
    client = NotebookClient(
        notebook, timeout=None, store_widget_state=True, resources={"metadata": {"path": str(BOOK)}}
    )
    start = time.perf_counter()
    with client.setup_kernel():
        for index, cell in enumerate(notebook.cells):
            client.execute_cell(cell, index)
        client.set_widgets_metadata()
        peak = peak_mib(client.km.provisioner.pid)
    return time.perf_counter() - start, peak


def normalise(notebook):
    """Remove what is random, and times, from an executed notebook."""
    count = 0
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        count += 1
        cell.execution_count = count
        cell.outputs = join_streams(cell.outputs)
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = count
    notebook.metadata.pop("language_info", None)
    notebook.metadata.language_info = {"name": "python"}
    # Widget ids are numbered in the order in which they were made, before keys are sorted.
    text = json.dumps(notebook, ensure_ascii=False)
    identities = re.findall(r"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])", text)
    for number, identity in enumerate(dict.fromkeys(identities)):
        text = text.replace(identity, f"{number:032x}")
    text = re.sub(r"(?<= at )0x[0-9a-f]{6,}", "0x0", text)
    return nbformat.from_dict(json.loads(text))


def join_streams(outputs):
    """Join neighbouring pieces of one stream: where the kernel cuts it is a matter of chance."""
    joined = []
    for output in outputs:
        last = joined[-1] if joined else {}
        if output.output_type == "stream" == last.get("output_type") and output.name == last.name:
            last.text += output.text
        else:
            joined.append(output)
    return joined


def write(notebook, path):
    """Write a notebook whole or not at all; not if it names a folder of this machine, or is too large."""
    content = nbformat.writes(notebook).rstrip("\n") + "\n"
    if str(ROOT) in content or str(Path.home()) in content:
        raise ValueError(f"{path.name}: an output names a folder of this machine")
    if len(content.encode()) > LIMIT:
        raise ValueError(f"{path.name}: {len(content.encode())} bytes, more than {LIMIT}")
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".building-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def build(source):
    """Execute one chapter and write its notebook."""
    notebook = assemble(source)
    seconds, peak = execute(notebook)
    write(normalise(notebook), target(source))
    memory = f", {peak / 1024:.1f} GB" if peak else ""
    print(f"{source.stem}: {seconds / 60:.1f} minutes{memory}, {target(source).stat().st_size // 1000} kB")


def main(arguments=None):
    """Build what changed; with ``--check``, only say what would be built."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("chapters", nargs="*", help="such as 08_sleep; if absent, every chapter")
    parser.add_argument("--all", action="store_true", help="also those whose source did not change")
    parser.add_argument("--check", action="store_true", help="execute nothing; exit with 1 if a pair differs")
    options = parser.parse_args(arguments)
    unknown = set(options.chapters) - {s.stem for s in sources()}
    if unknown:
        parser.error(f"no such chapter: {', '.join(sorted(unknown))}")
    chosen = [s for s in sources() if not options.chapters or s.stem in options.chapters]
    stale = [s for s in chosen if options.all or not is_current(s)]
    if options.check:
        for source in stale:
            print(f"{source.stem}: the notebook is not built from this source; run make notebooks")
        return int(bool(stale))
    for source in stale:
        build(source)
    if not stale:
        print("every chapter is current")
    return 0


if __name__ == "__main__":
    sys.exit(main())
