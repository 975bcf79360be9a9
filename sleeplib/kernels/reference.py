r"""The slow truth: gated linear recurrences as loops that read like the equations.

One step of the gated delta rule on the fast weight S, shape (K, V), for one head::

    S <- exp(g) S                   decay
    u  = beta (v - S^T k)           read, then form the error   (Hebbian rule: u = beta v)
    S <- S + k u^T                  write
    o  = scale S^T q                output

The backward pass is the same four lines, derived by hand and walked in reverse.  Every quantity is a loop
over plain arrays, compiled by Numba and run in parallel over batch and heads.  A head's state stays in the
core's own cache for the whole window, which is why the slow truth is also the fastest CPU path for the
small models of this book.
"""

import numpy as np
import torch
from numba import njit, prange
from torch.autograd.function import once_differentiable

from .jit import PARALLEL, launch

SEGMENT = 16  # the forward pass keeps the state every SEGMENT steps; the backward pass recomputes between


@njit(**PARALLEL)
def _forward(q, k, v, g, beta, scale, delta, S, o, u, starts):
    """Fill o (B, T, H, V); advance S (B, H, K, V) in place; keep u and segment starts when there is room."""
    B, T, H, K = q.shape
    V = v.shape[3]
    keep = u.size > 0
    for n in prange(B * H):
        b, h = n // H, n % H
        M = S[b, h]
        error = np.empty(V, v.dtype)
        out = np.empty(V, v.dtype)
        for t in range(T):
            if keep and t % SEGMENT == 0:
                starts[b, h, t // SEGMENT] = M
            alpha, rate = np.exp(g[b, t, h]), beta[b, t, h]
            error[:] = 0
            for i in range(K):
                ki = k[b, t, h, i]
                for j in range(V):
                    M[i, j] *= alpha
                    error[j] += M[i, j] * ki
            for j in range(V):
                error[j] = rate * (v[b, t, h, j] - error[j]) if delta else rate * v[b, t, h, j]
            out[:] = 0
            for i in range(K):
                ki, qi = k[b, t, h, i], scale * q[b, t, h, i]
                for j in range(V):
                    M[i, j] += ki * error[j]
                    out[j] += M[i, j] * qi
            o[b, t, h] = out
            if keep:
                u[b, t, h] = error


@njit(**PARALLEL)
def _backward(q, k, v, g, beta, scale, delta, u, starts, do, dS, dq, dk, dv, dg, dbeta):
    """Fill dq .. dbeta; turn dS (B, H, K, V) from the gradient of the last state into that of the first."""
    B, T, H, K = q.shape
    V = v.shape[3]
    for n in prange(B * H):
        b, h = n // H, n % H
        D = dS[b, h]
        path = np.empty((SEGMENT + 1, K, V), v.dtype)  # the states of one segment, recomputed
        du = np.empty(V, v.dtype)
        row_g = np.empty(V, v.dtype)
        zero = v.dtype.type(0)
        for segment in range((T - 1) // SEGMENT, -1, -1):
            first = segment * SEGMENT
            last = min(first + SEGMENT, T)
            path[0] = starts[b, h, segment]
            for t in range(first, last):
                alpha = np.exp(g[b, t, h])
                before, after = path[t - first], path[t - first + 1]
                for i in range(K):
                    ki = k[b, t, h, i]
                    for j in range(V):
                        after[i, j] = alpha * before[i, j] + ki * u[b, t, h, j]
            for t in range(last - 1, first - 1, -1):
                alpha, rate = np.exp(g[b, t, h]), beta[b, t, h]
                before, after = path[t - first], path[t - first + 1]
                gout, w = do[b, t, h], u[b, t, h]
                du[:] = 0
                for i in range(K):  # o = scale S^T q, then S = S' + k u^T
                    ki, qi = k[b, t, h, i], scale * q[b, t, h, i]
                    sum_q = sum_k = zero
                    for j in range(V):
                        D[i, j] += qi * gout[j]
                        sum_q += after[i, j] * gout[j]
                        sum_k += D[i, j] * w[j]
                        du[j] += D[i, j] * ki
                    dq[b, t, h, i] = scale * sum_q
                    dk[b, t, h, i] = sum_k
                sum_b = sum_g = zero
                for j in range(V):  # u = beta (v - r)
                    dv[b, t, h, j] = rate * du[j]
                    sum_b += du[j] * v[b, t, h, j]
                row_g[:] = 0
                if delta:  # r = S'^T k
                    for i in range(K):
                        ki = k[b, t, h, i]
                        sum_k = zero
                        for j in range(V):
                            decayed = alpha * before[i, j]
                            sum_k += decayed * du[j]
                            grad = D[i, j] - ki * rate * du[j]
                            row_g[j] += grad * decayed
                            D[i, j] = alpha * grad
                        dk[b, t, h, i] -= rate * sum_k
                        sum_b -= ki * sum_k
                else:
                    for i in range(K):
                        for j in range(V):
                            D[i, j] *= alpha
                            row_g[j] += D[i, j] * before[i, j]
                for j in range(V):
                    sum_g += row_g[j]
                dbeta[b, t, h] = sum_b
                dg[b, t, h] = sum_g


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, g, beta, S, scale, delta):
        (B, T, H, K), V = q.shape, v.shape[3]
        kept = any(ctx.needs_input_grad)
        o, final = torch.empty_like(v, memory_format=torch.contiguous_format), S.detach().clone()
        u = v.new_empty((B, T, H, V) if kept else (0, 0, 0, 0))
        starts = v.new_empty((B, H, -(-T // SEGMENT), K, V) if kept else (0, 0, 0, 0, 0))
        launch(_forward, q, k, v, g, beta, scale, delta, final, o, u, starts)
        ctx.save_for_backward(q, k, v, g, beta, u, starts)
        ctx.scale, ctx.delta = scale, delta
        return o, final

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dS):
        q, k, v, g, beta, u, starts = ctx.saved_tensors
        dS = dS.contiguous().clone()
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, g, beta)]
        launch(_backward, q, k, v, g, beta, ctx.scale, ctx.delta, u, starts, do, dS, *grads)
        return *grads, dS, None, None


def recurrence(q, k, v, g, beta, S, scale, delta):
    """Run the recurrence on the CPU: o (B, T, H, V) and the last state (B, H, K, V), both differentiable."""
    return _Recurrence.apply(q, k, v, g, beta, S, float(scale), delta)
