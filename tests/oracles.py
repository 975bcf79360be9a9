"""A second, slow implementation of everything, straight from the equations: float64, loops over tokens.

Nothing here computes with sleeplib.  A model is its ``state_dict`` and its config; a past is the list of
normalised inputs that each mixer has read, from which keys, values and convolution contexts are recomputed
every time; attention turns keys by their absolute positions.
"""

import torch
import torch.nn.functional as F

IGNORE = -100


def recurrence(q, k, v, g, beta, S=None, scale=None, delta=True):
    """Equation (3), one token at a time: o (B, T, H, V) and the last S (B, H, K, V)."""
    B, T, H, K = q.shape
    S = torch.zeros(B, H, K, v.shape[3], dtype=v.dtype) if S is None else S
    outputs = []
    for t in range(T):
        S = g[:, t].exp()[..., None, None] * S
        written = v[:, t] - torch.einsum("bhkv,bhk->bhv", S, k[:, t]) if delta else v[:, t]
        S = S + torch.einsum("bh,bhk,bhv->bhkv", beta[:, t], k[:, t], written)
        outputs.append((K**-0.5 if scale is None else scale) * torch.einsum("bhkv,bhk->bhv", S, q[:, t]))
    return torch.stack(outputs, dim=1), S


def attention(q, k, v, visible, scale=None):
    """Softmax attention, one query at a time; visible (T, S) says which keys a query sees."""
    rows = []
    for t in range(q.shape[1]):
        keys, values = k[:, visible[t]], v[:, visible[t]]
        scores = torch.einsum("bhk,bshk->bhs", q[:, t], keys) * (
            q.shape[3] ** -0.5 if scale is None else scale
        )
        rows.append(torch.einsum("bhs,bshv->bhv", scores.softmax(-1), values))
    return torch.stack(rows, dim=1)


