"""Tiny checkpoints of Ouro and Jet-Nemotron in their own format, and what they compute, written plainly.

The references read a checkpoint's tensors by their published names and know nothing of sleeplib: every token,
every head and every key is a loop of its own, in float64.
"""

import json
import math

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

VOCAB = 23
# as in the published config.json, but for the sizes
OURO = dict(
    architectures=["OuroForCausalLM"],
    auto_map=dict(
        AutoConfig="configuration_ouro.OuroConfig", AutoModelForCausalLM="modeling_ouro.OuroForCausalLM"
    ),
    model_type="ouro",
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=24,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=8,
    hidden_act="silu",
    max_position_embeddings=65536,
    initializer_range=0.02,
    rms_norm_eps=1e-6,
    rope_theta=1000000.0,
    rope_scaling=None,
    layer_types=["full_attention"] * 4,
    sliding_window=None,
    use_sliding_window=False,
    max_window_layers=4,
    tie_word_embeddings=False,
    total_ut_steps=4,
    early_exit_threshold=1.0,
    attention_dropout=0.0,
    torch_dtype="float32",
)
JET = dict(
    architectures=["JetNemotronForCausalLM"],
    auto_map=dict(
        AutoConfig="configuration_jet_nemotron.JetNemotronConfig",
        AutoModelForCausalLM="modeling_jet_nemotron.JetNemotronForCausalLM",
    ),
    model_type="jet_nemotron",
    vocab_size=VOCAB,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=8,
    num_attention_heads=6,
    num_key_value_heads=2,
    hidden_act="silu",
    layer_types=["jet", "jet", "jet", "attn", "swa", "jet", "swa", "jet"],
    efficient_attention_config=dict(
        jet=dict(
            mode="chunk",
            expand_v=2.6666666667,
            num_heads=3,
            head_dim=6,
            conv_size=4,
            norm_eps="1e-5",
            dconv_generator_reduction=8,
            dconv_implementation="triton",
        ),
        swa=dict(window_size=4),
    ),
    initializer_range=0.02,
    max_position_embeddings=131072,
    max_window_layers=28,
    rms_norm_eps=1e-6,
    rope_scaling=None,
    rope_theta=1000000.0,
    tie_word_embeddings=True,
    use_mrope=False,
    torch_dtype="float32",
)


def ouro_shapes(c):
    """Name -> shape of every tensor of an Ouro checkpoint."""
    D, F_, V = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    wide = c["num_attention_heads"] * c["head_dim"]
    shapes = {"lm_head.weight": (V, D), "model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    shapes |= {"model.early_exit_gate.weight": (1, D), "model.early_exit_gate.bias": (1,)}
    for i in range(c["num_hidden_layers"]):
        own = {f"self_attn.{p}_proj.weight": (wide, D) for p in "qkv"} | {
            "self_attn.o_proj.weight": (D, wide)
        }
        own |= {f"mlp.{p}_proj.weight": (F_, D) for p in ("gate", "up")} | {"mlp.down_proj.weight": (D, F_)}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            own |= {f"{norm}.weight": (D,), f"{norm}_2.weight": (D,)}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in own.items()}
    return shapes


def jet_shapes(c):
    """Name -> shape of every tensor of a Jet-Nemotron checkpoint; the head is the embedding."""
    D, F_, jet = c["hidden_size"], c["intermediate_size"], c["efficient_attention_config"]["jet"]
    H, K = jet["num_heads"], jet["head_dim"]
    V, taps = int(K * jet["expand_v"]), jet["conv_size"]
    size = D // c["num_attention_heads"]
    shapes = {"model.embed_tokens.weight": (c["vocab_size"], D), "model.norm.weight": (D,)}
    for i, kind in enumerate(c["layer_types"]):
        own = {f"mlp.{p}_proj.weight": (F_, D) for p in ("gate", "up")} | {"mlp.down_proj.weight": (D, F_)}
        own |= {f"{norm}.weight": (D,) for norm in ("input_layernorm", "post_attention_layernorm")}
        if kind == "jet":
            rows = dict(q=H * K, k=H * K, v=H * V, g=H * V, a=H, b=H)
            own |= {f"self_attn.{p}_proj.weight": (n, D) for p, n in rows.items()}
            inner = H * V // jet["dconv_generator_reduction"]
            generator = "self_attn.dynamic_conv1d.kernel_generator"
            own |= {f"{generator}.w1.weight": (inner, D), f"{generator}.w2.weight": (H * V * taps, inner)}
            own |= {f"{generator}.w2.bias": (H * V * taps,), "self_attn.o_proj.weight": (D, H * V)}
            own |= {"self_attn.A_log": (H,), "self_attn.dt_bias": (H,), "self_attn.o_norm.weight": (V,)}
        else:
            rows = dict(q=c["num_attention_heads"], k=c["num_key_value_heads"], v=c["num_key_value_heads"])
            for p, heads in rows.items():
                own |= {
                    f"self_attn.{p}_proj.{part}": (heads * size, D)[: 2 - (part == "bias")]
                    for part in ("weight", "bias")
                }
            own |= {"self_attn.o_proj.weight": (D, c["num_attention_heads"] * size)}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in own.items()}
    return shapes


def write_checkpoint(folder, config, shapes, seed=0):
    """A folder with config.json and model.safetensors, every number random; return its tensors."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        x = torch.randn(shape, generator=generator)
        norm = name.endswith(("norm.weight", "norm_2.weight"))
        x = 1 + 0.2 * x if norm else x if "embed" in name else x * max(1, shape[-1]) ** -0.5
        weights[name] = x.contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return weights


def norm(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def turned(x, position, base):
    """One head's vector x (K,) at a position: pairs (j, j + K / 2) turn."""
    half = len(x) // 2
    y = x.clone()
    for j in range(half):
        angle = position * base ** (-2 * j / len(x))
        y[j] = x[j] * math.cos(angle) - x[j + half] * math.sin(angle)
        y[j + half] = x[j + half] * math.cos(angle) + x[j] * math.sin(angle)
    return y


