r"""The same recurrence without a loop over tokens: the WY form, chunk by chunk, in PyTorch.

Inside a chunk of C tokens let G be the running sum of the log decays.  Each token's write u_i depends on the
writes before it in the chunk, which is a unit lower triangular system; solved once, all writes are known::

    A  = strictly lower part of  beta_i (k_i . k_j) exp(G_i - G_j)
    U  = (I + A)^-1 diag(beta) (V - diag(exp G) K S)
    O  = scale [diag(exp G) Q S + lower(Q K^T * exp(G_i - G_j)) U]
    S <- exp(G_C) S + (diag(exp(G_C - G)) K)^T U

For the Hebbian rule A = 0 and the read of S drops out.
In a product 0 times NaN is NaN, so a NaN would also reach the tokens that come before it in its chunk.  On
the CPU the loop takes over if the last state is not finite; a GPU would have to wait to know.
"""

import math

import torch

from . import reference
from .jit import plain

LOWEST = -100.0  # exp(-100) beside 1 is nothing; a floor keeps -inf out of the differences G_i - G_j


def recurrence(q, k, v, g, beta, S, scale, delta, chunk=64):
    """Run the recurrence by matrix products: o (B, T, H, V) and the last state (B, H, K, V)."""
    T, given = q.shape[1], (q, k, v, g, beta, S, scale, delta)
    chunk = min(chunk, T)
    count = -(-T // chunk)

    def split(x):  # (B, T, H, ...) -> (B, H, count, chunk, ...); tokens of zeros at the end change nothing
        x = x.to(S.dtype).transpose(1, 2)
        if count * chunk > T:
            x = torch.cat([x, x.new_zeros(*x.shape[:2], count * chunk - T, *x.shape[3:])], dim=2)
        return x.unflatten(2, (count, chunk))

    q, k, v, g, beta = split(q * scale), split(k), split(v), split(g), split(beta)
    # Running sums in float64: a difference of two large sums must still resolve a small decay.
    G = g.double().clamp(min=LOWEST).cumsum(-1)  # (B, H, count, chunk)
    lower = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()
    gaps = (G.unsqueeze(-1) - G.unsqueeze(-2)).masked_fill(~lower, -torch.inf)  # mask first: no overflow
    decay = gaps.to(S.dtype).exp()  # (B, H, count, chunk, chunk)
    from_start = G.to(S.dtype).exp().unsqueeze(-1)
    to_end = (G[..., -1:] - G).to(S.dtype).exp().unsqueeze(-1)

    scores = (q @ k.transpose(-1, -2)) * decay
    if delta:
        A = (k @ k.transpose(-1, -2)) * (decay * beta.unsqueeze(-1)).tril(-1)
        solve = torch.linalg.solve_triangular(A, torch.diag_embed(beta), upper=False, unitriangular=True)
        read, v = solve @ (k * from_start), solve @ v
    else:
        v = v * beta.unsqueeze(-1)
    q, k, last = q * from_start, k * to_end, from_start[..., -1:, :]

    outputs = []
    for c in range(count):
        U = v[:, :, c] - read[:, :, c] @ S if delta else v[:, :, c]
        outputs.append(q[:, :, c] @ S + scores[:, :, c] @ U)
        S = last[:, :, c] * S + k[:, :, c].transpose(-1, -2) @ U
    if plain(S) and not math.isfinite(S.detach().sum()):
        return reference.recurrence(*given)
    o = torch.cat(outputs, dim=2) if count > 1 else outputs[0]
    return o[:, :, :T].transpose(1, 2), S
