"""Softmax attention as loops: what a KV cache is asked for, one query at a time."""

import numpy as np
import torch
from numba import njit

from .jit import LOOPS, launch


@njit(**LOOPS)
def _attend(first, last, q, k, v, scale, window, o):
    B, T, H, K = q.shape
    S, V = k.shape[1], v.shape[3]
    weight, zero = np.empty(S, v.dtype), v.dtype.type(0)
    for n in range(first, last):
        b, h = n // H, n % H
        for t in range(T):
            newest = S - T + t  # the query's own position among the keys
            oldest = max(0, newest - window + 1)
            top = v.dtype.type(-np.inf)
            for s in range(oldest, newest + 1):
                score = zero
                for i in range(K):
                    score += q[b, t, h, i] * k[b, s, h, i]
                weight[s] = scale * score
                top = max(top, weight[s])
            total = zero
            o[b, t, h, :] = 0
            for s in range(oldest, newest + 1):
                w = np.exp(weight[s] - top)
                total += w
                for j in range(V):
                    o[b, t, h, j] += w * v[b, s, h, j]
            o[b, t, h, :] /= total


def softmax_attention(q, k, v, *, window=None, scale=None):
    r"""Causal softmax attention by loops, equations (1) and (2); a reference, without gradients.

    Parameters
    ----------
    q : torch.Tensor, shape (B, T, H, K)
        Queries of the newest T positions.
    k : torch.Tensor, shape (B, S, H, K)
        Keys of all S >= T positions, the cached ones first.
    v : torch.Tensor, shape (B, S, H, V)
        Values.
    window : int, optional
        A query sees its newest `window` keys, its own included; all if absent.
    scale : float, optional
        Factor on the scores, ``K ** -0.5`` if absent.

    Returns
    -------
    torch.Tensor, shape (B, T, H, V)

    Raises
    ------
    ValueError
        On shapes that do not fit, or a window below 1.

    Notes
    -----
    Chapter: 01_attention
    """
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError("q, k and v must have four dimensions (batch, time, heads, size)")
    (B, T, H, K), S, V = q.shape, k.shape[1], v.shape[3]
    if k.shape != (B, S, H, K) or v.shape[:3] != (B, S, H) or S < T:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit one another: "
            "want q (B, T, H, K), k (B, S, H, K), v (B, S, H, V) with S >= T"
        )
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1; got {window}")
    o = torch.empty(B, T, H, V, dtype=v.dtype)
    scale = K**-0.5 if scale is None else float(scale)
    launch(_attend, B * H, q.cpu(), k.cpu(), v.cpu(), scale, S if window is None else window, o)
    return o