def rms_norm(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def unit(x, eps=1e-6):
    return x / (x.square().sum(-1, keepdim=True) + eps).sqrt()


def rotate(x, positions, base):
    """Rotary angles from absolute positions: coordinate i turns with coordinate i + K / 2."""
    half = x.shape[3] // 2
    rates = base ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = (positions[:, None] * rates)[:, None]  # (T, 1, half)
    one, two = x[..., :half], x[..., half:]
    return torch.cat((one * angle.cos() - two * angle.sin(), two * angle.cos() + one * angle.sin()), dim=-1)


def convolution(x, filters, segment):
    """y[t] = sum_i filters[t, i] x[t - taps + 1 + i] over t's own segment; filters (B, T, taps, C)."""
    taps, rows = filters.shape[2], []
    for t in range(x.shape[1]):
        terms = [
            filters[:, t, i] * x[:, t - taps + 1 + i]
            for i in range(taps)
            if t - taps + 1 + i >= 0 and segment[t - taps + 1 + i] == segment[t]
        ]
        rows.append(sum(terms))
    return F.silu(torch.stack(rows, dim=1))


def mixer(w, config, kind, x, past, S, segment, window):
    """One attention or fast-weight layer: x (B, T, D) behind the inputs `past`; returns y and the next S."""
    B, T, _ = x.shape
    H, K, V = config.num_heads, config.K, config.V
    full = torch.cat((past, x), dim=1)
    n = full.shape[1]

    def heads(name, source=full):
        return (source @ w[f"{name}.weight"].T).unflatten(-1, (H, -1))

    if kind == "a":
        position = torch.arange(n)
        age = position[:, None] - position
        visible = (age >= 0) & (age < (window or n)) & (segment[:, None] == segment)
        q, k = (rotate(heads(name), position, config.rope_base) for name in "qk")
        y = attention(q[:, n - T :], k, heads("v"), visible[n - T :])
        return y.flatten(2) @ w["o.weight"].T, None

    q, k, v = (heads(name).flatten(2) for name in "qkv")
    if kind == "j":
        q, k = F.silu(q), F.silu(k)
        filters = F.silu(full @ w["conv.down.weight"].T) @ w["conv.up.weight"].T + w["conv.up.bias"]
        v = convolution(v, filters.unflatten(-1, (config.conv_taps, H * V)), segment)
    else:
        qkv = torch.cat((q, k, v), dim=-1)
        q, k, v = convolution(qkv, w["conv.weight"].expand(B, n, -1, -1), segment).split(
            (H * K, H * K, H * V), dim=-1
        )
    q, k, v = (z[:, n - T :].unflatten(-1, (H, -1)) for z in (q, k, v))
    g = -w["A_log"].exp() * F.softplus(x @ w["a.weight"].T + w["dt_bias"])
    beta = (x @ w["b.weight"].T).sigmoid()
    o, S = recurrence(unit(q), unit(k), v, g, beta, S, delta=kind != "h")
    y = rms_norm(o, w["norm.weight"], 1e-5) * F.silu(heads("gate", x))
    return y.flatten(2) @ w["o.weight"].T, S


def block(w, config, i, h, past, S, segment=None, window=None):
    """Block i over h (B, T, D): the next h, the inputs its mixer has now read, the next S."""
    w = {k.removeprefix(f"layers.{i}."): x for k, x in w.items() if k.startswith(f"layers.{i}.")}
    x = rms_norm(h, w["mixer_norm.weight"], 1e-6)
    past = x[:, :0] if past is None else past
    segment = torch.zeros(past.shape[1] + x.shape[1], dtype=torch.int64) if segment is None else segment
    inner = {k.removeprefix("mixer."): z for k, z in w.items() if k.startswith("mixer.")}
    y, S = mixer(inner, config, config.pattern[i], x, past, S, segment, window)
    h = h + y
    x2 = rms_norm(h, w["mlp_norm.weight"], 1e-6)
    up = F.silu(x2 @ w["mlp.gate.weight"].T) * (x2 @ w["mlp.up.weight"].T)
    return h + up @ w["mlp.down.weight"].T, torch.cat((past, x), dim=1), S


def readout(w, h):
    return rms_norm(h, w["norm.weight"], 1e-6) @ w["head.weight"].T


def one_pass(w, config, tokens, segment=None, window=None):
    """Everything at once: one pass over the whole sequence; logits and the last fast weights.

    Keys and convolution inputs reach only their own segment, queries only their newest `window` keys, the
    recurrence runs through.  With ``segment = position // L`` it is Algorithm 1 for N = 1; with one segment
    and `window` it is sliding-window attention.
    """
    h, states = w["embedding.weight"][tokens], []
    for i in range(len(config.pattern)):
        h, _, S = block(w, config, i, h, None, None, segment, window)
        states.append(S)
    return readout(w, h), states


def keep(config, read, eviction):
    """What each block still has of its past: sliding eviction needs no dropping, older keys are masked."""
    kept = {"hard": "", "keys": "ghj", "sliding": "aghj"}[eviction]
    return [past if kind in kept else None for kind, past in zip(config.pattern, read)]


def algorithm_1(w, config, tokens, labels, window, passes, eviction="hard"):
    """Algorithm 1, equation (6): loss, logits (zeros where it slept), fast weights."""
    depth = len(config.pattern)
    first, last = config.loop or (0, depth - 1)
    key_window = window if eviction == "sliding" else None
    S, past, pieces, total, count = [None] * depth, [None] * depth, [], 0.0, 0
    for start in range(0, tokens.shape[1], window):
        chunk, asked = tokens[:, start : start + window], labels[:, start : start + window]
        awake, full = bool((asked != IGNORE).any()), chunk.shape[1] == window
        times = 1 if awake or not full or set(config.pattern) == {"a"} else passes
        h, read = w["embedding.weight"][chunk], list(past)
        order = [*range(first), *list(range(first, last + 1)) * times, *range(last + 1, depth)]
        for i in order:
            h, read[i], S[i] = block(w, config, i, h, past[i], S[i], window=key_window)
        past = keep(config, read, eviction) if awake or full else read
        logits = readout(w, h)
        if awake:
            chosen = asked != IGNORE
            total = total - logits.log_softmax(-1)[chosen].gather(-1, asked[chosen][:, None]).sum()
            count += int(chosen.sum())
        pieces.append(logits if awake else torch.zeros_like(logits))
    return total / count if count else None, torch.cat(pieces, dim=1), S


def stream(w, config, tokens, window, passes, eviction="hard"):
    """What a reader who naps after every full window says at each token, and the last fast weights."""
    depth = len(config.pattern)
    first, last = config.loop or (0, depth - 1)
    key_window = window if eviction == "sliding" else None
    S, past, pieces = [None] * depth, [None] * depth, []
    for start in range(0, tokens.shape[1], window):
        chunk = tokens[:, start : start + window]
        napping = chunk.shape[1] == window and set(config.pattern) != {"a"}
        for times in (
            (1, passes) if napping else (1,)
        ):  # awake for the answers; then asleep, from the same start
            h, read, fast = w["embedding.weight"][chunk], list(past), list(S)
            for i in [*range(first), *list(range(first, last + 1)) * times, *range(last + 1, depth)]:
                h, read[i], fast[i] = block(w, config, i, h, past[i], fast[i], window=key_window)
            if times == 1 and len(pieces) == start // window:
                pieces.append(readout(w, h))
        S = fast
        past = keep(config, read, eviction) if chunk.shape[1] == window else read
    return torch.cat(pieces, dim=1), S
