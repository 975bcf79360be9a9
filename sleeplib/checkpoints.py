"""The state of a run in one file: safetensors and JSON, no pickle, and a digest over every byte."""

import hashlib
import json
import os
import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save

from .records import write_atomically

BLANK = b"?" * 64  # stands for the digest while it is taken


def save_checkpoint(trainer, path):
    """Write all that a later call needs to go on bit for bit; every process calls, the first writes."""
    tensors, notes = trainer.snapshot()
    if trainer.rank > 0:
        return
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    text = json.dumps(notes, allow_nan=False)
    content = save(tensors, metadata={"sleeplib": text, "digest": BLANK.decode()})
    content = content.replace(BLANK, hashlib.sha256(content).hexdigest().encode(), 1)
    try:
        write_atomically(path, content)
    except OSError as error:
        raise OSError(error.errno, f"checkpoint not written: {error.strerror}", str(path)) from error


def load_checkpoint(trainer, path):
    """Go on where :func:`save_checkpoint` stopped; return its notes.

    It is a ValueError if a single bit is wrong, or if the file belongs to another run.
    """
    content = Path(path).read_bytes()
    found = re.search(rb'"digest":"([0-9a-f]{64})"', content)
    if not found or hashlib.sha256(content.replace(found[1], BLANK, 1)).hexdigest() != found[1].decode():
        why = "its digest is wrong" if found else "it has no digest"
        raise ValueError(f"checkpoint: {path} is damaged, or no checkpoint of a run ({why})")
    try:
        notes = _notes(content)
        trainer.restore(load(content), notes)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"checkpoint: {path} {error}") from error
    return notes


def steps_done(path):
    """Steps in a checkpoint, unverified; 0 if there is none or it cannot be read: the run will say why."""
    try:
        with open(path, "rb") as file:
            head = file.read(8)
            size = min(int.from_bytes(head, "little"), os.fstat(file.fileno()).st_size)
            return int(_notes(head + file.read(size))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _notes(content):
    size = int.from_bytes(content[:8], "little")
    return json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["sleeplib"])
