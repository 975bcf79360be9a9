"""Softmax attention over a KV cache, one query at a time, and rotary positions, as loops."""

import numpy as np

from ..checks import check_tensor, finite_number, integer
from . import naive
from .jit import Differentiable, compiled, exp, launch, numba_kernel, strided_rows


@numba_kernel
def _attend(first, last, q, k, v, strides, scale, window, o, log_total):
    B, T, H, K = q.shape
    S, V = k.shape[1], o.shape[3]
    weight, zero = np.empty(S, o.dtype), o.dtype.type(0)
    for n in range(first, last):
        b, h = n // H, n % H
        for t in range(T):
            newest = S - T + t  # the query's own position among the keys
            oldest = max(0, newest - window + 1)
            top = o.dtype.type(-np.inf)
            for s in range(oldest, newest + 1):
                score = zero
                for i in range(K):
                    score += q[b, t, h, i] * k[b, s, h, i]
                weight[s] = scale * score
                top = max(top, weight[s])
            total = zero
            for s in range(oldest, newest + 1):
                weight[s] = exp(weight[s] - top)
                total += weight[s]
            out = o[b, t, h]
            out[:] = 0
            for s in range(oldest, newest + 1):
                w, value = weight[s] / total, v[(b * S + s) * strides[1] + h * strides[2] :]
                for j in range(V):
                    out[j] += w * value[j]
            log_total[b, h, t] = top + np.log(total)


@numba_kernel
def _backward(first, last, q, k, v, strides, scale, window, o, log_total, do, dq, dk, dv):
    """With p the weight of a key and D = do . o: dv = sum p do, dscore = p (do . v - D)."""
    B, T, H, K = q.shape
    S, V = k.shape[1], o.shape[3]
    weight, zero = np.empty(S, o.dtype), o.dtype.type(0)
    for n in range(first, last):
        b, h = n // H, n % H
        dk[b, :, h] = 0
        dv[b, :, h] = 0
        for t in range(T):
            newest = S - T + t
            oldest = max(0, newest - window + 1)
            dout, dquery, pull = do[b, t, h], dq[b, t, h], zero
            dquery[:] = 0
            for j in range(V):
                pull += dout[j] * o[b, t, h, j]
            for s in range(oldest, newest + 1):
                score = zero
                for i in range(K):
                    score += q[b, t, h, i] * k[b, s, h, i]
                weight[s] = scale * score
            for s in range(oldest, newest + 1):
                weight[s] = exp(weight[s] - log_total[b, h, t])
            for s in range(oldest, newest + 1):
                w, value, gain = weight[s], v[(b * S + s) * strides[1] + h * strides[2] :], zero
                for j in range(V):
                    gain += dout[j] * value[j]
                    dv[b, s, h, j] += w * dout[j]
                gain = scale * w * (gain - pull)
                for i in range(K):
                    dquery[i] += gain * k[b, s, h, i]
                    dk[b, s, h, i] += gain * q[b, t, h, i]


class _Attention(Differentiable):
    def forward(ctx, q, k, v, scale, window):
        (B, T, H, _), V = q.shape, v.shape[3]
        q, k, o, log_total = q.contiguous(), k.contiguous(), v.new_empty(B, T, H, V), v.new_empty(B, H, T)
        launch(_attend, B * H, q, k, *strided_rows(v), scale, window, o, log_total)
        ctx.save_for_backward(q, k, v, o, log_total)
        ctx.options = scale, window
        return o

    def backward(ctx, do):
        q, k, v, o, log_total = ctx.saved_tensors
        grads = [x.new_empty(x.shape) for x in (q, k, v)]
        B, _, H, _ = q.shape
        launch(_backward, B * H, q, k, *strided_rows(v), *ctx.options, o, log_total, do, *grads)
        return *grads, None, None


def softmax_attention(q, k, v, *, sliding_window=None, scale=None):
    """Causal softmax attention, one query at a time, equations (1) and (2).

    Parameters
    ----------
    q : torch.Tensor, shape (B, T, H, K)
        Queries of the newest T positions.
    k, v : torch.Tensor, shapes (B, S, H, K) and (B, S, H, V)
        Keys and values of all S >= T positions, the cached ones first.
    sliding_window : int, optional
        A query sees its newest `sliding_window` keys, its own included; all if absent.
    scale : float, optional
        Factor on the scores, ``K ** -0.5`` if absent.

    Returns
    -------
    torch.Tensor, shape (B, T, H, V)
        Differentiable in q, k and v.

    Chapter: 01_attention
    """
    check_tensor("q", q, ("B", "T", "H", "K"), empty=False)
    B, T, H, K = q.shape
    check_tensor("k", k, (B, "S", H, K), like=q)
    check_tensor("v", v, (B, k.shape[1], H, "V"), like=q, empty=False)
    if k.shape[1] < T:
        raise ValueError(f"k must have a key for each query, {T} or more; got {k.shape[1]}")
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise TypeError(f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}: use one precision")
    window, scale = k.shape[1], finite_number("scale", scale, K**-0.5)
    if sliding_window is not None:
        window = min(window, integer("sliding_window", sliding_window, 1))
    run = _Attention.apply if compiled(q, k, v) else naive.softmax_attention
    return run(q, k, v, scale, window)


@numba_kernel
def _rotate(first, last, x, strides, cos, sin, y):
    T, H, K = y.shape[1:]
    half = K // 2
    for n in range(first, last):
        b, t = n // T, n % T
        for h in range(H):
            row, out = x[n * strides[1] + h * strides[2] :], y[b, t, h]
            for j in range(half):
                out[j] = row[j] * cos[t, j] - row[j + half] * sin[t, j]
                out[j + half] = row[j + half] * cos[t, j] + row[j] * sin[t, j]


class _Rotation(Differentiable):
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    def backward(ctx, dy):
        cos, sin = ctx.saved_tensors
        return _turn(dy, cos, -sin), None, None


def _turn(x, cos, sin):
    y = x.new_empty(x.shape)
    launch(_rotate, x.shape[0] * x.shape[1], *strided_rows(x), cos, sin, y)
    return y


def apply_rotary(x, cos, sin):
    """Turn the pairs (x[j], x[j + K / 2]) of the rows of x (B, T, H, K) by their positions' angles.

    `cos` and `sin` are those of the angles, each (T, K / 2).

    Chapter: 01_attention
    """
    check_tensor("x", x, ("B", "T", "H", "K"))
    if x.shape[3] % 2:
        raise ValueError(f"x must have an even last axis; got {tuple(x.shape)}")
    for name, table in (("cos", cos), ("sin", sin)):
        check_tensor(name, table, (x.shape[1], x.shape[3] // 2), like=x)
    if compiled(x, cos, sin) and not (cos.requires_grad or sin.requires_grad):
        return _Rotation.apply(x, cos, sin)
    return naive.apply_rotary(x, cos, sin)
