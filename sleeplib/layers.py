"""The layers of a hybrid: attention with a cache that can be dropped, fast weights that stay.

Every mixer maps ``(x, memory) -> (y, memory)``, where :class:`Memory` is what a block carries in time.

======  ===========================  ======  =====================================
letter  what it counts               letter  what it is
======  ===========================  ======  =====================================
B       sequences in a batch         x, y    what a layer reads and gives, (B, T, D)
T       tokens read now              q, k    queries and keys, (B, T, H, K)
S       keys seen, cached and new    v       values, (B, T, H, V)
D       model width                  beta    writing strength, (B, T, H)
H       heads                        g       log decay, (B, T, H)
K, V    size of a key, of a value    ``.S``  the fast weight, (B, H, K, V)
C       channels of a convolution    o       what the fast weight answers, (B, T, H, V)
======  ===========================  ======  =====================================
"""

import math
from contextlib import nullcontext
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

from . import kernels
from .state import Memory

SHORT = 16  # keys up to which attention by loops beats PyTorch's on a CPU (python -m sleeplib bench)


def linear(fan_in, fan_out, zero=False):
    """A bias-free projection whose outputs start as large as its inputs, or, with `zero`, at zero."""
    layer = nn.Linear(fan_in, fan_out, bias=False)
    nn.init.zeros_(layer.weight) if zero else nn.init.normal_(layer.weight, std=fan_in**-0.5)
    return layer


def project(x, *layers):
    """Apply several bias-free projections to the same x (B, T, D); outputs side by side.

    All in one product if every layer is nothing but its weight.  If somebody has hooked, wrapped or replaced
    one (LoRA, quantisation, pruning), all are called, as any module is.  Under autocast the outputs are
    in its precision.
    """
    if all(_is_plain(layer) for layer in layers):
        return F.linear(x, torch.cat([layer.weight for layer in layers]))
    return torch.cat([layer(x) for layer in layers], dim=-1)


def unrounded(y):
    """A product made under autocast on a CPU, as float32: only our loops are fast in bfloat16 there."""
    return y.float() if y.dtype == torch.bfloat16 and low_on_cpu(y) else y


def low_on_cpu(x):
    """Whether x is on a CPU, under autocast."""
    return x.device.type == "cpu" and torch.is_autocast_enabled("cpu")


