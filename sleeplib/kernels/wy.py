r"""The WY form of ``chunked.py`` on a CPU, with a backward pass derived by hand.

The products are PyTorch's, and loops do what lies between them; of a chunk only the state before it and its
errors E are kept.  In a chunk of C tokens let alpha be the decays, ``a_i = alpha_1 .. alpha_i`` and,
for j <= i, ``D_ij = alpha_(j+1) .. alpha_i``; Q stands for the queries times `scale`::

    L = strictly lower part of D * K K^T,   P = lower part of D * Q K^T
    E = V - a K S - L U,   U = beta E,   O = a Q S + P U,   S' = a_C S + K^T (D_C U)

    dU = D_C K dS' + P^T dO - L^T dE,   dE = dV = beta dU,   dbeta = dU . E
    dL = -dE U^T,   dP = dO U^T,   dS = a_C dS' + K^T (-a dE) + Q^T (a dO)
    dQ = a dO S^T + (D * dP) K
    dK = -a dE S^T + D_C U dS'^T + (D * dL) K + (D * dL)^T K + (D * dP)^T Q

A vector before a matrix multiplies its rows.  For the Hebbian rule L and K S drop out.  A decay is a product
of numbers in [0, 1] and never a difference of sums, so none loses precision, and ``alpha = 0`` needs no care.
"""

import numpy as np
import torch

from . import chunked
from .jit import Differentiable, compiled, launch, numba_kernel

CHUNK = 32


@numba_kernel
def _add_rows(y, weights, rows, count):
    """Add to y (n,) the first `count` of the rows (count, n), each times its weight; four to a sweep of y."""
    n, whole = len(y), count - count % 4
    for s in range(0, whole, 4):
        w0, w1, w2, w3 = weights[s], weights[s + 1], weights[s + 2], weights[s + 3]
        r0, r1, r2, r3 = rows[s], rows[s + 1], rows[s + 2], rows[s + 3]
        for j in range(n):
            y[j] += w0 * r0[j] + w1 * r1[j] + w2 * r2[j] + w3 * r3[j]
    for s in range(whole, count):
        w, r = weights[s], rows[s]
        for j in range(n):
            y[j] += w * r[j]


@numba_kernel
def _gather(first, last, q, k, g, start, scale, KQ, D, a):
    """Fill KQ (n, 2 C, K) with a chunk's keys over its queries, D (n, C, C) with zeros above, a (n, C)."""
    (_, C, _), H, one = D.shape, q.shape[2], q.dtype.type(1)
    for n in range(first, last):
        b, h, grown = n // H, n % H, one
        for i in range(C):
            alpha, query, qi = np.exp(g[b, start + i, h]), KQ[n, C + i], q[b, start + i, h]
            KQ[n, i] = k[b, start + i, h]
            for j in range(len(qi)):
                query[j] = scale * qi[j]
            D[n, i] = 0
            for j in range(i):
                D[n, i, j] = alpha * D[n, i - 1, j]
            D[n, i, i] = one
            grown *= alpha
            a[n, i] = grown


@numba_kernel
def _decay(first, last, D, LP, delta):
    """Turn LP (n, 2 C, C) = [K; Q] K^T into [L; P]."""
    C, zero = D.shape[1], D.dtype.type(0)
    for n in range(first, last):
        for i in range(C):
            lower, whole = LP[n, i], LP[n, C + i]
            for j in range(C):
                lower[j] = lower[j] * D[n, i, j] if delta and j < i else zero
                whole[j] = whole[j] * D[n, i, j] if j <= i else zero


@numba_kernel
def _solve(first, last, v, beta, start, delta, answers, D, a, LP, E, U, left, o):
    """From answers (n, 2 C, V) = [K; Q] S fill E, U, left = D_C U (n, C, V each) and o, token by token."""
    (_, C, V), H = U.shape, v.shape[2]
    for n in range(first, last):
        b, h = n // H, n % H
        for i in range(C):
            error, u, out, vi = E[n, i], U[n, i], o[b, start + i, h], v[b, start + i, h]
            reads, answer, write = answers[n, i], answers[n, C + i], left[n, i]
            grown, stays, strength = a[n, i], D[n, C - 1, i], beta[b, start + i, h]
            error[:] = 0
            if delta:
                _add_rows(error, LP[n, i], U[n], i)
                for j in range(V):
                    error[j] = vi[j] - grown * reads[j] - error[j]
            else:
                error[:] = vi
            for j in range(V):
                u[j] = strength * error[j]
                write[j] = stays * u[j]
                out[j] = grown * answer[j]
            _add_rows(out, LP[n, C + i], U[n], i + 1)


