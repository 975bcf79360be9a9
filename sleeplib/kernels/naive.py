r"""The readable truth in plain PyTorch: no loop is compiled, no gradient is written by hand.

Every kernel of this folder computes one of these functions faster.  They run wherever a Numba loop does not:
on other devices, in precisions that the loop does not take, while a model is traced, and after
``use_numba(False)``; the recurrence alone is by default replaced by ``chunked.py`` there.  Each has
derivatives of any order.
"""

import torch
import torch.nn.functional as F


def recurrence(q, k, v, g, beta, S, scale, delta):
    """The four lines, token by token: o (B, T, H, V) and the last state (B, H, K, V).

    q, k (B, T, H, K); v (B, T, H, V); g, beta (B, T, H).
    """
    outputs = []
    for t in range(q.shape[1]):
        S = g[:, t, :, None, None].exp() * S  # decay
        read = torch.einsum("bhkv,bhk->bhv", S, k[:, t]) if delta else 0  # read
        S = S + torch.einsum("bh,bhk,bhv->bhkv", beta[:, t], k[:, t], v[:, t] - read)  # write
        outputs.append(scale * torch.einsum("bhkv,bhk->bhv", S, q[:, t]))  # output
    return torch.stack(outputs, dim=1), S


def softmax_attention(q, k, v, scale, window):
    """Attention of each query q (B, T, H, K) over `window` keys of k (B, S, H, K), its own the newest."""
    T, S, rows = q.shape[1], k.shape[1], []
    for t in range(T):
        seen = slice(max(0, S - T + t + 1 - window), S - T + t + 1)
        scores = scale * torch.einsum("bhk,bshk->bhs", q[:, t], k[:, seen])
        rows.append(torch.einsum("bhs,bshv->bhv", scores.softmax(-1), v[:, seen]))
    return torch.stack(rows, dim=1)


def apply_rotary(x, cos, sin):
    """Turn the pair (x[j], x[j + K / 2]) of each row of x (B, T, H, K); cos, sin ([B,] T, K / 2)."""
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    one, two = x.chunk(2, dim=-1)
    return torch.cat((one * cos - two * sin, two * cos + one * sin), dim=-1)


def prepend_context(x, context, taps):
    """Put the ``taps - 1`` inputs before x, or zeros if there are none, in front of x (B, T, C)."""
    if context is None:
        context = x.new_zeros(x.shape[0], taps - 1, x.shape[2])
    return torch.cat((context.to(x.dtype), x), dim=1)


def causal_convolution(x, weight, context, silu):
    """One filter weight[:, c] over time for each channel c of x (B, T, C), then SiLU if wanted."""
    taps, T = len(weight), x.shape[1]
    if context is None:  # what is not there is not multiplied: 0 * inf would be NaN
        late = [min(T, taps - 1 - i) for i in range(taps)]
        y = sum(F.pad(x[:, : T - n] * tap, (0, 0, n, 0)) for n, tap in zip(late, weight))
    else:
        x = prepend_context(x, context, taps)
        y = sum(x[:, i : i + T] * weight[i] for i in range(taps))
    return F.silu(y) if silu else y


def rms_norm(x, weight, eps, gate=None):
    """``x / sqrt(mean(x^2) + eps) * weight * silu(gate)``; in low precision the mean is float32's."""
    y = F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)
    return y if gate is None else y * F.silu(gate)


def l2_normalize(x, eps):
    """``x / sqrt(sum(x^2) + eps)`` along the last axis: an RMS norm in other words."""
    K = x.shape[-1]
    return rms_norm(x, x.new_full((K,), K**-0.5), eps / K)


def split_heads(x, H, K, eps):
    """Queries, keys (..., H, K), both of length 1, and values (..., H, V) from x (..., H (2 K + V))."""
    q, k, v = x.split((H * K, H * K, x.shape[-1] - 2 * H * K), dim=-1)
    q, k = (l2_normalize(z.unflatten(-1, (H, K)), eps) for z in (q, k))
    return q, k, v.unflatten(-1, (H, -1))


def swiglu(x):
    """``silu(x[..., :n]) * x[..., n:]`` for x (..., 2 n)."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up
