"""Decoder layers of pretrained models, run part by part: attention over a cache, the gated delta rule."""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import nn

from .. import kernels
from ..checks import LARGEST
from ..layers import attend, check_fast, newest
from ..state import Memory

HIDDEN = -(2**40)  # the age of a key that nobody may see: it stays below 0 however long the stream is


class Block(nn.Module, ABC):
    """One decoder layer of the original; a subclass says what its mixer does, in :meth:`mix`.

    Parameters
    ----------
    layer : torch.nn.Module
        The decoder layer, with a feed-forward layer ``mlp``.  Its parts are looked up by name at each call:
        one that has been wrapped since is called with its wrapping.
    padded : bool
        Whether rows of h that are zero are padding, and stay so.
    norms : tuple of (str or None)
        Names of the layer's norms before its mixer, after it, before its feed-forward layer and after it.

    Chapter: 16_pretrained
    """

    fast_shape = None  # (H, K, V) of the fast weight, if there is one

    def __init__(self, layer, *, padded=False, norms=None):
        super().__init__()
        self.layer, self.padded = layer, padded
        self.norms = norms or ("input_layernorm", None, "post_attention_layernorm", None)

    def forward(self, h, memory, sliding_window=None, write_only=False):
        """Map h (B, T, D) and this block's memory to the next h, None if `write_only`, and memory."""
        real = h.ne(0).any(-1) if self.padded else None
        before, after, before_mlp, after_mlp = self.norms
        y, memory = self.mix(self._norm(before, h), memory, sliding_window, write_only, real)
        if write_only:
            return None, memory
        h = h + keep_real(self._norm(after, y), real)
        y = self.layer.mlp(self._norm(before_mlp, h))
        y = y[0] if isinstance(y, tuple) else y  # a mixture of experts gives its router's scores too
        return h + keep_real(self._norm(after_mlp, y), real), memory

    @abstractmethod
    def mix(self, x, memory, window, write_only, real):
        """Map the normed x (B, T, D) and memory to y (B, T, D), None if `write_only`, and the next memory.

        `real` (B, T) is False at padding, or None where there is none.
        """

    def _norm(self, name, x):
        return x if name is None else getattr(self.layer, name)(x)


def keep_real(y, real):
    """y (B, T, D) with zeros where `real` (B, T) is False; y itself if that is None."""
    return y if real is None else y * real.unsqueeze(-1).to(y.dtype)