@numba_kernel
def _solve_backward(first, last, beta, start, delta, E, LP, dU, U, X, dv, dbeta):
    """Finish dU (n, C, V), the last token first; fill U, dv, dbeta and the first half of X, [-dE; dO]."""
    (_, C, V), H, zero = U.shape, dv.shape[2], U.dtype.type(0)
    column = np.empty(C, U.dtype)
    for n in range(first, last):
        b, h = n // H, n % H
        for i in range(C - 1, -1, -1):
            du, out, less, error, u = dU[n, i], dv[b, start + i, h], X[n, i], E[n, i], U[n, i]
            strength, total = beta[b, start + i, h], zero
            if delta:
                for j in range(i + 1, C):
                    column[j] = LP[n, j, i]
                _add_rows(du, column[i + 1 :], X[n, i + 1 :], C - i - 1)
            for j in range(V):
                u[j] = strength * error[j]
                out[j] = strength * du[j]
                less[j] = -out[j]
                total += du[j] * error[j]
            dbeta[b, start + i, h] = total


@numba_kernel
def _gather_rows(first, last, do, start, D, X, dU):
    """Copy the rows of do (B, T, H, V) to the second half of X (n, 2 C, V); decay dU (n, C, V) by D_C."""
    (_, C, V), H = dU.shape, do.shape[2]
    for n in range(first, last):
        for i in range(C):
            X[n, C + i] = do[n // H, start + i, n % H]
            for j in range(V):
                dU[n, i, j] *= D[n, C - 1, i]


@numba_kernel
def _decay_backward(first, last, KQ, S, dS, start, delta, D, a, LP, X, dKS, dLP, dKQ, dg):
    """Put the decays into dLP = X U^T, dKS = U dS'^T and dKQ = X S^T: finish dLP, dKQ and dg, decay X.

    Numbers above the diagonals become 0.
    """
    (_, C, K), H, zero = dKS.shape, dg.shape[2], KQ.dtype.type(0)
    sums = np.empty(C, KQ.dtype)  # for each token, of all that its decay took part in: nothing has to cancel
    for n in range(first, last):
        b, h, total = n // H, n % H, zero
        for i in range(K):
            for j in range(S.shape[2]):
                total += S[n, i, j] * dS[n, i, j]
        sums[:] = a[n, C - 1] * total
        before = zero
        for i in range(C):
            key, query, dkey, dquery, dwrite = KQ[n, i], KQ[n, C + i], dKQ[n, i], dKQ[n, C + i], dKS[n, i]
            grown, stays, near, end = a[n, i], D[n, C - 1, i], zero, zero
            read = grown if delta else zero
            for j in range(K):
                dkey[j] *= read
                dquery[j] *= grown
                near += key[j] * dkey[j] + query[j] * dquery[j]
                dwrite[j] *= stays
                end += key[j] * dwrite[j]
                dkey[j] += dwrite[j]
            for j in range(X.shape[2]):
                X[n, i, j] *= read
                X[n, C + i, j] *= grown
            sums[i] += before
            before += end
            for j in range(i + 1):
                sums[j] += near
            lower, whole, total = dLP[n, i], dLP[n, C + i], zero
            for j in range(C):
                change = zero
                if j <= i:
                    change = lower[j] * LP[n, i, j] + whole[j] * LP[n, C + i, j]  # L is 0 from j = i on
                lower[j] = lower[j] * D[n, i, j] if delta and j < i else zero
                whole[j] = whole[j] * D[n, i, j] if j <= i else zero
                if j < i:
                    total += change
                    sums[j + 1] += total
        for i in range(C):
            dg[b, start + i, h] = sums[i]


class _WY(Differentiable):
    def forward(ctx, q, k, v, g, beta, S, scale, delta):
        q, k, v, g, beta = (x.contiguous() for x in (q, k, v, g, beta))
        (B, T, H, K), V, n = q.shape, v.shape[3], q.shape[0] * q.shape[2]
        o, S, kept = v.new_empty(v.shape), S.contiguous().view(n, K, V), []
        for start in range(0, T, CHUNK):
            KQ, D, a, LP = _chunk(q, k, g, start, scale, delta)
            E, U, left = (v.new_empty(n, D.shape[1], V) for _ in range(3))
            launch(_solve, n, v, beta, start, delta, torch.bmm(KQ, S), D, a, LP, E, U, left, o)
            if any(ctx.needs_input_grad):
                kept += S, E
            S = (S * a[:, -1:, None]).baddbmm_(KQ[:, : D.shape[1]].mT, left)
        ctx.save_for_backward(q, k, v, g, beta, *kept)
        ctx.options = scale, delta
        return o, S.view(B, H, K, V)

    def backward(ctx, do, dS):
        with torch.autocast("cpu", enabled=False):
            return _go_back(ctx, do, dS)


def _go_back(ctx, do, dS):
    q, k, v, g, beta, *kept = ctx.saved_tensors
    (B, T, H, K), V, n = q.shape, v.shape[3], q.shape[0] * q.shape[2]
    scale, delta = ctx.options
    do, dS = do.contiguous(), dS.reshape(n, K, V)
    dq, dk, dv, dg, dbeta = (x.new_empty(x.shape) for x in (q, k, v, g, beta))
    for start in reversed(range(0, T, CHUNK)):
        E, S = kept.pop(), kept.pop()
        KQ, D, a, LP = _chunk(q, k, g, start, scale, delta)
        C, keys = D.shape[1], KQ[:, : D.shape[1]]
        dU, U, X = torch.bmm(keys, dS), E.new_empty(n, C, V), E.new_empty(n, 2 * C, V)
        launch(_gather_rows, n, do, start, D, X, dU)
        dU.baddbmm_(LP[:, C:].mT, X[:, C:])
        launch(_solve_backward, n, beta, start, delta, E, LP, dU, U, X, dv, dbeta)
        dKS, dLP, dKQ = torch.bmm(U, dS.mT), torch.bmm(X, U.mT), torch.bmm(X, S.mT)
        launch(_decay_backward, n, KQ, S, dS, start, delta, D, a, LP, X, dKS, dLP, dKQ, dg)
        if start or ctx.needs_input_grad[5]:
            dS = (dS * a[:, -1:, None]).baddbmm_(KQ.mT, X)
        dKQ.baddbmm_(dLP, keys)
        dKQ[:, :C] += torch.bmm(dLP.mT, KQ)
        dKQ = dKQ.view(B, H, 2, C, K).permute(2, 0, 3, 1, 4)
        dk[:, start : start + C] = dKQ[0]
        torch.mul(dKQ[1], scale, out=dq[:, start : start + C])
    return dq, dk, dv, dg, dbeta, dS.view(B, H, K, V), None, None


def _chunk(q, k, g, start, scale, delta):
    """[K; Q], D, a and [L; P] of a chunk, for every sequence and head."""
    (B, _, H, K), C = q.shape, min(CHUNK, q.shape[1] - start)
    KQ, D, a = (q.new_empty(B * H, *size) for size in ((2 * C, K), (C, C), (C,)))
    launch(_gather, B * H, q, k, g, start, scale, KQ, D, a)
    LP = torch.bmm(KQ, KQ[:, :C].mT)
    launch(_decay, B * H, D, LP, delta)
    return KQ, D, a, LP


def recurrence(q, k, v, g, beta, S, scale, delta):
    """Run the recurrence: o (B, T, H, V) and the last state (B, H, K, V)."""
    if not compiled(q, k, v, g, beta, S):
        return chunked.recurrence(q, k, v, g, beta, S, scale, delta)
    return _WY.apply(q, k, v, g, beta, S, scale, delta)