def _is_plain(layer):
    """Whether calling this layer multiplies by its weight and does nothing else."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return type(layer) is nn.Linear and layer.bias is None and not any(hooks) and "forward" not in vars(layer)


class RMSNorm(nn.Module):
    r"""Root-mean-square norm, ``x / sqrt(mean(x^2) + eps) * weight`` over the last axis, gated if wanted.

    Parameters
    ----------
    size : int
        Length of the last axis.
    eps : float
        Added under the root.

    Chapter: 06_hybrid
    """

    def __init__(self, size, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x, gate=None):
        """Map x (..., size) to y (..., size), times ``silu(gate)`` where there is a gate (..., size)."""
        return kernels.rms_norm(x, self.weight, self.eps, gate)


def rotary_angles(positions, size, base, dtype):
    """cos and sin of the rotary angles of positions (...), each (..., size / 2)."""
    inv_freq = base ** (-torch.arange(0, size, 2, dtype=torch.float64, device=positions.device) / size)
    angles = positions.double().unsqueeze(-1) * inv_freq
    return angles.cos().to(dtype), angles.sin().to(dtype)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # a table first made in inference mode must serve training too
def _rotary_table(length, size, base, dtype):
    """The angles of positions 0 .. length - 1, kept: on a CPU making them takes as long as using them."""
    return rotary_angles(torch.arange(length), size, base, dtype)


def rotate(x, start, base):
    """Turn each pair of coordinates of x (B, T, H, K) by position times a rate, from position `start` on.

    Only differences of positions matter, so callers count from the oldest cached key: angles stay small
    and float32 stays accurate, however long the stream.

    Chapter: 01_attention
    """
    T, K = x.shape[1], x.shape[3]
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        cos, sin = _rotary_table(start + T, K, base, x.dtype)
        return kernels.apply_rotary(x, cos[start:], sin[start:])
    positions = torch.arange(start, start + T, device=x.device)
    return kernels.apply_rotary(x, *rotary_angles(positions, K, base, x.dtype))


class Attention(nn.Module):
    r"""Causal softmax attention with rotary positions and a KV cache, equations (1) and (2).

    Parameters
    ----------
    d_model, num_heads : int
        Width D and heads H; a head has size D / H.
    rope_base : float
        Base of the rotary rates.

    Chapter: 01_attention
    """

    def __init__(self, d_model, num_heads, rope_base=10_000.0):
        super().__init__()
        self.num_heads, self.rope_base = num_heads, rope_base
        self.q, self.k, self.v = (linear(d_model, d_model) for _ in range(3))
        self.o = linear(d_model, d_model, zero=True)

    def forward(self, x, memory, sliding_window=None, write_only=False):
        """Map x (B, T, D) to y (B, T, D), or None if `write_only`, and the memory with the new keys.

        A query sees the keys of the newest `sliding_window` positions, its own included; all if None.
        """
        qkv = unrounded(project(x, self.q, self.k, self.v))
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        ages = self._check(memory, k)
        if memory.kv is not None:
            k, v = torch.cat((memory.kv[0], k), dim=1), torch.cat((memory.kv[1], v), dim=1)  # (B, S, H, K)
        T, S = q.shape[1], k.shape[1]
        if ages is not None:
            new = torch.arange(T, 0, -1, device=x.device).expand(*ages.shape[:-1], T)
            ages = torch.cat((ages + T, new), dim=-1)  # (S,) or (B, S)
        memory = Memory(kv=(k, v), ages=ages)
        if write_only:
            return None, memory
        if ages is None:
            q, k = rotate(q, S - T, self.rope_base), rotate(k, 0, self.rope_base)
        else:
            wide = torch.promote_types(q.dtype, x.dtype)
            turns = rotary_angles(ages[..., :1] - ages, q.shape[3], self.rope_base, wide)
            q = kernels.naive.apply_rotary(q, *(table[..., S - T :, :] for table in turns))
            k = kernels.naive.apply_rotary(k, *turns)
        return self.o(attend(q, k, v, sliding_window, ages).flatten(2)), memory

    def _check(self, memory, k):
        """Raise ValueError if the memory is not one of this layer's; return the ages of its keys."""
        if memory.S is not None or memory.conv is not None:
            raise ValueError("state: an attention block carries no fast weight and no convolution context")
        if memory.kv is None:
            return None
        (B, _, H, K), old = k.shape, memory.kv[0].shape
        fits = len(old) == 4 and (old[0], *old[2:]) == (B, H, K) and memory.kv[1].shape == old
        fits = fits and memory.kv[0].dtype == memory.kv[1].dtype == k.dtype
        ages = memory.ages
        if not fits or ages is not None and tuple(ages.shape) not in ((old[1],), (B, old[1])):
            shapes = [(tuple(x.shape), x.dtype) for x in (*memory.kv, ages) if x is not None]
            wanted = f"(B, S, H, K) = ({B}, S, {H}, {K}) in {k.dtype}"
            raise ValueError(f"state: cached keys and values must be {wanted}; got {shapes}")
        return ages


def attend(q, k, v, sliding_window=None, ages=None):
    """Causal attention of q (B, T, H, K) over k, v (B, S, H, K), by whatever is fastest for so many keys.

    `ages`, (S,) or (B, S), says where the keys stand; side by side if None.  On a CPU autocast is off in it.
    """
    with torch.autocast("cpu", enabled=False) if low_on_cpu(q) else nullcontext():
        return _attend(q, k, v, sliding_window, ages)


