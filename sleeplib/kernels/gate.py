"""The gate of a feed-forward layer in one sweep."""

import numpy as np

from ..checks import check_tensor
from . import naive
from .jit import Differentiable, compiled, exp, launch, narrow, numba_kernel, wide


@numba_kernel
def _forward(first, last, x, y):
    n, one = y.shape[1], np.float32(1)
    for i in range(first, last):
        gate, up = x[i, :n], x[i, n:]
        for j in range(n):
            g = wide(gate[j])
            y[i, j] = narrow(g / (one + exp(-g)) * wide(up[j]), y)


@numba_kernel
def _backward(first, last, x, dy, dx):
    n, one = dy.shape[1], np.float32(1)
    for i in range(first, last):
        gate, up, dgate, dup, out = x[i, :n], x[i, n:], dx[i, :n], dx[i, n:], dy[i]
        for j in range(n):
            g, d = wide(gate[j]), wide(out[j])
            s = one / (one + exp(-g))
            dgate[j] = narrow(d * wide(up[j]) * s * (one + g * (one - s)), dx)
            dup[j] = narrow(d * s * g, dx)


class _SwiGLU(Differentiable):
    def forward(ctx, x):
        x = x.contiguous()
        n = x.shape[-1] // 2
        y = x.new_empty(*x.shape[:-1], n)
        launch(_forward, y.numel() // n, x.view(-1, 2 * n), y.view(-1, n))
        ctx.save_for_backward(x)
        return y

    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        n = x.shape[-1] // 2
        dx = x.new_empty(x.shape)
        launch(_backward, dy.numel() // n, x.view(-1, 2 * n), dy.reshape(-1, n), dx.view(-1, 2 * n))
        return dx


def swiglu(x):
    """Let the first half of each row of x (..., 2 n) gate the second: ``silu(x[..., :n]) * x[..., n:]``.

    Chapter: 06_hybrid
    """
    check_tensor("x", x, (..., "2 n"))
    if x.shape[-1] % 2:
        raise ValueError(f"x must have an even last axis; got {tuple(x.shape)}")
    return _SwiGLU.apply(x) if compiled(x, low=True) else naive.swiglu(x)
