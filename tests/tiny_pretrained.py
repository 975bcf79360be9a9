"""Tiny checkpoints in the formats of the families that sleeplib knows, made by transformers itself."""

from functools import cache

import torch

GDN = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=12)
BASE = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=4)
BASE |= dict(num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=None, eos_token_id=1)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
EXPERTS |= dict(shared_expert_intermediate_size=16, mlp_only_layers=[0])
ROPE = dict(rope_parameters={"rope_type": "default", "rope_theta": 5e5})
SECTIONS = dict(rope_type="default", rope_theta=1e7, partial_rotary_factor=0.5)
SECTIONS |= dict(mrope_interleaved=True, mrope_section=[2, 1, 1])  # positions in time, height and width
# What is asked for by name: the class of the configuration, and what differs from the defaults.
CONFIGS = {
    "qwen3_5": ("Qwen3_5TextConfig", BASE | GDN | dict(head_dim=16)),
    "qwen3_5-pictures": ("Qwen3_5TextConfig", BASE | GDN | dict(head_dim=16, rope_parameters=SECTIONS)),
    "qwen3_next": ("Qwen3NextConfig", BASE | GDN | EXPERTS | dict(head_dim=16)),
    "olmo_hybrid": ("OlmoHybridConfig", BASE | GDN | ROPE),
    "olmo_hybrid-nope": ("OlmoHybridConfig", BASE | GDN),
    "llama": ("LlamaConfig", BASE),
    "llama-tied": ("LlamaConfig", BASE | dict(tie_word_embeddings=True)),
    "mistral": ("MistralConfig", BASE | dict(sliding_window=5)),
    "qwen3": ("Qwen3Config", BASE | dict(head_dim=16)),
    "olmo3": ("Olmo3Config", BASE | dict(sliding_window=5)),
    "qwen2": ("Qwen2Config", BASE),
}
HYBRIDS = ["qwen3_5", "qwen3_next", "olmo_hybrid"]


def tiny_config(name, **changes):
    """The configuration of a tiny model."""
    import transformers

    kind, settings = CONFIGS[name]
    return getattr(transformers, kind)(**settings | changes)


def tiny_original(name, seed=0, **changes):
    """A tiny model of transformers in which every weight matters."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(name, **changes)).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn(p.shape))
    return model


@cache
def byte_tokenizer():
    """A tokenizer of bytes: 256 of them, end of text 256, padding 257."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bare = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bare, pad_token="<pad>", eos_token="<end>")


def padded_batch(vocab=40, rows=3, length=11, seed=1):
    """Tokens (rows, length) with 0 before the beginning of some rows, and 1 where there is no padding."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, vocab, (rows, length), generator=generator)
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    mask[2, :1] = 0
    return tokens.masked_fill(mask == 0, 0), mask
