"""Models and sequences small enough to test, and the one tolerance of each dtype."""

import torch

import sleeplib as sl

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2}
WINDOW, VOCAB = 5, 6


def close(a, b, tolerance=None, what=""):
    """Assert that two tensors have one shape and dtype, and values that differ by at most its tolerance."""
    assert a.shape == b.shape, f"{what} shapes {tuple(a.shape)} and {tuple(b.shape)}"
    assert a.dtype == b.dtype, f"{what} dtypes {a.dtype} and {b.dtype}"
    tolerance = tolerance or TOLERANCE[a.dtype]
    size = max(1.0, float(b.detach().abs().max()))
    error = float((a.detach() - b.detach()).abs().max())
    assert error <= tolerance * size, f"{what} off by {error:.3g}, size {size:.3g}"  # a NaN fails too


def tiny_model(pattern="agag", loop=None, seed=0, dtype=torch.float64, **settings):
    """A model in which every weight matters: nothing starts at zero."""
    settings = (
        dict(vocab_size=VOCAB, d_model=16, num_heads=2, key_size=4, value_size=8, mlp_size=16) | settings
    )
    model = sl.HybridLM(sl.ModelConfig(pattern=pattern, loop=loop, **settings)).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            if name.endswith("norm.weight"):
                p.copy_(1 + 0.2 * noise)
            elif name.endswith(("A_log", "dt_bias")):
                p.copy_(0.5 * noise - 0.5)
            else:
                p.copy_(noise if name.startswith("embedding") else 0.3 * noise)
    return model.to(dtype)


def weights(model, grad=False):
    """The model as the oracles read it: float64 tensors by name, leaves of their own."""
    return {k: v.detach().clone().double().requires_grad_(grad) for k, v in model.state_dict().items()}


def sequence(length, batch=2, seed=0, vocab=VOCAB):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab, (batch, length), generator=generator)


def labels_at(tokens, positions, seed=1):
    """Labels at some positions, -100 elsewhere."""
    labels = torch.full_like(tokens, -100)
    labels[:, positions] = sequence(tokens.shape[1], tokens.shape[0], seed)[:, positions]
    return labels
