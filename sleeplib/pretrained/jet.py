"""Jet-Nemotron, a hybrid of full attention, attention in a window, and Jet layers."""

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import Qwen2Config
from transformers.models.qwen2 import modeling_qwen2 as qwen2

from .. import kernels
from ..layers import RMSNorm, check_fast, newest
from .adapter import PretrainedLM, family
from .bare import BareForCausalLM, BareModel, register
from .blocks import AttentionBlock, RuleBlock

KINDS = ("attn", "swa", "jet")


@strict
class JetNemotronConfig(Qwen2Config):
    """The configuration of jet-ai/Jet-Nemotron-2B and its kin, as their config.json has it."""

    model_type = "jet_nemotron"

    efficient_attention_config: dict | None = None

    def validate_layer_type(self):
        """Refuse layers of unknown kinds: the names are this family's own."""
        kinds = self.layer_types
        if len(kinds) != self.num_hidden_layers or set(kinds) - set(KINDS):
            wanted = f"{self.num_hidden_layers} of {', '.join(KINDS)}"
            raise ValueError(f"layer_types must be {wanted}; got {kinds}")
        missing = (set(kinds) - {"attn"}) - set(self.efficient_attention_config or ())
        if missing:
            raise ValueError(f"efficient_attention_config must have {', '.join(sorted(missing))}")


class JetMixer(nn.Module):
    """The weights of a Jet layer: of projections, decay, the generator of filters, and the norm."""

    def __init__(self, config):
        super().__init__()
        c, D = config.efficient_attention_config["jet"], config.hidden_size
        self.num_heads, self.head_k_dim, self.taps = c["num_heads"], c["head_dim"], c["conv_size"]
        # 96 * 2.6666666667 is meant to be 256
        self.head_v_dim = int(self.head_k_dim * c["expand_v"])
        keys, values = self.num_heads * self.head_k_dim, self.num_heads * self.head_v_dim
        shapes = dict(q_proj=keys, k_proj=keys, v_proj=values, g_proj=values)
        shapes |= dict(a_proj=self.num_heads, b_proj=self.num_heads)
        for name, size in shapes.items():
            setattr(self, name, nn.Linear(D, size, bias=False))
        self.o_proj = nn.Linear(values, D, bias=False)
        # zeros until a checkpoint is read
        self.A_log, self.dt_bias = (nn.Parameter(torch.zeros(self.num_heads)) for _ in range(2))
        inner = values // c["dconv_generator_reduction"]
        parts = dict(w1=nn.Linear(D, inner, bias=False), act=nn.SiLU())
        parts["w2"] = nn.Linear(inner, values * self.taps)
        self.dynamic_conv1d = nn.Module()
        self.dynamic_conv1d.kernel_generator = nn.Sequential()
        for name, part in parts.items():
            self.dynamic_conv1d.kernel_generator.add_module(name, part)
        self.o_norm = RMSNorm(self.head_v_dim, eps=float(c["norm_eps"]))


class JetLayer(nn.Module):
    """The weights of one layer; its mixer is called ``self_attn`` whatever it is."""

    def __init__(self, config, index):
        super().__init__()
        jet = config.layer_types[index] == "jet"
        self.self_attn = JetMixer(config) if jet else qwen2.Qwen2Attention(config, index)
        self.mlp = qwen2.Qwen2MLP(config)
        for name in ("input_layernorm", "post_attention_layernorm"):
            setattr(self, name, qwen2.Qwen2RMSNorm(config.hidden_size, config.rms_norm_eps))


class JetNemotronModel(BareModel):
    """The weights between embedding and head."""

    config_class, layer_class = JetNemotronConfig, JetLayer
    norm_class, rotary_class = qwen2.Qwen2RMSNorm, qwen2.Qwen2RotaryEmbedding


@register
class JetNemotronForCausalLM(BareForCausalLM):
    """Jet-Nemotron's weights; :class:`JetNemotron` says how they are run.

    transformers has no Jet-Nemotron of its own, and the code that comes with the checkpoint needs Triton.
    """

    config_class, model_class = JetNemotronConfig, JetNemotronModel


class JetBlock(RuleBlock):
    """A Jet layer: values go through a filter that the token asks for, queries and keys through none.

    Chapter: 16_pretrained
    """

    mixer, out, out_norm = "self_attn", "o_proj", "o_norm"

    def __init__(self, layer, **options):
        m = layer.self_attn
        super().__init__(layer, (m.num_heads, m.head_k_dim, m.head_v_dim), **options)

    def heads(self, x, memory):
        """Project, and filter the values."""
        m, (H, K, V) = self.layer.self_attn, self.fast_shape
        check_fast(memory, (len(x), m.taps - 1, H * V))
        q, k = (kernels.l2_normalize(F.silu(p(x)).unflatten(-1, (H, K))) for p in (m.q_proj, m.k_proj))
        values, T = m.v_proj(x), x.shape[1]
        filters = m.dynamic_conv1d.kernel_generator(x).unflatten(-1, (H * V, m.taps))  # the newest last
        past = kernels.prepend_context(values, memory.conv, m.taps)
        v = F.silu(sum(past[:, i : i + T] * filters[..., i] for i in range(m.taps)))  # (B, T, H V)
        return q, k, v, m.g_proj(x), m.b_proj(x), m.a_proj(x), newest(values, memory.conv, m.taps - 1)


@family("jet_nemotron")
class JetNemotron(PretrainedLM):
    """Jet-Nemotron, asleep in the middle half of its layers.

    Chapter: 16_pretrained
    """

    def default_loop(self, depth):
        """The middle half of the layers; in the paper 14 of 28, which we take to be 7 .. 20."""
        return depth // 4, depth - depth // 4 - 1

    def make_blocks(self, body, *, padded, backend):
        """A block for each layer, of the kind that ``config.layer_types`` names."""
        c = self.config
        heads, swa = c.num_attention_heads, (c.efficient_attention_config or {}).get("swa", {})

        def attention(layer, **options):
            return AttentionBlock(layer, heads, body.rotary_emb, padded=padded, **options)

        kinds = dict(
            jet=lambda layer: JetBlock(layer, backend=backend, padded=padded),
            attn=attention,
            swa=lambda layer: attention(layer, own_window=swa["window_size"]),
        )
        return [kinds[kind](layer) for kind, layer in zip(c.layer_types, body.layers, strict=True)]
