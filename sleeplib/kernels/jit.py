"""Whether Numba runs, how its kernels are compiled and kept, and how they are called."""

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from numba import njit, types
from numba.core.caching import FunctionCache
from numba.extending import overload
from torch.autograd.function import once_differentiable

from ..threads import cores

# Sums may be reordered and contracted to FMAs, and a division by zero gives inf, not an exception: both let
# LLVM vectorise.  NaN and inf keep their meaning.
NUMBA_OPTIONS = dict(nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})
GRAIN = 32768  # entries below which one thread does it all, as in PyTorch
PARTS = 4  # pieces of work per thread: whoever is free takes the next, so a busy core holds nobody up
PLAIN = (torch.Tensor, torch.nn.Parameter)  # a subclass may hold no numbers, or other numbers
SOURCES = sha256(b"".join(p.read_bytes() for p in sorted(Path(__file__).parent.glob("*.py")))).digest()


class use_numba:
    """Switch a model's Numba kernels on or off (a bool): for good, or until the end of a ``with`` block.

    When they are off, plain PyTorch (``naive.py``, ``chunked.py``) runs in their place: slower, but
    differentiable twice.  Set ``SLEEPLIB_NUMBA=0`` in the environment to start with them off.

    Chapter: 05_chunks
    """

    on = os.environ.get("SLEEPLIB_NUMBA") != "0"

    def __init__(self, on):
        if not isinstance(on, bool):
            raise TypeError(f"on must be True or False; got {on!r}")
        self.before, use_numba.on = use_numba.on, on

    def __enter__(self):
        return self

    def __exit__(self, *error):
        use_numba.on = self.before