def _attend(q, k, v, sliding_window, ages):
    T, S = q.shape[1], k.shape[1]
    whole = sliding_window is None or ages is None and sliding_window >= S
    loops = not kernels.use_numba.on or S <= SHORT and kernels.compiled(q, k, v)
    if loops and (whole or ages is None):
        return kernels.softmax_attention(q, k, v, sliding_window=None if whole else sliding_window)
    mask = None
    if not whole or T > 1 and S > T:
        ages = torch.arange(S, 0, -1, device=q.device) if ages is None else ages
        own = ages[..., S - T :].unsqueeze(-1)
        age = ages.unsqueeze(-2) - own  # (T, S) or (B, T, S), of a key for a query
        mask = (age >= 0) if whole else (age >= 0) & (age < sliding_window)
        mask = mask.unsqueeze(1) if mask.ndim == 3 else mask  # one for all heads
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1)
    return y.transpose(1, 2)


def newest(x, context, count):
    """The newest `count` of the inputs x (B, T, C) and, before them, context (B, count, C) or zeros."""
    T = x.shape[1]
    if T < count:
        return kernels.prepend_context(x, context, count + 1)[:, T:]
    return x[:, T - count :].clone()  # a view would keep the whole window alive


class ShortConvolution(nn.Module):
    """A causal convolution over time, one small filter for each channel, followed by SiLU.

    Parameters
    ----------
    channels, taps : int
        Channels C and filter length.

    Chapter: 06_hybrid
    """

    def __init__(self, channels, taps=4):
        super().__init__()
        self.taps, self.channels = taps, channels
        self.weight = nn.Parameter(torch.empty(taps, channels).normal_(std=taps**-0.5))

    def forward(self, x, context):
        """Map x (B, T, C) and its context (B, taps - 1, C) or None to y (B, T, C) and the next context."""
        y = kernels.causal_convolution(x, self.weight, context, silu=True)
        return y, newest(x, context, self.taps - 1)


