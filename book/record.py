"""Run what a chapter quotes but is too long for its page: ``python book/record.py 06_hybrid``.

The chapter's cells tagged ``exercise-setup`` define ``record()``, which takes minutes and returns plain data.
Its result goes to ``data/chapters/<chapter>.json``, with what ran it.  The home page has no cells: its
``record()`` stands in intro.py.
"""

import json
import runpy
import sys

from build import BOOK, ROOT, assemble, sources

from sleeplib import records


def setup_cells(chapter):
    """What the setup cells of a chapter define, by name."""
    (source,) = (s for s in sources() if s.stem == chapter)
    namespace = {"__name__": "chapter"}
    for cell in assemble(source).cells:
        if "exercise-setup" in cell.metadata.get("tags", []):
            exec(compile(cell.source, source.name, "exec"), namespace)
    return namespace


def main(chapter):
    """Execute the setup cells of one chapter, call its record(), write the file."""
    namespace = runpy.run_path(BOOK / "intro.py") if chapter == "intro" else setup_cells(chapter)
    commit, dirty = records.commit()
    made = dict(command=f"python book/record.py {chapter}", commit=commit, dirty=dirty)
    made |= dict(versions=records.versions(), device=records.processor(), result=namespace["record"]())
    path = ROOT / "data" / "chapters" / f"{chapter}.json"
    records.write_atomically(path, (json.dumps(made, indent=1) + "\n").encode())
    print(path.relative_to(ROOT))


if __name__ == "__main__":
    main(*sys.argv[1:])
