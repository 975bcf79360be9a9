"""Where a run runs: the device, its memory, a step captured as one CUDA graph, and signals from outside."""

import ctypes
import mmap
import os
import platform
import re
import signal
import sys
import threading
from contextlib import contextmanager, suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch


class CapturedStep:
    """Forward and backward of a training step, captured once as a CUDA graph and then replayed.

    `loss`, a callable of inputs and labels on the device, must not read back from there.  `parameters` get
    the gradients; the optimizers stay outside the graph, where their rates may change.  The Batch `batch`
    gives the shapes; one of another shape is refused: a copy into the graph would broadcast it.

    Chapter: 11_rule110
    """

    def __init__(self, loss, parameters, batch, device):
        self.inputs, self.labels = batch.inputs.to(device), batch.labels.to(device)
        parameters = list(parameters)

        def forward_backward():
            for p in parameters:
                p.grad = None
            (value := loss(self.inputs, self.labels)).backward()
            return value.detach()

        with torch.cuda.device(device):  # streams and graphs belong to the current device
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # warm up outside the graph: caches, cuBLAS handles, rotary tables
                for _ in range(3):
                    forward_backward()
            torch.cuda.current_stream().wait_stream(side)
            for p in parameters:  # let go of them before the capture, not in it
                p.grad = None
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.loss = forward_backward()

    def __call__(self, batch):
        for name in ("inputs", "labels"):
            own, new = getattr(self, name), getattr(batch, name)
            if own.shape != new.shape:
                raise ValueError(f"batch: {name} {tuple(new.shape)}, captured with {tuple(own.shape)}")
            own.copy_(new.pin_memory(), non_blocking=True)
        self.graph.replay()
        return self.loss.clone()


@contextmanager
def compiled_blocks(model):
    """Let PyTorch's compiler fuse what a model's blocks do between their matrix products, within `with`.

    On a GPU every small operation reads and writes all of its tensors, which takes longer than the products.
    What a :class:`CapturedStep` captured meanwhile stays fused; whoever calls the model later finds it as it
    was, so that scores need no second compilation.  Without Triton nothing is fused.

    Chapter: 11_rule110
    """
    if find_spec("triton") is None:
        yield
        return
    # One compilation per kind of block and of memory that it may find: more are a mistake, but 8 too few.
    with torch._dynamo.config.patch(recompile_limit=64):
        try:
            for layer in model.layers:
                layer.forward = torch.compile(layer.forward, dynamic=False)
            yield
        finally:
            for layer in model.layers:
                vars(layer).pop("forward", None)


def find_device(name):
    """Look up "auto", "cpu", "cuda", or one CUDA device by name or number; ValueError if there is none."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    wanted = ("cuda" if count else "cpu") if str(name) == "auto" else str(name)
    with suppress(RuntimeError):
        device = torch.device(f"cuda:{wanted}" if wanted.isdecimal() else wanted)
        if device.type == "cpu" or device.type == "cuda" and (device.index or 0) < count:
            return device
    raise ValueError(f"device must be 'auto', 'cpu' or one of {count} CUDA devices here; got {name!r}")


@cache
def multiplies_bfloat16(device):
    """Whether a device multiplies matrices in bfloat16 faster than in float32.

    A GPU before Ampere and most CPUs only emulate such products. An x86 processor needs AMX: AVX-512's
    bfloat16 instructions alone were slower than float32 where we measured (``sleeplib bench`` prints both).
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if platform.machine().lower() in ("x86_64", "amd64"):  # oneDNN says yes to AVX-512, too
        return torch.cpu._is_amx_tile_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


@cache
def tune_malloc(size=2**30 - 2**22):
    """Let glibc keep freed memory and ask for large pages in its next `size` bytes; once per process.

    Each step then gets the same pages back and need not fault them in anew, and the processor looks up fewer
    addresses.  A run on the CPU does this when it starts to train, unless the environment says
    ``SLEEPLIB_TUNE_MALLOC=0``.  Nothing happens where the C library or the kernel has no such call.
    """
    refused = os.environ.get("SLEEPLIB_TUNE_MALLOC") == "0" or sys.platform != "linux"
    if refused or not hasattr(c := ctypes.CDLL(None), "mallopt"):
        return
    # trim threshold, top pad, mmap threshold
    for option, value in ((-1, 2**31 - 1), (-2, 2**26), (-3, 2**30)):
        c.mallopt(option, value)
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    pointer, count = ctypes.c_void_p, ctypes.c_size_t
    c.malloc.restype, c.malloc.argtypes, c.free.argtypes = pointer, [count], [pointer]
    c.madvise.argtypes = [pointer, count, ctypes.c_int]
    # Only addresses: untouched, the block takes no memory; freed, it stays the heap's top.
    if block := c.malloc(size):
        page = mmap.PAGESIZE
        start = -(-block // page) * page
        c.madvise(start, (block + size - start) // page * page, mmap.MADV_HUGEPAGE)
        c.free(block)


def free_bytes(device):
    """Memory that this process can still have, in bytes.

    On a GPU what the driver has left and what PyTorch holds unused; on a CPU what Linux calls available, and
    None where that is not known.
    """
    if device.type != "cuda":
        file = Path("/proc/meminfo")
        found = re.search(r"MemAvailable:\s+(\d+)", file.read_text()) if file.is_file() else None
        return found and int(found[1]) * 1024
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def peak_bytes(device):
    """The most memory in use so far: tensors on a GPU, the whole process on the CPU; 0 if not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # getrusage counts what the process was before it became this program
    if status.is_file() and (found := re.search(r"VmHWM:\s+(\d+)", status.read_text())):
        return int(found[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def deferred_interrupt():
    """Note the first SIGINT or SIGTERM in a yielded list, so that no step is cut short; a second raises."""
    noted = []

    def note(number, frame):
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    # Signals go to the main thread only; another one may not even ask for them.
    main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if main else ()
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
