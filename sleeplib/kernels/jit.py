"""How every Numba kernel here is compiled, and how it is called."""

import threading

import numba
import torch

# Numba's OpenMP pool stays awake beside PyTorch's and the two fight for the cores; this one sleeps between
# kernels.  It serves one caller at a time, hence the lock.
if numba.config.THREADING_LAYER == "default":
    numba.config.THREADING_LAYER = "workqueue"
LOCK = threading.Lock()

# Sums may be reordered and contracted to FMAs, which lets LLVM vectorise them; NaN and inf keep their
# meaning.
LOOPS = dict(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
PARALLEL = LOOPS | {"parallel": True}
GRAIN = 32768  # entries below which one thread does it all, as in PyTorch


def launch(kernel, *args):
    """Call a kernel on CPU tensors as arrays, with floats in the first one's precision."""
    arrays = [x.detach().contiguous().numpy() for x in args if isinstance(x, torch.Tensor)]
    rest = iter(arrays)
    number = arrays[0].dtype.type
    args = [
        next(rest) if isinstance(x, torch.Tensor) else number(x) if isinstance(x, float) else x for x in args
    ]
    threads = 1
    if max(x.size for x in arrays) >= GRAIN:
        # PyTorch's own threads still spin for a while after its last product: leave them half the cores.
        threads = max(1, min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS) // 2)
    with LOCK:
        before = numba.get_num_threads()
        numba.set_num_threads(threads)
        try:
            kernel(*args)
        finally:
            numba.set_num_threads(before)
