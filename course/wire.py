"""Data between the grader and a student's process, in a format that cannot carry code.

A message is a JSON tree and the bytes of its arrays: two lengths (8 bytes each), the tree, the bytes.
Numbers and text stand in the tree as they are; everything else is an object {"is": kind, ...}.  Reading one
runs nothing of the sender's: no pickle, no class by name.
"""

import json
import math
import struct
import sys

import numpy as np

LIMIT = 32 << 20  # bytes a message
TREE = 12 << 20  # bytes of its tree: small, since a tree grows when it is read
NUMBERS = {np.dtype(t).str for t in ("f2 f4 f8 i1 i2 i4 i8 u1 u2 u4 u8 ?".split())}
PLAIN = (type(None), bool, int, float, str)


class Malformed(ValueError):
    """What arrived is not a message."""


def encode(value, function=None):
    """Turn `value` into one message, a list of bytes and buffers.  It is a TypeError if it is not data.

    `function`, if given, is called with each function inside and returns the number that stands for it.
    """
    blobs = []

    def array(x, kind):
        x = np.asarray(x)
        if x.dtype.str not in NUMBERS:
            raise TypeError(f"an array of {x.dtype} cannot be sent, only numbers and booleans")
        blobs.append(np.ascontiguousarray(x).reshape(-1).view("u1").data)
        return {"is": kind, "dtype": x.dtype.str, "shape": list(x.shape)}

    def tree(x):
        if type(x) in PLAIN:
            return x
        if isinstance(x, bytes):
            return array(np.frombuffer(x, "u1"), "bytes")
        if type(x) in (list, tuple):
            return {"is": type(x).__name__, "items": [tree(y) for y in x]}
        if type(x) is dict and all(type(key) in (str, int) for key in x):
            return {"is": "dict", "items": [[key, tree(y)] for key, y in x.items()]}
        if isinstance(x, np.generic):
            return array(x, "number")
        if isinstance(x, np.ndarray):
            return array(x, "array")
        torch = sys.modules.get("torch")  # loaded only where somebody uses it: it takes seconds
        if torch and isinstance(x, torch.Tensor):
            x = x.detach().cpu()
            if x.dtype == torch.bfloat16:
                return array(x.view(torch.int16).numpy(), "bfloat16")
            return array(x.numpy(), "tensor")
        # The library's own classes: told by name, so that nothing is imported where nobody uses it.
        name = f"{type(x).__module__.partition('.')[0]}.{type(x).__name__}"
        if name == "sleeplib.LMState":
            return {"is": "state", "items": [[key, tree(y)] for key, y in vars(x).items()]}
        if name == "sleeplib.HybridLM":
            weights = {key: y.contiguous() for key, y in x.state_dict().items()}
            return {"is": "model", "config": tree(vars(x.config)), "weights": tree(weights)}
        if callable(x) and function:
            return {"is": "function", "number": function(x)}
        raise TypeError(f"{type(x).__name__} is no data; wanted numbers, text, arrays, lists of them")

    text = json.dumps(tree(value)).encode()
    size = sum(map(len, blobs))
    if len(text) > TREE or len(text) + size > LIMIT:
        raise TypeError(f"{(len(text) + size) >> 20} MiB are too much; {LIMIT >> 20} can be sent")
    return [struct.pack("!QQ", len(text), size) + text, *blobs]


def decode(text, blob, function=None):
    """The value in a message; Malformed if it is not one.

    `function`, if given, makes a function of the number that stands for it.  Giving it also says that the
    sender is trusted: models too are then accepted.
    """
    position = 0

    def array(x, kind):
        nonlocal position
        dtype, shape = x["dtype"], tuple(x["shape"])
        if dtype not in NUMBERS or not all(type(n) is int and n >= 0 for n in shape):
            raise Malformed("an array of unknown kind")
        size = math.prod(shape) * np.dtype(dtype).itemsize
        data, position = blob[position : position + size], position + size
        data = np.array(np.frombuffer(data, dtype).reshape(shape))
        if kind == "bytes":
            return data.tobytes()
        if kind == "number":
            return data[()]
        if kind == "array":
            return data
        import torch

        data = torch.from_numpy(data)
        return data.view(torch.bfloat16) if kind == "bfloat16" else data

    def value(x):
        if type(x) in PLAIN:
            return x
        kind = x["is"]
        if kind in ("list", "tuple"):
            return (list if kind == "list" else tuple)([value(y) for y in x["items"]])
        if kind in ("dict", "state"):
            items = {key if type(key) in (str, int) else None: value(y) for key, y in x["items"]}
            return state(items) if kind == "state" else items
        if kind in ("bytes", "number", "array", "tensor", "bfloat16"):
            return array(x, kind)
        if kind == "model" and function:
            return model(value(x["config"]), value(x["weights"]))
        if kind == "function" and function:
            return function(x["number"])
        raise Malformed(f"unknown kind {kind!r:.40}")

    try:
        return value(json.loads(text))
    except Malformed:
        raise
    except (ValueError, TypeError, KeyError, IndexError, RecursionError, RuntimeError) as error:
        raise Malformed(f"{type(error).__name__}: {error}") from error


def state(items):
    import sleeplib

    return sleeplib.LMState(**items)


def model(config, weights):
    import sleeplib

    made = sleeplib.HybridLM(sleeplib.ModelConfig(**config))
    made.load_state_dict(weights)
    return made


def send(sock, parts):
    """Send what `encode` has made."""
    for part in parts:
        sock.sendall(part)


def receive(sock, function=None, limit=LIMIT):
    """The next value; EOFError if the other side is gone, Malformed if what comes is not a message."""
    lengths = struct.unpack("!QQ", exactly(sock, 16))
    if sum(lengths) > limit or lengths[0] > TREE:
        raise Malformed(f"a message of {sum(lengths)} bytes is too long")
    text, blob = (exactly(sock, n) for n in lengths)
    return decode(bytes(text), memoryview(blob), function)


def exactly(sock, count):
    data = bytearray(count)
    view = memoryview(data)
    while view:
        got = sock.recv_into(view)
        if not got:
            raise EOFError("the other side is gone")
        view = view[got:]
    return data
