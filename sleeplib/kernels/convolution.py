"""Causal depthwise convolution over time in one sweep."""

import numpy as np
import torch

from ..checks import check_tensor, integer
from . import naive
from .jit import Differentiable, compiled, exp, launch, narrow, numba_kernel, strided_rows, wide

BLOCK = 8  # sequences in a task; each task sums its own share of the filters' gradient


@numba_kernel
def _filter(row, x, start, step, context, weight, t):
    """Fill row (C,) with the filtered input at position t; the context stands before the first position."""
    taps, C = len(weight), len(row)
    row[:] = 0
    for i in range(taps):
        s = t + i - (taps - 1)  # the input's position
        if s >= 0:
            past = x[start + s * step :]
        elif len(context):
            past = context[t + i]
        else:
            continue
        tap = weight[i]
        for j in range(C):
            row[j] += wide(past[j]) * tap[j]


@numba_kernel
def _forward(first, last, x, strides, context, weight, silu, y):
    (B, T, C), one = y.shape, y.dtype.type(1)
    for b in range(first * BLOCK, min(last * BLOCK, B)):
        for t in range(T):
            row = y[b, t]
            _filter(row, x, b * strides[1], strides[2], context[b], weight, t)
            if silu:
                for c in range(C):
                    row[c] = row[c] / (one + exp(-row[c]))


@numba_kernel
def _backward(first, last, x, strides, context, weight, silu, dy, dx, dcontext, dweight):
    B, T, C = dy.shape
    taps, one = len(weight), dy.dtype.type(1)
    z, dz, sums = np.empty(C, dy.dtype), np.empty(C, dy.dtype), np.empty((T, C), dy.dtype)
    for block in range(first, last):
        dweight[block] = 0
        for b in range(block * BLOCK, min((block + 1) * BLOCK, B)):
            sums[:] = 0
            dcontext[b] = 0
            for t in range(T):
                dz[:] = dy[b, t]
                if silu:
                    _filter(z, x, b * strides[1], strides[2], context[b], weight, t)
                    for c in range(C):
                        s = one / (one + exp(-z[c]))
                        dz[c] *= s * (one + z[c] * (one - s))
                for i in range(taps):
                    s = t + i - (taps - 1)
                    if s >= 0:
                        past, dpast = x[b * strides[1] + s * strides[2] :], sums[s]
                    elif len(context[b]):
                        past, dpast = context[b, t + i], dcontext[b, t + i]
                    else:
                        continue
                    tap, dtap = weight[i], dweight[block, i]
                    for c in range(C):
                        dpast[c] += dz[c] * tap[c]
                    for c in range(C):
                        dtap[c] += dz[c] * wide(past[c])
            for t in range(T):
                for c in range(C):
                    dx[b, t, c] = narrow(sums[t, c], dx)


class _Convolution(Differentiable):
    def forward(ctx, x, weight, context, silu):
        y = weight.new_empty(x.shape)
        context = x.new_empty(len(x), 0, x.shape[2]) if context is None else context.to(x.dtype)
        launch(_forward, -(-len(x) // BLOCK), *strided_rows(x), context, weight, silu, y)
        ctx.save_for_backward(x, weight, context)
        ctx.silu = silu
        return y

    def backward(ctx, dy):
        x, weight, context = ctx.saved_tensors
        dx, dcontext = x.new_empty(x.shape), dy.new_empty(context.shape)
        dweight = dy.new_empty(-(-len(x) // BLOCK), *weight.shape)
        given = *strided_rows(x), context, weight, ctx.silu
        launch(_backward, len(dweight), *given, dy, dx, dcontext, dweight)
        return dx, dweight.sum(0), dcontext if ctx.needs_input_grad[2] else None, None


def causal_convolution(x, weight, context=None, silu=False):
    """Filter each channel over time: ``y[t] = sum_i weight[i] * x[t - taps + 1 + i]``, then SiLU if wanted.

    x and y are (B, T, C), the weight is (taps, C), oldest input first, and context (B, taps - 1, C) holds the
    inputs before the first; zeros if absent.  If x is in bfloat16, y has the precision of the weight.

    Chapter: 06_hybrid
    """
    check_tensor("x", x, ("B", "T", "C"))
    check_tensor("weight", weight, ("taps", x.shape[2]), like=x)
    if len(weight) < 1:
        raise ValueError(f"weight must have at least one tap; got {tuple(weight.shape)}")
    if context is not None:
        check_tensor("context", context, (len(x), len(weight) - 1, x.shape[2]), like=x)
    fast = weight.dtype != torch.bfloat16 and compiled(x, weight, context, low=True)
    run = _Convolution.apply if fast else naive.causal_convolution
    return run(x, weight, context, bool(silu))


def prepend_context(x, context, taps):
    """Put context (B, taps - 1, C), the inputs before x, or zeros if it is None, in front of x (B, T, C)."""
    check_tensor("x", x, ("B", "T", "C"))
    taps = integer("taps", taps, 1)
    if context is not None:
        check_tensor("context", context, (len(x), taps - 1, x.shape[2]), like=x)
    return naive.prepend_context(x, context, taps)
