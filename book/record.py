"""Run what a chapter quotes but is too long for its page: ``python book/record.py 06_hybrid``.

The chapter's cells tagged ``exercise-setup`` define ``record()``, which takes minutes and returns plain data.
Its result goes to ``data/chapters/<chapter>.json``, with what made it.  A second one has its own name:
``record.py 10_training precision`` calls ``record_precision()``, for ``10_training-precision.json``.
The home page has no cells: its ``record()`` stands in intro.py.
"""

import json
import runpy
import sys

from build import BOOK, ROOT, assemble, sources

from sleeplib import records


def setup_cells(chapter):
    """Execute the setup cells of a chapter; return what they define, by name."""
    (source,) = (s for s in sources() if s.stem == chapter)
    namespace = {"__name__": "chapter"}
    for cell in assemble(source).cells:
        if "exercise-setup" in cell.metadata.get("tags", []):
            exec(compile(cell.source, source.name, "exec"), namespace)
    return namespace


def main(chapter, part=None):
    """Execute the setup cells of a chapter, call its record() or that of a part, and write the file."""
    namespace = runpy.run_path(BOOK / "intro.py") if chapter == "intro" else setup_cells(chapter)
    commit, dirty = records.commit()
    called, name = ("record", chapter) if part is None else (f"record_{part}", f"{chapter}-{part}")
    made = dict(command=f"python book/record.py {name.replace('-', ' ')}", commit=commit, dirty=dirty)
    made |= dict(versions=records.versions(), device=records.processor(), result=namespace[called]())
    path = ROOT / "data" / "chapters" / f"{name}.json"
    records.write_atomically(path, (json.dumps(made, indent=1) + "\n").encode())
    print(path.relative_to(ROOT))


if __name__ == "__main__":
    main(*sys.argv[1:])
