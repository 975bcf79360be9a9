"""The layers of a hybrid: attention with a cache that can be dropped, fast weights that stay.

Every mixer maps ``(x, memory) -> (y, memory)``, where memory is the triple of what a block carries in time:

    S     (B, H, K, V)   the fast weight, or None in an attention block
    kv    (k, v)         cached keys (not yet rotated) and values, each (B, S, H, K), or None
    conv  (B, taps - 1, channels), the newest inputs of the convolution, or None

B batch, T time, D model width, H heads, K key size, V value size.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .kernels import (
    apply_rotary,
    causal_convolution,
    compiled,
    gated_delta_rule,
    gated_hebbian_rule,
    prepend_context,
    rms_norm,
    softmax_attention,
    split_heads,
    swiglu,
    use_numba,
)

SHORT = 16  # keys up to which attention by loops beats PyTorch's on a CPU (python -m sleeplib bench)


class Memory(NamedTuple):
    """What one block carries from token to token; see the module's first lines.

    Chapter: 04_delta_rule
    """

    S: torch.Tensor | None = None
    kv: tuple | None = None
    conv: torch.Tensor | None = None


def linear(fan_in, fan_out, zero=False):
    """A bias-free projection that keeps the size of its input; with `zero` a block starts as the identity."""
    layer = nn.Linear(fan_in, fan_out, bias=False)
    nn.init.zeros_(layer.weight) if zero else nn.init.normal_(layer.weight, std=fan_in**-0.5)
    return layer


def project(x, *layers):
    """Apply several bias-free projections to the same x (B, T, D) in one product; outputs side by side."""
    return F.linear(x, torch.cat([layer.weight for layer in layers]))


class RMSNorm(nn.Module):
    r"""Root-mean-square norm, ``x / sqrt(mean(x^2) + eps) * weight`` over the last axis, gated if wanted.

    Parameters
    ----------
    size : int
        Length of the last axis.
    eps : float
        Added under the root.

    Notes
    -----
    Chapter: 06_hybrid
    """

    def __init__(self, size, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x, gate=None):
        """Map x (..., size) to y (..., size), times ``silu(gate)`` where there is a gate (..., size)."""
        return rms_norm(x, self.weight, self.eps, gate)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # a table first made in inference mode must serve training too
def _angles(length, size, base, dtype, device):
    """cos and sin of the rotary angles of positions 0 .. length - 1, each (length, size / 2)."""
    rates = base ** (-torch.arange(0, size, 2, dtype=torch.float64, device=device) / size)
    angles = torch.arange(length, dtype=torch.float64, device=device).outer(rates)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, start, base):
    """Turn each pair of coordinates of x (B, T, H, K) by its position times a rate; the first is `start`.

    Only differences of positions matter, so callers count from the oldest cached key: angles stay small
    and float32 stays exact, however long the stream.

    Chapter: 01_attention
    """
    T, K = x.shape[1], x.shape[3]
    tables = _angles.__wrapped__ if torch.compiler.is_compiling() else _angles  # traced, it is no table
    return apply_rotary(x, *(table[start:] for table in tables(start + T, K, base, x.dtype, x.device)))


class Attention(nn.Module):
    r"""Causal softmax attention with rotary positions and a KV cache, equations (1) and (2).

    Parameters
    ----------
    d_model, num_heads : int
        Width D and heads H; a head has size D / H.
    rope_base : float
        Base of the rotary rates.

    Notes
    -----
    Chapter: 01_attention
    """

    def __init__(self, d_model, num_heads, rope_base=10_000.0):
        super().__init__()
        self.num_heads, self.rope_base = num_heads, rope_base
        self.q, self.k, self.v = (linear(d_model, d_model) for _ in range(3))
        self.o = linear(d_model, d_model, zero=True)

    def forward(self, x, memory, window=None, wanted=True):
        """Map x (B, T, D) to y (B, T, D), None if not `wanted`; a query sees its newest `window` keys."""
        q, k, v = project(x, self.q, self.k, self.v).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        if memory.kv is not None:
            k, v = torch.cat((memory.kv[0], k), dim=1), torch.cat((memory.kv[1], v), dim=1)
        if not wanted:
            return None, Memory(kv=(k, v))
        turned = rotate(q, k.shape[1] - q.shape[1], self.rope_base), rotate(k, 0, self.rope_base)
        return self.o(attend(*turned, v, window).flatten(2)), Memory(kv=(k, v))


def attend(q, k, v, window=None):
    """Causal attention of q (B, T, H, K) over k, v (B, S, H, K), by whatever is fastest for so many keys."""
    T, S = q.shape[1], k.shape[1]
    if not use_numba.on or S <= SHORT and compiled(q, k, v):
        return softmax_attention(q, k, v, sliding_window=window)
    whole, mask = window is None or window >= S, None
    if T > 1 and not (whole and S == T) or not whole:
        age = torch.arange(S - T, S, device=q.device).unsqueeze(1) - torch.arange(S, device=q.device)
        mask = (age >= 0) if whole else (age >= 0) & (age < window)  # (T, S), age of a key for a query
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1)
    return y.transpose(1, 2)


def newest(x, context, count):
    """The newest `count` of the inputs x (B, T, C) and, before them, context (B, count, C) or zeros."""
    T = x.shape[1]
    return x[:, T - count :] if T >= count else prepend_context(x, context, count + 1)[:, T:]


class ShortConvolution(nn.Module):
    """A causal convolution over time, one small filter a channel, followed by SiLU.

    Parameters
    ----------
    channels, taps : int
        Channels C and filter length.

    Notes
    -----
    Chapter: 06_hybrid
    """

    def __init__(self, channels, taps=4):
        super().__init__()
        self.taps = taps
        self.weight = nn.Parameter(torch.empty(taps, channels).normal_(std=taps**-0.5))

    def forward(self, x, context):
        """Map x (B, T, C) and its context (B, taps - 1, C) or None to y (B, T, C) and the next context."""
        return causal_convolution(x, self.weight, context, silu=True), newest(x, context, self.taps - 1)


class DynamicConvolution(nn.Module):
    """A causal convolution whose filters are computed from the token: one filter a token and channel.

    Parameters
    ----------
    d_model, channels, taps : int
        Width of the token that makes the filters, channels C, filter length.

    Notes
    -----
    The first weight is random and the second zero: with both zero neither would get a gradient.  So it starts
    as an ordinary convolution, given by the bias.

    Chapter: 06_hybrid
    """

    def __init__(self, d_model, channels, taps=4):
        super().__init__()
        self.taps = taps
        self.down = linear(d_model, channels // 8)
        self.up = nn.Linear(channels // 8, channels * taps)
        nn.init.zeros_(self.up.weight)
        nn.init.normal_(self.up.bias, std=0.02)

    def forward(self, values, x, context):
        """Filter values (B, T, C) by the kernels that x (B, T, D) asks for; also the next context."""
        filters = self.up(F.silu(self.down(x))).unflatten(-1, (self.taps, -1))  # (B, T, taps, C)
        T, past = values.shape[1], prepend_context(values, context, self.taps)
        y = sum(past[:, i : i + T] * filters[:, :, i] for i in range(self.taps))
        return F.silu(y), newest(values, context, self.taps - 1)


class GatedDeltaNet(nn.Module):
    r"""Fast weights written by the gated delta rule (or the gated Hebbian rule), equation (3).

    Queries and keys are normalised to length 1; ``beta = sigmoid(b(x))`` says how strongly a token writes
    and ``g = -exp(A_log) softplus(a(x) + dt_bias)`` how much is forgotten.

    Parameters
    ----------
    d_model, num_heads, key_size, value_size : int
        D, H, K and V.
    taps : int
        Length of the short convolution on queries, keys and values.
    rule : {"delta", "hebbian"}
        The local learning rule.
    dynamic : bool
        The Jet layer: no convolution on queries and keys, a dynamic one on the values.
    backend : str
        See :func:`gated_delta_rule`.

    Notes
    -----
    Chapter: 06_hybrid
    """

    def __init__(
        self, d_model, num_heads, key_size, value_size, taps=4, rule="delta", dynamic=False, backend="auto"
    ):
        super().__init__()
        H, K, V = num_heads, key_size, value_size
        self.num_heads, self.key_size, self.value_size, self.dynamic = H, K, V, dynamic
        self.backend = backend
        self.rule = {"delta": gated_delta_rule, "hebbian": gated_hebbian_rule}[rule]
        self.q, self.k = linear(d_model, H * K), linear(d_model, H * K)
        self.v, self.gate = linear(d_model, H * V), linear(d_model, H * V)
        self.a, self.b = linear(d_model, H), linear(d_model, H)
        self.conv = (
            DynamicConvolution(d_model, H * V, taps) if dynamic else ShortConvolution(2 * H * K + H * V, taps)
        )
        # Each head starts with its own memory span: A_log spreads the rates, dt_bias the step sizes.
        self.A_log = nn.Parameter(torch.empty(H).uniform_(1, 16).log())
        dt = torch.empty(H).uniform_(math.log(1e-3), math.log(0.1)).exp()
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus(dt_bias) = dt
        self.norm = RMSNorm(V, eps=1e-5)
        self.o = linear(H * V, d_model, zero=True)

    def forward(self, x, memory, window=None, wanted=True):
        """Map x (B, T, D) to y (B, T, D), None if not `wanted`, reading and writing the fast weight."""
        H, K, V = self.num_heads, self.key_size, self.value_size
        y = project(x, self.q, self.k, self.v, self.gate, self.a, self.b)
        qkv, gate, a, b = y.split((2 * H * K + H * V, H * V, H, H), dim=-1)
        if self.dynamic:
            qk, v = qkv.split((2 * H * K, H * V), dim=-1)
            v, conv = self.conv(v, x, memory.conv)
            qkv = torch.cat((F.silu(qk), v), dim=-1)
        else:
            qkv, conv = self.conv(qkv, memory.conv)
        q, k, v = split_heads(qkv, H, K)
        wide = torch.promote_types(torch.float32, self.A_log.dtype)
        g = -self.A_log.to(wide).exp() * F.softplus(a.to(wide) + self.dt_bias)
        beta = b.to(wide).sigmoid()
        o, S = self.rule(q, k, v, g=g, beta=beta, initial_state=memory.S, backend=self.backend)
        y = self.o(self.norm(o, gate.unflatten(-1, (H, V))).flatten(2)) if wanted else None
        return y, Memory(S=S, conv=conv)


class SwiGLU(nn.Module):
    """The gated feed-forward layer, ``down(silu(gate(x)) * up(x))``.

    Parameters
    ----------
    d_model, hidden : int
        Width in and out, width inside.

    Notes
    -----
    Chapter: 06_hybrid
    """

    def __init__(self, d_model, hidden):
        super().__init__()
        self.gate, self.up = linear(d_model, hidden), linear(d_model, hidden)
        self.down = linear(hidden, d_model, zero=True)

    def forward(self, x):
        return self.down(swiglu(project(x, self.gate, self.up)))
