"""Causal depthwise convolution over time in one sweep."""

import numpy as np

from ..checks import check_tensor, integer
from . import naive
from .jit import Differentiable, compiled, exp, launch, numba_kernel, strided_rows

BLOCK = 8  # sequences a task; each task sums its own share of the filters' gradient


@numba_kernel
def _filter(row, x, start, step, context, weight, t):
    """Fill row (C,) with the filtered input of one position; before the first lies the context."""
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
            row[j] += past[j] * tap[j]


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
    z, dz = np.empty(C, dy.dtype), np.empty(C, dy.dtype)
    for block in range(first, last):
        dweight[block] = 0
        for b in range(block * BLOCK, min((block + 1) * BLOCK, B)):
            dx[b] = 0
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
                        past, dpast = x[b * strides[1] + s * strides[2] :], dx[b, s]
                    elif len(context[b]):
                        past, dpast = context[b, t + i], dcontext[b, t + i]
                    else:
                        continue
                    tap, dtap = weight[i], dweight[block, i]
                    for c in range(C):
                        dpast[c] += dz[c] * tap[c]
                    for c in range(C):
                        dtap[c] += dz[c] * past[c]


class _Convolution(Differentiable):
    def forward(ctx, x, weight, context, silu):
        y = x.new_empty(x.shape)
        context = x.new_empty(len(x), 0, x.shape[2]) if context is None else context
        launch(_forward, -(-len(x) // BLOCK), *strided_rows(x), context, weight, silu, y)
        ctx.save_for_backward(x, weight, context)
        ctx.silu = silu
        return y

    def backward(ctx, dy):
        x, weight, context = ctx.saved_tensors
        dx, dcontext = x.new_empty(x.shape), x.new_empty(context.shape)
        dweight = x.new_empty(-(-len(x) // BLOCK), *weight.shape)
        given = *strided_rows(x), context, weight, ctx.silu
        launch(_backward, len(dweight), *given, dy, dx, dcontext, dweight)
        return dx, dweight.sum(0), dcontext if ctx.needs_input_grad[2] else None, None


def causal_convolution(x, weight, context=None, silu=False):
    """Filter each channel over time: ``y[t] = sum_i weight[i] * x[t - taps + 1 + i]``, then SiLU if wanted.

    x and y are (B, T, C), the weight is (taps, C), oldest input first, and context (B, taps - 1, C) holds the
    inputs before the first; zeros if absent.

    Chapter: 06_hybrid
    """
    check_tensor("x", x, ("B", "T", "C"))
    check_tensor("weight", weight, ("taps", x.shape[2]), like=x)
    if len(weight) < 1:
        raise ValueError(f"weight must have at least one tap; got {tuple(weight.shape)}")
    if context is not None:
        check_tensor("context", context, (len(x), len(weight) - 1, x.shape[2]), like=x)
    run = _Convolution.apply if compiled(x, weight, context) else naive.causal_convolution
    return run(x, weight, context, bool(silu))


def prepend_context(x, context, taps):
    """x (B, T, C) behind context (B, taps - 1, C), its newest predecessors; zeros if there is none."""
    check_tensor("x", x, ("B", "T", "C"))
    taps = integer("taps", taps, 1)
    if context is not None:
        check_tensor("context", context, (len(x), taps - 1, x.shape[2]), like=x)
    return naive.prepend_context(x, context, taps)