def attention(x, w, heads, kv_heads, base, window=None):
    """x (T, D) of one sequence; w("q_proj") gives a projection."""
    q, k, v = (w(f"{p}_proj", x) for p in "qkv")
    size, T = q.shape[1] // heads, len(x)
    out = torch.zeros_like(q)
    for h in range(heads):
        own, other = slice(h * size, (h + 1) * size), (h // (heads // kv_heads)) * size
        keys = [turned(k[t, other : other + size], t, base) for t in range(T)]
        for t in range(T):
            first = 0 if window is None else max(0, t - window + 1)
            query = turned(q[t, own], t, base)
            scores = torch.stack([query @ keys[s] for s in range(first, t + 1)]) * size**-0.5
            share = scores.softmax(0)
            out[t, own] = sum(share[s - first] * v[s, other : other + size] for s in range(first, t + 1))
    return w("o_proj", out)


def jet_layer(x, w, raw, H, K, V, taps):
    """A Jet layer on x (T, D) of one sequence."""
    q, k, values = (w(f"{p}_proj", x) for p in "qkv")
    q, k = F.silu(q), F.silu(k)
    generator = "dynamic_conv1d.kernel_generator"
    filters = F.silu(x @ raw(f"{generator}.w1.weight").T) @ raw(f"{generator}.w2.weight").T
    filters = filters + raw(f"{generator}.w2.bias")
    v = torch.zeros_like(values)
    for t in range(len(x)):
        for c in range(H * V):
            for tap in range(taps):
                s = t - (taps - 1) + tap
                if s >= 0:
                    v[t, c] += values[s, c] * filters[t, c * taps + tap]
    v = F.silu(v)
    out = torch.zeros_like(v)
    for h in range(H):
        S = torch.zeros(K, V, dtype=x.dtype)
        for t in range(len(x)):
            key, query = (y[t, h * K : (h + 1) * K] for y in (k, q))
            key, query = (y / (y.pow(2).sum() + 1e-6).sqrt() for y in (key, query))
            step = F.softplus((w("a_proj", x))[t, h] + raw("dt_bias")[h])
            S = (-raw("A_log")[h].exp() * step).exp() * S
            beta = w("b_proj", x)[t, h].sigmoid()
            S = S + torch.outer(key, beta * (v[t, h * V : (h + 1) * V] - S.T @ key))
            o = norm(S.T @ (query * K**-0.5), raw("o_norm.weight"), 1e-5)
            out[t, h * V : (h + 1) * V] = o * F.silu(w("g_proj", x)[t, h * V : (h + 1) * V])
    return w("o_proj", out)


def _readers(weights, prefix):
    def raw(name):
        return weights[f"{prefix}.{name}"]

    def w(name, x):
        y = x @ raw(f"{name}.weight").T
        return y + raw(f"{name}.bias") if f"{prefix}.{name}.bias" in weights else y

    return raw, w


def ouro_logits(weights, c, row, loops=1):
    """Logits (T, vocab) of one sequence, `loops` times through all layers."""
    weights = {k: v.double() for k, v in weights.items()}
    h, eps = weights["model.embed_tokens.weight"][row], c["rms_norm_eps"]
    for _ in range(loops):
        for i in range(c["num_hidden_layers"]):
            raw, _ = _readers(weights, f"model.layers.{i}")
            _, w = _readers(weights, f"model.layers.{i}.self_attn")
            x = norm(h, raw("input_layernorm.weight"), eps)
            y = attention(x, w, c["num_attention_heads"], c["num_key_value_heads"], c["rope_theta"])
            h = h + norm(y, raw("input_layernorm_2.weight"), eps)
            x = norm(h, raw("post_attention_layernorm.weight"), eps)
            y = F.silu(x @ raw("mlp.gate_proj.weight").T) * (x @ raw("mlp.up_proj.weight").T)
            h = h + norm(y @ raw("mlp.down_proj.weight").T, raw("post_attention_layernorm_2.weight"), eps)
        h = norm(h, weights["model.norm.weight"], eps)
    return h @ weights["lm_head.weight"].T


def jet_logits(weights, c, row):
    """Logits (T, vocab) of one sequence."""
    weights = {k: v.double() for k, v in weights.items()}
    jet, eps = c["efficient_attention_config"]["jet"], c["rms_norm_eps"]
    H, K = jet["num_heads"], jet["head_dim"]
    h = weights["model.embed_tokens.weight"][row]
    for i, kind in enumerate(c["layer_types"]):
        raw, _ = _readers(weights, f"model.layers.{i}")
        own, w = _readers(weights, f"model.layers.{i}.self_attn")
        x = norm(h, raw("input_layernorm.weight"), eps)
        if kind == "jet":
            y = jet_layer(x, w, own, H, K, int(K * jet["expand_v"]), jet["conv_size"])
        else:
            window = c["efficient_attention_config"]["swa"]["window_size"] if kind == "swa" else None
            y = attention(x, w, c["num_attention_heads"], c["num_key_value_heads"], c["rope_theta"], window)
        h = h + y
        x = norm(h, raw("post_attention_layernorm.weight"), eps)
        y = F.silu(x @ raw("mlp.gate_proj.weight").T) * (x @ raw("mlp.up_proj.weight").T)
        h = h + y @ raw("mlp.down_proj.weight").T
    return norm(h, weights["model.norm.weight"], eps) @ weights["model.embed_tokens.weight"].T