class DynamicConvolution(nn.Module):
    """A causal convolution with filters computed from the token, one for each token and channel; then SiLU.

    Parameters
    ----------
    d_model, channels, taps : int
        Width of the token that makes the filters, channels C, filter length.

    Notes
    -----
    Of the two matrices that make the filters the first starts random and the second at zero: with both at
    zero neither would get a gradient.  So the layer starts as an ordinary convolution, given by the bias.

    Chapter: 06_hybrid
    """

    def __init__(self, d_model, channels, taps=4):
        super().__init__()
        self.taps, self.channels = taps, channels
        self.down = linear(d_model, channels // 8)
        self.up = nn.Linear(channels // 8, channels * taps)
        nn.init.zeros_(self.up.weight)
        nn.init.normal_(self.up.bias, std=0.02)

    def forward(self, values, x, context):
        """Filter values (B, T, C) with the filters that x (B, T, D) makes; also the next context."""
        filters = self.up(F.silu(self.down(x))).unflatten(-1, (self.taps, -1))  # (B, T, taps, C)
        T, past = values.shape[1], kernels.prepend_context(values, context, self.taps)
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
        Length of the convolution on queries, keys and values (values only, if `dynamic`).
    rule : {"delta", "hebbian"}
        The local learning rule.
    dynamic : bool
        The Jet layer: no convolution on queries and keys, a dynamic one on the values.
    backend : str
        See :func:`gated_delta_rule`.

    Chapter: 06_hybrid
    """

    def __init__(
        self, d_model, num_heads, key_size, value_size, taps=4, rule="delta", dynamic=False, backend="auto"
    ):
        super().__init__()
        H, K, V = num_heads, key_size, value_size
        self.num_heads, self.key_size, self.value_size = H, K, V
        self.dynamic, self.backend = dynamic, backend
        self.rule = {"delta": kernels.gated_delta_rule, "hebbian": kernels.gated_hebbian_rule}[rule]
        self.q, self.k = linear(d_model, H * K), linear(d_model, H * K)
        self.v, self.gate = linear(d_model, H * V), linear(d_model, H * V)
        self.a, self.b = linear(d_model, H), linear(d_model, H)
        channels = 2 * H * K + H * V
        self.conv = DynamicConvolution(d_model, H * V, taps) if dynamic else ShortConvolution(channels, taps)
        # Each head starts with its own memory span: A_log spreads the rates, dt_bias the step sizes.
        self.A_log = nn.Parameter(torch.empty(H).uniform_(1, 16).log())
        dt = torch.empty(H).uniform_(math.log(1e-3), math.log(0.1)).exp()
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus(dt_bias) = dt
        self.norm = RMSNorm(V, eps=1e-5)
        self.o = linear(H * V, d_model, zero=True)

    def forward(self, x, memory, sliding_window=None, write_only=False, real=None):
        """Map x (B, T, D) to y (B, T, D), or None if `write_only`, and the memory with what was written.

        `real` (B, T) is False at padding, which neither decays nor writes; None where there is none.
        """
        H, K, V = self.num_heads, self.key_size, self.value_size
        check_fast(memory, (len(x), self.conv.taps - 1, self.conv.channels))
        y = project(x, self.q, self.k, self.v, self.gate, self.a, self.b)  # (B, T, H (2 K + 2 V + 2))
        qkv, gate, a, b = y.split((2 * H * K + H * V, H * V, H, H), dim=-1)
        if self.dynamic:
            qk, v = unrounded(qkv).split((2 * H * K, H * V), dim=-1)
            v, conv = self.conv(v, x, memory.conv)  # (B, T, H V), (B, taps - 1, H V)
            qkv = torch.cat((F.silu(qk), v), dim=-1)  # (B, T, H (2 K + V))
        else:
            qkv, conv = self.conv(qkv, memory.conv)  # (B, T, C), (B, taps - 1, C), C = H (2 K + V)
        q, k, v = kernels.split_heads(qkv, H, K)  # (B, T, H, K) twice, of length 1, and (B, T, H, V)
        wide = torch.promote_types(torch.float32, self.A_log.dtype)
        g = -self.A_log.to(wide).exp() * F.softplus(a.to(wide) + self.dt_bias)  # (B, T, H)
        beta = b.to(wide).sigmoid()  # (B, T, H)
        if real is not None:
            g, beta = (y * real.unsqueeze(-1) for y in (g, beta))
        o, S = self.rule(q, k, v, g=g, beta=beta, initial_state=memory.S, backend=self.backend)
        memory = Memory(S=S, conv=conv)  # (B, H, K, V)
        if write_only:
            return None, memory
        o = self.norm(o, gate.unflatten(-1, (H, V)))  # (B, T, H, V)
        return self.o(o.flatten(2)), memory


def check_fast(memory, wanted):
    """Raise ValueError unless this is the memory of a fast-weight layer; the rule checks S itself.

    `wanted` is the shape of a convolution context, (B, taps - 1, channels).
    """
    if memory.kv is not None:
        raise ValueError("state: a block of fast weights caches no keys; got some")
    if memory.conv is not None and tuple(memory.conv.shape) != wanted:
        what = f"the convolution context must be (B, taps - 1, channels) = {wanted}"
        raise ValueError(f"state: {what}; got {tuple(memory.conv.shape)}")


class SwiGLU(nn.Module):
    """The gated feed-forward layer, ``down(silu(gate(x)) * up(x))``.

    Parameters
    ----------
    d_model, hidden : int
        Width in and out, width inside.

    Chapter: 06_hybrid
    """

    def __init__(self, d_model, hidden):
        super().__init__()
        self.gate, self.up = linear(d_model, hidden), linear(d_model, hidden)
        self.down = linear(hidden, d_model, zero=True)

    def forward(self, x):
        return self.down(kernels.swiglu(project(x, self.gate, self.up)))
