"""How every Numba kernel here is compiled and how many threads it gets."""

import numba
import torch

# Sums may be reordered and contracted to FMAs, which lets LLVM vectorise them; NaN and inf keep their
# meaning.
LOOPS = dict(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
GRAIN = 32768  # entries below which one thread does it all, as in PyTorch
PARALLEL = LOOPS | {"parallel": True}


def arrays(*tensors):
    """View CPU tensors as NumPy arrays, just before a kernel; give Numba as many threads as PyTorch has."""
    # Waking a second thread costs more than a small array is worth, above all on a busy machine.
    large = max(x.numel() for x in tensors) >= GRAIN
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS) if large else 1)
    return [x.detach().contiguous().numpy() for x in tensors]
