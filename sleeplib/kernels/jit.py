"""How every Numba kernel here is compiled and how many threads it gets."""

import numba
import torch

# Sums may be reordered and contracted to FMAs, which lets LLVM vectorise them; NaN and inf keep their
# meaning.
LOOPS = dict(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
PARALLEL = LOOPS | {"parallel": True}


def arrays(*tensors):
    """View CPU tensors as NumPy arrays, just before a kernel; give Numba as many threads as PyTorch has."""
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
    return [x.detach().contiguous().numpy() for x in tensors]
