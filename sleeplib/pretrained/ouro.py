"""Ouro, a transformer that loops by itself: two norms for each sublayer, and the final norm in the loop."""

from torch import nn
from transformers import LlamaConfig
from transformers.models.llama import modeling_llama as llama

from .adapter import PretrainedLM, family
from .bare import BareForCausalLM, BareModel, register
from .blocks import AttentionBlock

NORMS = ("input_layernorm", "input_layernorm_2", "post_attention_layernorm", "post_attention_layernorm_2")


class OuroConfig(LlamaConfig):
    """The configuration of ByteDance/Ouro-1.4B and its kin, as their config.json has it."""

    model_type = "ouro"

    total_ut_steps: int = 4
    early_exit_threshold: float = 1.0


class OuroLayer(nn.Module):
    """The weights of one layer."""

    def __init__(self, config, index):
        super().__init__()
        self.self_attn = llama.LlamaAttention(config, index)
        self.mlp = llama.LlamaMLP(config)
        for name in NORMS:
            setattr(self, name, llama.LlamaRMSNorm(config.hidden_size, config.rms_norm_eps))


class OuroModel(BareModel):
    """The weights between embedding and head.  The gate of Ouro's early exit is kept, and not used."""

    config_class, layer_class = OuroConfig, OuroLayer
    norm_class, rotary_class = llama.LlamaRMSNorm, llama.LlamaRotaryEmbedding

    def __init__(self, config):
        super().__init__(config)
        self.early_exit_gate = nn.Linear(config.hidden_size, 1)


@register
class OuroForCausalLM(BareForCausalLM):
    """Ouro's weights; :class:`Ouro` says how they are run.  transformers has no Ouro of its own."""

    config_class, model_class = OuroConfig, OuroModel


class OuroBlock(AttentionBlock):
    """A layer of Ouro; the last one ends with the final norm.

    Chapter: 16_pretrained
    """

    def __init__(self, layer, num_heads, rotary, *, final=None, **options):
        super().__init__(layer, num_heads, rotary, norms=NORMS, **options)
        self.final = (final,)  # the model's: registered here it would be saved twice

    def forward(self, h, memory, sliding_window=None, write_only=False):
        """Map h (B, T, D) and this block's memory to the next h, None if `write_only`, and memory."""
        h, memory = super().forward(h, memory, sliding_window, write_only)
        (norm,) = self.final
        return h if h is None or norm is None else norm(h), memory


@family("ouro")
class Ouro(PretrainedLM):
    """Ouro, which sleeps in layers that are inserted, such as ``insert=published.SIX_JET``.

    Ouro's own loops are replaced by those of sleep: awake it reads once, like Ouro with
    ``total_ut_steps = 1``.  The final norm follows the last layer, so each pass over all layers ends with it.

    Chapter: 16_pretrained
    """

    def __init__(self, original, **options):
        super().__init__(original, **options)
        if self.insert is not None and self.insert.after[-1] == self.config.num_hidden_layers - 1:
            last = self.config.num_hidden_layers - 2
            raise ValueError(f"insert.after must be at most {last}: Ouro's final norm follows its last layer")

    def make_blocks(self, body, *, padded, backend):
        """An attention block for each layer."""
        last, parts = body.layers[-1], (self.config.num_attention_heads, body.rotary_emb)
        return [
            OuroBlock(layer, *parts, final=body.norm if layer is last else None, padded=padded)
            for layer in body.layers
        ]

    def readout(self, h):
        """Map h (B, T, D), normed in the loop, to logits (B, T, vocab)."""
        self.check_h(h)
        return self.head(h)
