"""Published configurations, so that the cost of a model can be known before anything is downloaded."""

import torch

from .adapter import Insert
from .loading import DTYPES, adapt, enter_ours
from .lora import add_lora

# Of each model's config.json, the settings that say what it is made of.
QWEN = dict(
    model_type="qwen3_5_text",
    vocab_size=248320,
    hidden_size=1024,
    intermediate_size=3584,
    num_hidden_layers=24,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=256,
    linear_num_key_heads=16,
    linear_num_value_heads=16,
    linear_key_head_dim=128,
    linear_value_head_dim=128,
    tie_word_embeddings=True,
)
OURO = dict(
    model_type="ouro",
    vocab_size=49152,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=24,
    num_attention_heads=16,
    num_key_value_heads=16,
    head_dim=128,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
)
JET = dict(
    model_type="jet_nemotron",
    vocab_size=151936,
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    layer_types=["jet"] * 14 + ["attn"] + ["jet"] * 4 + ["attn", "swa", "swa"] + ["jet"] * 6,
    efficient_attention_config=dict(
        jet=dict(
            num_heads=12,
            head_dim=96,
            expand_v=2.6666666667,
            conv_size=4,
            dconv_generator_reduction=8,
            norm_eps="1e-5",
        ),
        swa=dict(window_size=1152),
    ),
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    tie_word_embeddings=True,
)
# The paper's six Jet layers; it is our reading that one stands in the middle of each group of four layers.
SIX_JET = Insert(after=(1, 5, 9, 13, 17, 21), num_heads=8, key_size=128, value_size=256)
PUBLISHED = {"Qwen/Qwen3.5-0.8B": QWEN, "ByteDance/Ouro-1.4B": OURO, "jet-ai/Jet-Nemotron-2B": JET}


def on_meta(config, *, lora=None, dtype="float32", **options):
    """A model without numbers (device "meta"), as :func:`adapt` makes it.

    Parameters
    ----------
    config : dict or str
        Settings as in a config.json, or the name of a repository in ``PUBLISHED``.
    lora : LoRA, optional
    dtype : {"float32", "bfloat16", "float64"}
        Of the original's weights; what is added is float32.
    **options
        Those of :class:`PretrainedLM`.

    Raises
    ------
    ValueError
        If the configuration of a repository is not known here.

    Chapter: 16_pretrained
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    enter_ours()
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    if isinstance(config, str):
        if config not in PUBLISHED:
            raise ValueError(f"config: {config!r} is not known here; there are {', '.join(PUBLISHED)}")
        config = PUBLISHED[config]
    with torch.device("meta"):
        text = AutoConfig.for_model(**config).get_text_config()
        original = AutoModelForCausalLM.from_config(text, dtype=DTYPES[dtype])
        model = adapt(original, **{"backend": "chunked"} | options)
        if lora is not None:
            add_lora(model, lora)
    return model
