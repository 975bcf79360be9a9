"""Causal depthwise convolution over time: loops on the CPU, shifted sums elsewhere."""

import torch
from numba import njit
from torch.autograd.function import once_differentiable

from .jit import LOOPS, launch


@njit(**LOOPS)
def _forward(first, last, x, weight, y):
    B, T, C = y.shape
    taps = weight.shape[0]
    for b in range(first, last):
        for t in range(T):
            for c in range(C):
                y[b, t, c] = x[b, t, c] * weight[0, c]
            for i in range(1, taps):
                for c in range(C):
                    y[b, t, c] += x[b, t + i, c] * weight[i, c]


@njit(**LOOPS)
def _backward(first, last, x, weight, dy, dx, dweight):
    B, T, C = dy.shape
    taps = weight.shape[0]
    for b in range(first, last):
        dx[b] = 0
        dweight[b] = 0
        for t in range(T):
            for i in range(taps):
                for c in range(C):
                    dx[b, t + i, c] += dy[b, t, c] * weight[i, c]
                    dweight[b, i, c] += dy[b, t, c] * x[b, t + i, c]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        y = x.new_empty(x.shape[0], x.shape[1] - weight.shape[0] + 1, x.shape[2])
        x = x.contiguous()
        launch(_forward, len(x), x, weight, y)
        ctx.save_for_backward(x, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx, dweight = torch.empty_like(x), x.new_empty(x.shape[0], *weight.shape)
        launch(_backward, len(x), x, weight, dy, dx, dweight)
        return dx, dweight.sum(0)


def causal_convolution(x, weight):
    """Filter each channel over time: ``y[t] = sum_i weight[i] * x[t + i]``.

    Parameters
    ----------
    x : torch.Tensor, shape (B, T + taps - 1, C)
        Inputs behind their left context.
    weight : torch.Tensor, shape (taps, C)
        One filter a channel, oldest input first.

    Returns
    -------
    torch.Tensor, shape (B, T, C)

    Notes
    -----
    Chapter: 06_hybrid
    """
    if x.device.type == "cpu" and x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float64):
        return _Convolution.apply(x, weight)
    T = x.shape[1] - weight.shape[0] + 1
    return sum(x[:, i : i + T] * weight[i] for i in range(weight.shape[0]))