def plain(*tensors):
    """Whether these are ordinary CPU tensors, with numbers in memory, that nothing traces or transforms."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return False
    tensors = [x for x in tensors if x is not None]
    dense = all([type(x) in PLAIN and x.is_cpu and x.layout is torch.strided for x in tensors])
    return dense and not any([x.is_neg() for x in tensors])


def compiled(*tensors, low=False):
    """Whether Numba runs on these: it is on, they are plain, not empty, all float32 or all float64.

    With `low`, any of them may be bfloat16 instead, if the rest are float32.
    """
    tensors = [x for x in tensors if x is not None]
    kinds = {torch.float32 if low and x.dtype == torch.bfloat16 else x.dtype for x in tensors}
    if not use_numba.on or kinds not in ({torch.float32}, {torch.float64}):
        return False
    return plain(*tensors) and all([x.numel() > 0 for x in tensors])


class _Cache(FunctionCache):
    """Machine code on disk.  It includes what a kernel imports: any change in this folder makes it stale."""

    def __init__(self, f):
        super().__init__(f)
        self._cache_file._source_stamp = self._cache_file._source_stamp, SOURCES

    def load_overload(self, *args):
        with suppress(OSError, EOFError, UnpicklingError):  # what cannot be read is compiled again
            return super().load_overload(*args)

    def save_overload(self, *args):
        with suppress(OSError, EOFError, UnpicklingError):
            super().save_overload(*args)


def numba_kernel(f):
    """Compile f at its first call, once for each precision; keep the result if a folder can be written."""
    kernel = njit(**NUMBA_OPTIONS)(f)
    with suppress(RuntimeError):  # no such folder: every process compiles for itself
        kernel._cache = _Cache(f)
    return kernel


def exp(x):
    """e to the x: for float32 a polynomial, right to 3 parts in 10 million in -87 .. 88, constant beyond."""
    return np.exp(x)


@overload(exp, jit_options=NUMBA_OPTIONS, inline="always")
def _exp(x):
    if x != types.float32:
        return lambda x: np.exp(x)
    c0, c1, c2, c3, c4, c5 = map(np.float32, (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2))
    half, one, low, high = map(np.float32, (0.5, 1, -87, 88))
    # ln 2 in two parts: n times the first is exact
    log2e, first, second = map(np.float32, (1.4426950408889634, 0.693359375, -2.12194440e-4))

    def single(x):
        x = min(max(x, low), high)
        n = np.floor(x * log2e + half)
        r = (x - n * first) - n * second  # |r| < 0.35, e^x = 2^n e^r
        series = ((((c0 * r + c1) * r + c2) * r + c3) * r + c4) * r + c5
        return (series * r * r + r + one) * np.int32((np.int32(n) + 127) << 23).view(np.float32)

    return single


def wide(x):
    """A number of an array, to compute with: bfloat16, which NumPy lacks, comes as bits and is widened."""
    return x


@overload(wide, inline="always")
def _wide(x):
    if x != types.uint16:
        return lambda x: x
    return lambda x: np.int32(np.int32(x) << 16).view(np.float32)


def narrow(x, y):
    """What is stored for x in an array y: for bfloat16 the bits of the nearest number, ties to even."""
    return x


@overload(narrow, inline="always")
def _narrow(x, y):
    if y.dtype != types.uint16:
        return lambda x, y: x

    def bits(x, y):
        word = np.float32(x).view(np.int32)
        nan = np.int32((word & 0x7FFFFFFF) > 0x7F800000)  # NaN stays NaN: cut off, with its quiet bit set
        return np.uint16(((word + (1 - nan) * (0x7FFF + ((word >> 16) & 1))) >> 16) | (nan << 6))

    return bits


def rounded(x):
    """The precision of a loop's result that goes into a product: autocast's bfloat16, or that of x."""
    low = x.dtype == torch.float32 and torch.is_autocast_enabled("cpu")
    return torch.bfloat16 if low and torch.get_autocast_dtype("cpu") == torch.bfloat16 else x.dtype


def strided_rows(x):
    """The rows of x, along its last axis, without a copy where they lie evenly in memory.

    Returns memory from the first row on, one axis, and the strides (inner, outer, step): row i begins at
    ``i // inner * outer + i % inner * step``.
    """
    *leading, inner, n = x.shape
    if x.is_contiguous():
        return x.detach().view(-1), (inner, inner * n, n)
    pairs = zip(x.stride()[:-3], x.stride()[1:-2], x.shape[1:-2])  # of neighbours among the leading axes
    if x.stride(-1) != 1 or any(outside != inside * size for outside, inside, size in pairs):
        x = x.contiguous()
    outer, step = x.stride(-3) if leading else 0, x.stride(-2)
    end = (x[..., 0, 0].numel() - 1) * outer + (inner - 1) * step + n
    return x.detach().as_strided((end,), (1,)), (inner, outer, step)


class Differentiable(torch.autograd.Function):
    """An autograd function whose gradient is a kernel too, so it can be differentiated only once."""

    def __init_subclass__(cls):
        cls.forward, cls.backward = staticmethod(cls.forward), staticmethod(once_differentiable(cls.backward))


@cache
def _pool():
    """Threads for the kernels, made when first needed.  They sleep between calls; OpenMP's would spin."""
    return ThreadPoolExecutor(len(cores()), "sleeplib")


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork


def _array(x):
    """The numbers of a CPU tensor; detach() is not free, and most tensors here need none."""
    x = (x.detach() if x.requires_grad else x).contiguous()
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


def launch(kernel, count, *args):
    """Call ``kernel(first, last, *arrays)`` over range(count), in parts on as many threads as PyTorch uses.

    CPU tensors become arrays; floats take the first one's precision, at least float32.  The parts must not
    depend on one another.  What a kernel fills must be contiguous: otherwise it would fill a copy.
    """
    args = [_array(x) if isinstance(x, torch.Tensor) else x for x in args]
    size = max([x.size for x in args if type(x) is np.ndarray])
    number = np.float64 if args[0].dtype == np.float64 else np.float32
    args = [number(x) if type(x) is float else x for x in args]
    threads = torch.get_num_threads() if size >= GRAIN else 1
    if threads == 1:
        kernel(0, count, *args)
        return
    bounds = np.linspace(0, count, min(count, PARTS * threads) + 1, dtype=int).tolist()
    parts = iter(list(zip(bounds, bounds[1:])))

    def work():
        for first, last in parts:
            kernel(first, last, *args)

    helpers = [_pool().submit(work) for _ in range(threads - 1)]
    work()
    for helper in helpers:
        if not helper.cancel():
            helper.result()
