"""Norms, one sweep over each row."""

import numpy as np
import torch

from ..checks import check_tensor, finite_number, integer
from . import naive
from .jit import Differentiable, compiled, exp, launch, narrow, numba_kernel, rounded, strided_rows, wide

BLOCK = 64  # rows in a task, or one group; each task sums its own share of the weight's gradient


@numba_kernel
def _forward(first, last, x, strides, gate, gate_step, weight, eps, y, rstd):
    """A group has `inner` rows, side by side in y and in the gate; `strides` says where they lie in x."""
    (groups, inner), n = rstd.shape, len(weight)
    size, one, many = weight.dtype.type(n), weight.dtype.type(1), max(1, BLOCK // inner)
    for a in range(first * many, min(last * many, groups)):
        for h in range(inner):
            row, out, total = x[a * strides[0] + h * strides[1] :], y[a, h * n :], eps * size
            for j in range(n):
                total += row[j] * row[j]
            r = np.sqrt(size / total)
            rstd[a, h] = r
            if gate.size:
                gates = gate[a * gate_step + h * n :]
                for j in range(n):
                    z = wide(gates[j])
                    out[j] = narrow(row[j] * r * weight[j] * z / (one + exp(-z)), y)
            else:
                for j in range(n):
                    out[j] = narrow(row[j] * r * weight[j], y)


@numba_kernel
def _backward(first, last, x, strides, gate, gate_step, weight, rstd, dy, dx, dgate, dweight):
    (groups, inner), n = rstd.shape, len(weight)
    size, one, many = weight.dtype.type(n), weight.dtype.type(1), max(1, BLOCK // inner)
    s, dn = np.empty(inner * n, dx.dtype), np.empty(inner * n, dx.dtype)  # dn: of what a gate multiplies
    for block in range(first, last):
        dweight[block] = 0
        for a in range(block * many, min((block + 1) * many, groups)):
            for j in range(inner * n):
                dn[j] = wide(dy[a, j])
            if gate.size:
                z = gate[a * gate_step :]
                for j in range(inner * n):
                    open_ = one / (one + exp(-wide(z[j])))
                    s[j] = open_ * (one + wide(z[j]) * (one - open_)) * dn[j]
                    dn[j] *= wide(z[j]) * open_
            for h in range(inner):
                row, r = x[a * strides[0] + h * strides[1] :], rstd[a, h]
                change, out = dn[h * n :], dx[a, h * n :]
                if gate.size:
                    for j in range(n):
                        dgate[a, h * n + j] = narrow(s[h * n + j] * row[j] * r * weight[j], dgate)
                if dweight.shape[1]:
                    for j in range(n):
                        dweight[block, j] += change[j] * row[j] * r
                total = weight.dtype.type(0)
                for j in range(n):
                    total += change[j] * weight[j] * row[j]
                pull = total * r * r / size
                for j in range(n):
                    out[j] = r * (change[j] * weight[j] - row[j] * pull)


def _grouped(x, gate):
    """Arguments of both kernels: x and the gate as rows, (groups, inner), and the number of tasks."""
    n, (flat, (inner, outer, step)) = x.shape[-1], strided_rows(x)
    if gate is None and outer == inner * step:  # every row is a group of its own
        inner, outer = 1, step
    shape = groups, _ = x.numel() // (inner * n), inner
    tasks = -(-groups // max(1, BLOCK // inner))
    if gate is None:
        return (flat, (outer, step), x.new_empty(0), 0), shape, tasks
    gate, (_, _, gate_step) = strided_rows(gate.reshape(shape[0], -1))
    return (flat, (outer, step), gate, gate_step), shape, tasks


class _RMSNorm(Differentiable):
    def forward(ctx, x, weight, eps, gate):
        args, shape, tasks = _grouped(x, gate)
        y = x.new_empty(shape[0], shape[1] * x.shape[-1], dtype=rounded(x))
        rstd = x.new_empty(shape)
        launch(_forward, tasks, *args, weight, eps, y, rstd)
        ctx.save_for_backward(x, weight, rstd, gate)
        return y.view(x.shape)

    def backward(ctx, dy):
        x, weight, rstd, gate = ctx.saved_tensors
        args, shape, tasks = _grouped(x, gate)
        dy = dy.reshape(shape[0], -1)
        dx = x.new_empty(dy.shape)
        dgate = x.new_empty(0, 0) if gate is None else gate.new_empty(dy.shape)
        dweight = x.new_empty(tasks, len(weight) if ctx.needs_input_grad[1] else 0)
        launch(_backward, len(dweight), *args, weight, rstd, dy, dx, dgate, dweight)
        dweight = dweight.sum(0) if ctx.needs_input_grad[1] else None
        return dx.view(x.shape), dweight, None, None if gate is None else dgate.view(x.shape)


def rms_norm(x, weight, eps, gate=None):
    """Scale rows of x (..., n) to root mean square 1, then by weight (n,) and, if given, silu(gate).

    Under bfloat16 autocast the loops return bfloat16, since a product follows.

    Chapter: 06_hybrid
    """
    check_tensor("x", x, (..., "n"))
    check_tensor("weight", weight, x.shape[-1:], like=x)
    if gate is not None:
        check_tensor("gate", gate, x.shape, like=x)
    fast = x.ndim > 1 and x.dtype == weight.dtype != torch.bfloat16 and compiled(x, weight, gate, low=True)
    run = _RMSNorm.apply if fast else naive.rms_norm
    return run(x, weight, finite_number("eps", eps, least=0), gate)


def l2_normalize(x, eps=1e-6):
    """Scale the rows of x (..., K) to length 1: ``x / sqrt(sum(x^2) + eps)``."""
    check_tensor("x", x, (..., "K"))
    integer("x.shape[-1]", x.shape[-1], 1)
    return naive.l2_normalize(x, finite_number("eps", eps, least=0))


@numba_kernel
def _split(first, last, x, eps, q, k, v, rstd):
    (_, H, K), one = q.shape, x.dtype.type(1)
    for a in range(first, last):
        for part in range(2):
            y = q if part == 0 else k
            for h in range(H):
                row, total = x[a, (part * H + h) * K :], eps
                for j in range(K):
                    total += row[j] * row[j]
                r = one / np.sqrt(total)
                for j in range(K):
                    y[a, h, j] = row[j] * r
                rstd[a, part * H + h] = r
        v[a] = x[a, 2 * H * K :]


@numba_kernel
def _split_backward(first, last, q, k, rstd, dq, dk, dv, dx):
    (_, H, K), zero = q.shape, q.dtype.type(0)
    for a in range(first, last):
        for part in range(2):
            y, dy = (q, dq) if part == 0 else (k, dk)
            for h in range(H):
                r, pull, out = rstd[a, part * H + h], zero, dx[a, (part * H + h) * K :]
                for j in range(K):
                    pull += y[a, h, j] * dy[a, h, j]
                for j in range(K):
                    out[j] = r * (dy[a, h, j] - pull * y[a, h, j])
        dx[a, 2 * H * K :] = dv[a]


class _SplitHeads(Differentiable):
    def forward(ctx, x, H, K, eps):
        *leading, C = x.shape
        q, k, v = (x.new_empty(*leading, H, size) for size in (K, K, C // H - 2 * K))
        rstd = x.new_empty(q[..., 0, 0].numel(), 2 * H)
        flat = *(z.view(len(rstd), H, K) for z in (q, k)), v.view(len(rstd), -1)
        launch(_split, len(rstd), x.reshape(-1, C), eps, *flat, rstd)
        ctx.save_for_backward(q, k, rstd)
        return q, k, v

    def backward(ctx, dq, dk, dv):
        q, k, rstd = ctx.saved_tensors
        count, leading, flat = len(rstd), q.shape[:-2], (len(rstd), *q.shape[-2:])
        q, k, dq, dk = (x.reshape(flat) for x in (q, k, dq, dk))
        dv = dv.reshape(count, -1)
        dx = q.new_empty(count, 2 * q[0].numel() + dv.shape[1])
        launch(_split_backward, count, q, k, rstd, dq, dk, dv, dx)
        return dx.view(*leading, -1), None, None, None


def split_heads(x, H, K, eps=1e-6):
    """Cut x (..., H (2 K + V)) into queries and keys (..., H, K), of length 1, and values (..., H, V).

    Chapter: 06_hybrid
    """
    check_tensor("x", x, (..., "H (2 K + V)"))
    H, K, eps = integer("H", H, 1), integer("K", K, 1), finite_number("eps", eps, least=0)
    if x.shape[-1] % H or x.shape[-1] <= 2 * H * K:
        raise ValueError(f"x must have shape (..., H (2 K + V)), H = {H}, K = {K}; got {tuple(x.shape)}")
    run = _SplitHeads.apply if compiled(x) else naive.split_heads
    return run(x, H, K, eps)
