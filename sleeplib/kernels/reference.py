r"""Gated linear recurrences as Numba loops: the four lines of ``naive.recurrence``, forward and backward.

The backward pass is the same four lines, derived by hand and walked in reverse.  Heads and sequences are
independent, so they run in parallel.  A head's state stays in its core's cache for the whole window, so the
loop is also the fastest CPU path for the small models of this book.
"""

import numpy as np
import torch

from . import naive
from .jit import Differentiable, compiled, launch, numba_kernel

SEGMENT = 16  # the forward pass keeps the state every SEGMENT steps; the backward pass recomputes between


@numba_kernel
def _forward(first, last, q, k, v, g, beta, scale, delta, S, o, u, starts):
    """Fill o (B, T, H, V); advance S (B, H, K, V) in place; keep u and segment starts when there is room.

    The output is read in the same sweep as the error: after the write S^T q has grown by (k . q) u.
    """
    (_, T, H, K), V = q.shape, v.shape[3]
    keep, zero = u.size > 0, v.dtype.type(0)
    error, out = np.empty(V, v.dtype), np.empty(V, v.dtype)
    for n in range(first, last):
        b, h = n // H, n % H
        M = S[b, h]
        for t in range(T):
            if keep and t and t % SEGMENT == 0:
                starts[b, h, t // SEGMENT - 1] = M
            alpha, b_t = np.exp(g[b, t, h]), beta[b, t, h]
            error[:] = 0
            out[:] = 0
            kq = zero
            for i in range(K):
                ki, qi = k[b, t, h, i], q[b, t, h, i]
                kq += ki * qi
                for j in range(V):
                    error[j] += M[i, j] * ki
                    out[j] += M[i, j] * qi
            for j in range(V):
                error[j] = b_t * (v[b, t, h, j] - alpha * error[j]) if delta else b_t * v[b, t, h, j]
                o[b, t, h, j] = scale * (alpha * out[j] + kq * error[j])
            for i in range(K):
                ki = k[b, t, h, i]
                for j in range(V):
                    M[i, j] = alpha * M[i, j] + ki * error[j]
            if keep:
                u[b, t, h] = error


@numba_kernel
def _backward(first, last, q, k, v, g, beta, scale, delta, S, u, starts, do, dS, dq, dk, dv, dg, dbeta):
    """Fill dq .. dbeta; turn dS (B, H, K, V) from the gradient of the last state into that of the initial.

    With P the state before a step and D the gradient of the one after it, both are swept twice: once for what
    du needs, once for what needs du.
    """
    (_, T, H, K), V = q.shape, v.shape[3]
    path = np.empty((SEGMENT, K, V), v.dtype)  # the states before each step of one segment, recomputed
    du, zero = np.empty(V, v.dtype), v.dtype.type(0)
    for n in range(first, last):
        b, h = n // H, n % H
        D = dS[b, h]
        for segment in range((T - 1) // SEGMENT, -1, -1):
            start = segment * SEGMENT
            stop = min(start + SEGMENT, T)
            path[0] = starts[b, h, segment - 1] if segment else S[b, h]
            for t in range(start, stop - 1):
                alpha, before, after = np.exp(g[b, t, h]), path[t - start], path[t - start + 1]
                for i in range(K):
                    ki = k[b, t, h, i]
                    for j in range(V):
                        after[i, j] = alpha * before[i, j] + ki * u[b, t, h, j]
            for t in range(stop - 1, start - 1, -1):
                alpha, b_t = np.exp(g[b, t, h]), beta[b, t, h]
                P, out, w = path[t - start], do[b, t, h], u[b, t, h]
                du[:] = 0
                kq = ow = sum_b = sum_g = zero
                for j in range(V):
                    ow += out[j] * w[j]
                for i in range(K):  # o = scale (alpha P^T q + (k . q) u), S = alpha P + k u^T
                    ki, qi = k[b, t, h, i], scale * q[b, t, h, i]
                    kq += ki * qi
                    Po = Dw = DP = zero
                    for j in range(V):
                        Po += P[i, j] * out[j]
                        Dw += D[i, j] * w[j]
                        DP += D[i, j] * P[i, j]
                        du[j] += D[i, j] * ki
                    dq[b, t, h, i] = scale * (alpha * Po + ki * ow)
                    dk[b, t, h, i] = Dw + qi * ow
                    sum_g += DP + qi * Po
                for j in range(V):  # u = beta (v - alpha P^T k), or beta v
                    du[j] += kq * out[j]
                    dv[b, t, h, j] = b_t * du[j]
                    sum_b += du[j] * v[b, t, h, j]
                back = b_t if delta else zero
                for i in range(K):
                    ki, qi = k[b, t, h, i], scale * q[b, t, h, i]
                    kw, Pu = ki * back, zero
                    for j in range(V):
                        Pu += P[i, j] * du[j]
                        D[i, j] = alpha * (D[i, j] + qi * out[j] - kw * du[j])
                    if delta:
                        dk[b, t, h, i] -= b_t * alpha * Pu
                        sum_b -= ki * alpha * Pu
                        sum_g -= kw * Pu
                dbeta[b, t, h] = sum_b
                dg[b, t, h] = alpha * sum_g


class _Recurrence(Differentiable):
    def forward(ctx, q, k, v, g, beta, S, scale, delta):
        (B, T, H, K), V = q.shape, v.shape[3]
        kept = any(ctx.needs_input_grad)
        o, final = v.new_empty(v.shape), S.detach().clone(memory_format=torch.contiguous_format)
        u = v.new_empty((B, T, H, V) if kept else (0, 0, 0, 0))
        starts = v.new_empty((B, H, (T - 1) // SEGMENT, K, V) if kept else (0, 0, 0, 0, 0))
        launch(_forward, B * H, q, k, v, g, beta, scale, delta, final, o, u, starts)
        ctx.save_for_backward(q, k, v, g, beta, S, u, starts)
        ctx.scale, ctx.delta = scale, delta
        return o, final

    def backward(ctx, do, dS):
        q, k, v, g, beta, S, u, starts = ctx.saved_tensors
        dS = dS.contiguous().clone()
        grads = [x.new_empty(x.shape) for x in (q, k, v, g, beta)]
        shared = q, k, v, g, beta, ctx.scale, ctx.delta, S, u, starts
        launch(_backward, q.shape[0] * q.shape[2], *shared, do, dS, *grads)
        return *grads, dS, None, None


def recurrence(q, k, v, g, beta, S, scale, delta):
    """Run the recurrence token by token: o (B, T, H, V) and the last state (B, H, K, V)."""
    run = _Recurrence.apply if compiled(q, k, v, g, beta, S) else naive.recurrence
    return run(q, k, v, g, beta, S, scale, delta)
