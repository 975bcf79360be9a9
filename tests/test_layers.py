"""Layers against plain PyTorch and against their own past."""

import oracles
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import close, tiny_model

import sleeplib as sl
from sleeplib import kernels, layers
from sleeplib.layers import Memory


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixer(kind):
    return tiny_model(kind).layers[0].mixer


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from("aghj"),
    cuts=st.lists(st.integers(1, 5), max_size=4),
    window=st.sampled_from([None, 3]),
)
def test_a_layer_read_in_pieces_is_the_layer_read_at_once(kind, cuts, window):
    layer, x = mixer(kind), noise(2, 9, 16)
    whole, end = layer(x, Memory(), window)
    memory, pieces, start = Memory(), [], 0
    for size in [*cuts, 9]:
        if start < 9:
            y, memory = layer(x[:, start : start + size], memory, window)
            pieces.append(y)
            start += size
    close(torch.cat(pieces, dim=1), whole)
    for a, b in ((memory.S, end.S), (memory.conv, end.conv)):
        assert (a is None) == (b is None)
        if a is not None:
            close(a, b)


@pytest.mark.parametrize("kind", "aghj")
@pytest.mark.parametrize("window", [None, 2])
def test_a_layer_is_causal(kind, window):
    layer, x = mixer(kind), noise(1, 7, 16).requires_grad_()
    y, _ = layer(x, Memory(), window)
    (seen,) = torch.autograd.grad(y[0, 3].sum(), x)
    reach = seen[0].abs().sum(dim=1) > 0
    assert reach[3] and not reach[4:].any()
    assert reach[:4].tolist() == ([False, False, True, True] if kind == "a" and window else [True] * 4)


def test_attention_is_multi_head_attention_without_positions():
    """With a base so large that no angle matters, rotary attention is PyTorch's own."""
    layer = mixer("a")
    layer.rope_base = 1e300
    x = noise(2, 6, 16)
    q, k, v = (f(x).unflatten(-1, (2, 8)).transpose(1, 2) for f in (layer.q, layer.k, layer.v))
    # The first rate is 1 whatever the base: undo its turn on coordinates 0 and 4.
    q, k = (oracles.rotate(z.transpose(1, 2), torch.arange(6), 1e300).transpose(1, 2) for z in (q, k))
    wanted = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    close(layer(x, Memory())[0], layer.o(wanted))


@pytest.mark.parametrize(
    "T, S, window", [(5, 5, None), (1, 7, None), (3, 8, None), (4, 9, 3), (6, 6, 2), (1, 9, 4)]
)
def test_attention_is_the_same_by_loops_and_by_pytorch(T, S, window, monkeypatch):
    q, k, v = (noise(2, n, 2, 4, seed=n).requires_grad_() for n in (T, S, S))
    found = []
    for short in (0, 99):
        monkeypatch.setattr(layers, "SHORT", short)
        y = layers.attend(q, k, v, window)
        found.append((y, *torch.autograd.grad(y.square().sum(), (q, k, v))))
    for a, b in zip(*found):
        close(a, b)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(start=st.integers(0, 50), shift=st.integers(0, 50))
def test_rotation_depends_on_differences_only(start, shift):
    q, k = noise(1, 3, 2, 8), noise(1, 3, 2, 8, seed=1)

    def scores(offset):
        a, b = (layers.rotate(x, offset, 100.0) for x in (q, k))
        return torch.einsum("bthk,bshk->bhts", a, b)

    close(scores(start), scores(start + shift))
    close(layers.rotate(q, start, 100.0), oracles.rotate(q, torch.arange(start, start + 3), 100.0))
    close(layers.rotate(q, start, 100.0).norm(dim=-1), q.norm(dim=-1))


def test_tables_made_without_gradients_serve_training():
    layers._rotary_table.cache_clear()
    layer, x = mixer("a"), noise(1, 3, 16)
    with torch.inference_mode():
        layer(x, Memory())
    layer(x, Memory())[0].sum().backward()
    assert layer.q.weight.grad.abs().sum() > 0


def test_unit_has_length_one_and_survives_zero():
    x = noise(2, 3, 2, 5)
    close(kernels.l2_normalize(x), oracles.unit(x))
    assert not kernels.l2_normalize(torch.zeros(1, 1, 1, 4)).any()


@pytest.mark.parametrize("taps", [1, 2, 4])
def test_short_convolution(taps):
    layer, x = layers.ShortConvolution(3, taps).double(), noise(2, 6, 3)
    y, context = layer(x, None)
    wanted = F.conv1d(F.pad(x.mT, (taps - 1, 0)), layer.weight.T.unsqueeze(1), groups=3).mT
    close(y, F.silu(wanted))
    assert torch.equal(context, x[:, 6 - (taps - 1) :])


def test_a_dynamic_convolution_starts_as_an_ordinary_one():
    layer = layers.DynamicConvolution(16, 8, 4)
    x, values = noise(2, 5, 16).float(), noise(2, 5, 8).float()
    filters = layer.up.bias.unflatten(0, (4, 8))
    wanted = F.conv1d(F.pad(values.mT, (3, 0)), filters.T.unsqueeze(1), groups=8).mT
    close(layer(values, x, None)[0], F.silu(wanted))
    layer(values, x, None)[0].sum().backward()
    assert layer.up.weight.grad.abs().sum() > 0  # the filters can learn to depend on the token


def test_decay_rates_start_between_a_thousandth_and_1_6_a_token():
    layer = sl.HybridLM(sl.ModelConfig(vocab_size=3, d_model=64, pattern="g", num_heads=16)).layers[0].mixer
    rates = layer.A_log.exp() * F.softplus(layer.dt_bias)
    assert 1e-3 < rates.min() and rates.max() < 1.6 and rates.std() > 0


def test_swiglu():
    layer, x = layers.SwiGLU(4, 6), noise(2, 3, 4).float()
    torch.nn.init.normal_(layer.down.weight)
    wanted = (F.silu(x @ layer.gate.weight.T) * (x @ layer.up.weight.T)) @ layer.down.weight.T
    close(layer(x), wanted)
