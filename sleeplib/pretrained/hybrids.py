"""Families in transformers: Gated DeltaNet hybrids, and plain decoders, which need inserted layers."""

import inspect
from functools import partial

import torch

from .adapter import PretrainedLM, family
from .blocks import AttentionBlock, DeltaBlock

POST_NORM = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")


class NextDelta(DeltaBlock):
    """The fast weights of Qwen3-Next: two projections, each grouped by key head.

    Chapter: 16_pretrained
    """

    def read(self, x):
        """Project x (B, T, D)."""
        m = self.layer.linear_attn
        ratio = m.num_v_heads // m.num_k_heads
        sizes = m.head_k_dim, m.head_k_dim, ratio * m.head_v_dim, ratio * m.head_v_dim
        parts = m.in_proj_qkvz(x).unflatten(-1, (m.num_k_heads, -1)).split(sizes, dim=-1)
        *qkv, gate = (y.flatten(2) for y in parts)
        b, a = (y.flatten(2) for y in m.in_proj_ba(x).unflatten(-1, (m.num_k_heads, -1)).chunk(2, dim=-1))
        return torch.cat(qkv, dim=-1), gate, b, a


class Qwen35Delta(DeltaBlock):
    """The fast weights of Qwen3.5: four projections.

    Chapter: 16_pretrained
    """

    def read(self, x):
        """Project x (B, T, D)."""
        m = self.layer.linear_attn
        return m.in_proj_qkv(x), m.in_proj_z(x), m.in_proj_b(x), m.in_proj_a(x)


class OlmoDelta(DeltaBlock):
    """The fast weights of Olmo Hybrid: six projections.

    Chapter: 16_pretrained
    """

    out, out_norm = "o_proj", "o_norm"

    def read(self, x):
        """Project x (B, T, D)."""
        m = self.layer.linear_attn
        qkv = torch.cat((m.q_proj(x), m.k_proj(x), m.v_proj(x)), dim=-1)
        return qkv, m.g_proj(x), m.b_proj(x), m.a_proj(x)


class Hybrid(PretrainedLM):
    """A family that mixes attention and its own Gated DeltaNet layers.

    Chapter: 16_pretrained
    """

    delta = None
    attention_norms = None

    def make_blocks(self, body, *, padded, backend):
        """A block for each layer, of the kind that ``config.layer_types`` names."""
        c = self.config
        if c.hidden_act != "silu":
            raise ValueError(f"original: its convolutions end in {c.hidden_act}; only silu is known here")
        strongest = 2.0 if getattr(c, "linear_allow_neg_eigval", False) else 1.0
        kinds = dict(
            linear_attention=lambda layer: self.delta(
                layer, padded=padded, backend=backend, strongest=strongest
            ),
            full_attention=lambda layer: AttentionBlock(
                layer, c.num_attention_heads, body.rotary_emb, padded=padded, norms=self.attention_norms
            ),
        )
        return [kinds[kind](layer) for kind, layer in zip(c.layer_types, body.layers, strict=True)]


@family("qwen3_next")
class Qwen3Next(Hybrid):
    """Qwen3-Next.

    Chapter: 16_pretrained
    """

    delta = NextDelta


@family("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text")
class Qwen35(Hybrid):
    """Qwen3.5, text only: pictures need positions that sleep does not know.

    Chapter: 16_pretrained
    """

    delta = Qwen35Delta


@family("olmo_hybrid")
class OlmoHybrid(Hybrid):
    """Olmo Hybrid, whose attention blocks norm what mixer and feed-forward layer give, not what they read.

    Chapter: 16_pretrained
    """

    delta, attention_norms = OlmoDelta, POST_NORM


class Plain(PretrainedLM):
    """A decoder of attention layers alone, built like Llama; it sleeps in layers that are inserted.

    Chapter: 16_pretrained
    """

    def make_blocks(self, body, *, padded, backend):
        """An attention block for each layer."""
        c, rotary = self.config, body.rotary_emb
        kinds = getattr(c, "layer_types", None) or ["sliding_attention"] * len(body.layers)
        many = "layer_type" in inspect.signature(rotary.forward).parameters  # a table for each kind
        norms = None if hasattr(body.layers[0], "input_layernorm") else POST_NORM
        blocks = []
        for layer, kind in zip(body.layers, kinds, strict=True):
            angles = partial(rotary, layer_type=kind) if many else rotary
            window = getattr(c, "sliding_window", None) if kind == "sliding_attention" else None
            options = dict(own_window=window, padded=padded, norms=norms)
            blocks.append(AttentionBlock(layer, c.num_attention_heads, angles, **options))
        return blocks
