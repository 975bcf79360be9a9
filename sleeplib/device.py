"""Where a run runs: the device, its memory, and a training step captured as one CUDA graph."""

import ctypes
import mmap
import re
import resource
import sys
from pathlib import Path

import torch


class CapturedStep:
    """Forward and backward of a training step, captured once as a CUDA graph and then replayed.

    Parameters
    ----------
    trainer : Trainer
    batch : Batch
        Gives the shapes.

    Notes
    -----
    Nothing in a step depends on values read back from the GPU: which chunks are awake is known beforehand.
    The optimizers stay outside the graph, where their learning rates may change.

    Chapter: 11_rule110
    """

    def __init__(self, trainer, batch):
        self.inputs = batch.inputs.to(trainer.device)
        self.labels = batch.labels.to(trainer.device)
        parameters = list(trainer.model.parameters())
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # warm up outside the graph: caches, cuBLAS handles, rotary tables
            for _ in range(3):
                for p in parameters:
                    p.grad = None
                trainer.loss(self.inputs, self.labels).backward()
        torch.cuda.current_stream().wait_stream(side)
        for p in parameters:
            p.grad = None
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = trainer.loss(self.inputs, self.labels)
            self.loss.backward()
        self.loss = self.loss.detach()

    def __call__(self, batch):
        self.inputs.copy_(batch.inputs.pin_memory(), non_blocking=True)
        self.labels.copy_(batch.labels.pin_memory(), non_blocking=True)
        self.graph.replay()
        return self.loss.clone()


def find_device(name):
    """Look up "auto", "cpu", "cuda" or one CUDA device; raise ValueError if this machine has no such."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if count else "cpu"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    if (
        device is None
        or device.type not in ("cpu", "cuda")
        or device.type == "cuda"
        and not (device.index or 0) < count
    ):
        raise ValueError(f"device must be 'auto', 'cpu' or one of {count} CUDA devices here; got {name!r}")
    return device


def hold_on_to_memory(size=2**30 - 2**22):
    """Let glibc keep freed memory, and ask for large pages in the next `size` bytes of it.

    Each step then gets the same pages back and need not fault them in anew, and the processor looks up fewer
    addresses.  Nothing happens where the C library or the kernel knows no such wish.
    """
    if sys.platform != "linux":
        return
    c = ctypes.CDLL(None)
    if not hasattr(c, "mallopt"):
        return
    # trim threshold, top pad, mmap threshold
    for option, value in ((-1, 2**31 - 1), (-2, 2**26), (-3, 2**30)):
        c.mallopt(option, value)
    pointer, count = ctypes.c_void_p, ctypes.c_size_t
    c.malloc.restype, c.malloc.argtypes, c.free.argtypes = pointer, [count], [pointer]
    c.madvise.argtypes = [pointer, count, ctypes.c_int]
    block = c.malloc(size)  # only addresses: untouched, it takes no memory; freed, it stays the heap's top
    if block:
        page = mmap.PAGESIZE
        start = -(-block // page) * page
        c.madvise(start, (block + size - start) // page * page, mmap.MADV_HUGEPAGE)
        c.free(block)


def peak_bytes(device):
    """The most memory in use so far: tensors on a GPU, the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":  # getrusage would count what the process was before it became this program
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
