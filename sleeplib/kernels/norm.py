"""Root-mean-square norm: one loop over each row on the CPU, PyTorch's own elsewhere."""

import numpy as np
import torch
import torch.nn.functional as F
from numba import njit
from torch.autograd.function import once_differentiable

from .jit import LOOPS, launch

BLOCK = 64  # rows a task; each task sums its own share of the weight's gradient, so sums are reproducible


@njit(**LOOPS)
def _forward(first, last, x, weight, eps, y, rate):
    rows, n = x.shape
    size = x.dtype.type(n)
    for i in range(first * BLOCK, min(last * BLOCK, rows)):
        total = eps * size
        for j in range(n):
            total += x[i, j] * x[i, j]
        r = np.sqrt(size / total)
        for j in range(n):
            y[i, j] = x[i, j] * r * weight[j]
        rate[i] = r


@njit(**LOOPS)
def _backward(first, last, x, weight, rate, dy, dx, dweight):
    rows, n = x.shape
    size = x.dtype.type(n)
    for block in range(first, last):
        dweight[block] = 0
        for i in range(block * BLOCK, min((block + 1) * BLOCK, rows)):
            r = rate[i]
            total = x.dtype.type(0)
            for j in range(n):
                total += dy[i, j] * weight[j] * x[i, j]
                dweight[block, j] += dy[i, j] * x[i, j] * r
            pull = total * r * r / size
            for j in range(n):
                dx[i, j] = r * (dy[i, j] * weight[j] - x[i, j] * pull)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        x = x.contiguous()
        y, rate = torch.empty_like(x), x.new_empty(x.numel() // x.shape[-1])
        flat = (-1, x.shape[-1])
        launch(_forward, -(-len(rate) // BLOCK), x.view(flat), weight, eps, y.view(flat), rate)
        ctx.save_for_backward(x, weight, rate)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, rate = ctx.saved_tensors
        dx = torch.empty_like(x)
        dweight = x.new_empty(-(-rate.numel() // BLOCK), x.shape[-1])
        flat = (-1, x.shape[-1])
        launch(_backward, len(dweight), x.view(flat), weight, rate, dy.reshape(flat), dx.view(flat), dweight)
        return dx, dweight.sum(0) if ctx.needs_input_grad[1] else None, None


def rms_norm(x, weight, eps):
    r"""Scale rows to root mean square 1: ``x / sqrt(mean(x^2) + eps) * weight``.

    Parameters
    ----------
    x : torch.Tensor, shape (..., n)
    weight : torch.Tensor, shape (n,)
    eps : float

    Returns
    -------
    torch.Tensor, shape (..., n)

    Notes
    -----
    Chapter: 06_hybrid
    """
    if x.device.type == "cpu" and x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float64):
        return _RMSNorm.apply(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)