class AttentionBlock(Block):
    """A layer of softmax attention: grouped keys, and, if it has them, a gate and norms of q and k.

    Parameters
    ----------
    layer, padded, norms
        As :class:`Block` takes them.
    num_heads : int
        Heads of queries; keys and values may have fewer.
    rotary : torch.nn.Module or None
        The original's table of angles, ``rotary(x, positions) -> (cos, sin)``; None if it uses no positions.
    own_window : int, optional
        A query sees at most this many of its newest keys, even if the caller allows more.

    Chapter: 16_pretrained
    """

    def __init__(self, layer, num_heads, rotary, *, own_window=None, **options):
        super().__init__(layer, **options)
        self.num_heads, self.own_window = num_heads, own_window
        self.tables = (rotary,)  # the model's: registered here it would be sharded with the block

    def mix(self, x, memory, window, write_only, real):
        """Attention of x (B, T, D) over the cached keys and its own."""
        q, k, v, gate = self.read(x)
        ages = self._ages(memory, k, real)
        if memory.kv is not None:
            k, v = torch.cat((memory.kv[0], k), dim=1), torch.cat((memory.kv[1], v), dim=1)
        T, S, own = q.shape[1], k.shape[1], self.own_window or LARGEST
        old = max(0, S + 1 - own)  # keys that no later query may see
        memory = Memory(kv=(k[:, old:], v[:, old:]), ages=ages if ages is None else ages[:, old:])
        if write_only:
            return None, memory
        (rotary,) = self.tables
        if rotary is not None:
            q, k = rotate(q, k, rotary)
        k, v = (x.repeat_interleave(self.num_heads // x.shape[2], dim=2) for x in (k, v))
        window = min(own, window or LARGEST)
        y = attend(q, k, v, None if window == LARGEST and ages is None else window, ages).flatten(2)
        y = y if gate is None else y * gate.sigmoid()
        return self.layer.self_attn.o_proj(y[:, -T:]), memory

    def read(self, x):
        """Queries (B, T, H, K), keys and values (B, T, fewer H, K), and a gate (B, T, H K) or None."""
        m, gate = self.layer.self_attn, None
        q, k, v = m.q_proj(x), m.k_proj(x), m.v_proj(x)
        if q.shape[-1] == 2 * self.num_heads * m.head_dim:  # each head's query, then its gate
            q, gate = (y.flatten(2) for y in q.unflatten(-1, (self.num_heads, -1)).chunk(2, dim=-1))
        return self._heads("q_norm", q), self._heads("k_norm", k), v.unflatten(-1, (-1, m.head_dim)), gate

    def _heads(self, name, x):
        """x (B, T, H K) as heads (B, T, H, K), normed head by head or all at once, or not at all."""
        m = self.layer.self_attn
        norm, heads = getattr(m, name, None), (-1, m.head_dim)
        if norm is None:
            return x.unflatten(-1, heads)
        whole = norm.weight.numel() != m.head_dim
        return norm(x).unflatten(-1, heads) if whole else norm(x.unflatten(-1, heads))

    def _ages(self, memory, k, real):
        """The ages (B, S) of all keys, HIDDEN at padding; None if all may be seen."""
        if memory.S is not None or memory.conv is not None:
            raise ValueError("state: an attention block carries no fast weight and no convolution context")
        (B, T, *heads), device = k.shape, k.device
        old = 0 if memory.kv is None else memory.kv[0].shape[1]
        if memory.kv is not None:
            for x in memory.kv:
                if tuple(x.shape) != (B, old, *heads) or x.dtype != k.dtype:
                    wanted = f"(B, S, H, K) = ({B}, S, {heads[0]}, {heads[1]}) in {k.dtype}"
                    found = f"{tuple(x.shape)} in {x.dtype}"
                    raise ValueError(f"state: cached keys and values must be {wanted}; got {found}")
        if real is None and memory.ages is None:
            return None
        before = torch.arange(old, 0, -1, device=device) if memory.ages is None else memory.ages
        if before.shape[-1] != old:
            raise ValueError(f"state: {before.shape[-1]} ages for {old} cached keys")
        new = torch.arange(T, 0, -1, device=device).expand(B, T)
        new = new if real is None else new.masked_fill(~real, HIDDEN)
        return torch.cat((before.expand(B, old) + T, new), dim=1)


def rotate(q, k, rotary):
    """Turn q (B, T, H, K) and k (B, S, fewer H, K) by the original's angles, the oldest key at position 0.

    Only differences of positions matter; counted from the oldest key, the angles stay small.  If the rotary
    is partial, the first coordinates turn and the rest stay.
    """
    S = k.shape[1]
    cos, sin = rotary(k, torch.arange(S, device=k.device).unsqueeze(0))
    half = cos.shape[-1] // 2
    cos, sin = (x[0, :, :half].to(k.dtype) for x in (cos, sin))  # (S, half)

    def turn(x):
        start = S - x.shape[1]
        turned = kernels.apply_rotary(x[..., : 2 * half], cos[start:], sin[start:])
        return torch.cat((turned, x[..., 2 * half :]), dim=-1) if 2 * half < x.shape[-1] else turned

    return turn(q), turn(k)


class RuleBlock(Block):
    """A layer of fast weights by the gated delta rule; a subclass says what it reads and writes with.

    Parameters
    ----------
    layer, padded, norms
        As :class:`Block` takes them.
    fast_shape : tuple of int
        H, K and V.
    backend : str
        See :func:`gated_delta_rule`.
    strongest : float
        beta runs from 0 to this; 2 allows negative eigenvalues.

    Chapter: 16_pretrained
    """

    mixer, out, out_norm = "linear_attn", "out_proj", "norm"

    def __init__(self, layer, fast_shape, *, backend="auto", strongest=1.0, **options):
        super().__init__(layer, **options)
        self.fast_shape, self.backend, self.strongest = fast_shape, backend, strongest

    @abstractmethod
    def heads(self, x, memory):
        """Map x (B, T, D) to q and k (B, T, H, K), v and a gate (B, T, H V), b and a, and the next context.

        b and a (B, T, H) make beta and decay; the context is the ``conv`` of :class:`Memory`, and the old one
        is to be checked.
        """

    def mix(self, x, memory, window, write_only, real):
        """Read and write the fast weight, token by token of x (B, T, D)."""
        m, heads = getattr(self.layer, self.mixer), (-1, self.fast_shape[-1])
        q, k, v, gate, b, a, context = self.heads(x, memory)
        wide = torch.promote_types(torch.float32, x.dtype)
        g = -m.A_log.to(wide).exp() * F.softplus(a.to(wide) + m.dt_bias.to(wide))  # (B, T, H)
        beta = self.strongest * b.to(wide).sigmoid()
        if real is not None:  # padding neither decays nor writes
            g, beta = (y * real.unsqueeze(-1) for y in (g, beta))
        options = dict(g=g, beta=beta, initial_state=memory.S, backend=self.backend)
        o, S = kernels.gated_delta_rule(q, k, v.unflatten(-1, heads), **options)
        memory = Memory(S=S, conv=context)
        if write_only:
            return None, memory
        o = getattr(m, self.out_norm)(o, gate.unflatten(-1, heads))
        return getattr(m, self.out)(o.flatten(2)), memory


class DeltaBlock(RuleBlock):
    """Several value heads for each key head, all behind a short convolution, as in transformers' hybrids.

    Parameters
    ----------
    layer, backend, strongest, padded, norms
        As :class:`RuleBlock` takes them.

    Chapter: 16_pretrained
    """

    def __init__(self, layer, **options):
        m = layer.linear_attn
        super().__init__(layer, (m.num_v_heads, m.head_k_dim, m.head_v_dim), **options)

    @abstractmethod
    def read(self, x):
        """Project x (B, T, D) to (qkv, gate, b, a), as the family does it.

        qkv (B, T, C) goes into the convolution, gate is (B, T, H V), b and a (B, T, H) make beta and decay.
        """

    def heads(self, x, memory):
        """Project, convolve, and give each value head the queries and keys that it shares."""
        m, (H, K, _) = self.layer.linear_attn, self.fast_shape
        qkv, gate, b, a = self.read(x)
        filters = m.conv1d.weight.squeeze(1).T.contiguous()  # (taps, C)
        check_fast(memory, (len(x), len(filters) - 1, qkv.shape[-1]))
        mixed = kernels.causal_convolution(qkv, filters, memory.conv, silu=True)
        q, k, v = mixed.split((m.key_dim, m.key_dim, m.value_dim), dim=-1)
        q, k = (kernels.l2_normalize(y.unflatten(-1, (-1, K))) for y in (q, k))  # (B, T, fewer H, K)
        q, k = (y.repeat_interleave(H // y.shape[2], dim=2) for y in (q, k))
        return q, k, v, gate, b, a, newest(qkv, memory.conv, len(filters) - 1)
