"""Every way to compute a recurrence is the same function: outputs, last state, all gradients, errors."""

import importlib.util
import math
import sys
import types
from unittest.mock import patch

import numpy as np
import oracles
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit
from tiny import close
from transformers.models.qwen3_next import modeling_qwen3_next as qwen

import sleeplib as sl
from sleeplib import kernels, layers
from sleeplib.kernels import chunked, fla, jit, reference, wy

BACKENDS = ("reference", "chunked", "wy")
RULES = {True: sl.gated_delta_rule, False: sl.gated_hebbian_rule}
NAMES = ("q", "k", "v", "g", "beta", "initial_state")
LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 130)
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def draw(T, B=2, H=2, K=4, V=6, seed=0, dtype=torch.float64):
    """Named arguments of a recurrence, all leaves that want a gradient."""
    generator = torch.Generator().manual_seed(seed)
    shapes = dict(q=(B, T, H, K), k=(B, T, H, K), v=(B, T, H, V), g=(B, T, H), beta=(B, T, H))
    shapes["initial_state"] = (B, H, K, V)
    x = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
    x["k"] = F.normalize(x["k"], dim=-1)
    x["g"], x["beta"] = -x["g"].exp() / 8, x["beta"].sigmoid()
    return {n: z.to(dtype).requires_grad_() for n, z in x.items()}


def call(rule, x, **options):
    named = {n: z for n, z in x.items() if n not in "qkv"}
    return rule(x["q"], x["k"], x["v"], **named, **options)


def oracle(x, delta, scale=None):
    x = {n: z.double() for n, z in x.items()}
    return oracles.recurrence(
        x["q"], x["k"], x["v"], x["g"], x["beta"], x.get("initial_state"), scale=scale, delta=delta
    )


def gradients(outputs, x, seed=9):
    """The gradient of a fixed random functional of the outputs, by name."""
    generator = torch.Generator().manual_seed(seed)
    total = sum((o.cpu().double() * torch.randn(o.shape, generator=generator)).sum() for o in outputs)
    names = [n for n, z in x.items() if z.requires_grad]
    return dict(zip(names, torch.autograd.grad(total, [x[n] for n in names])))


def compare(ours, truth, x, what=""):
    """Outputs, last state and every gradient against the equations, by name."""
    for name, a, b in zip(("o", "S"), ours, truth):
        close(a.cpu(), b.to(a.dtype), what=f"{what} {name}")
    found, wanted = gradients(ours, x), gradients(truth, x)
    for name in found:
        close(found[name], wanted[name], what=f"{what} d{name}")


@pytest.mark.parametrize("delta", RULES, ids=["delta", "hebbian"])
@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_are_the_equations(backend, T, delta):
    x = draw(T)
    compare(call(RULES[delta], x, backend=backend), oracle(x, delta), x)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    delta=st.booleans(),
    backend=st.sampled_from(BACKENDS),
    shape=st.tuples(*(st.integers(1, n) for n in (40, 3, 3, 5, 7))),
    scale=st.sampled_from((None, 1, 0.3, -2.0)),
    dtype=st.sampled_from((torch.float64, torch.float32)),
    seed=st.integers(0, 99),
)
def test_any_shape_and_scale(delta, backend, shape, scale, dtype, seed):
    T, B, H, K, V = shape
    x = draw(T, B, H, K, V, seed=seed, dtype=dtype)
    compare(call(RULES[delta], x, backend=backend, scale=scale), oracle(x, delta, scale), x)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(chunk=st.integers(1, 20), T=st.integers(1, 40), delta=st.booleans())
def test_the_chunk_size_changes_nothing(chunk, T, delta):
    x = draw(T)
    ours = chunked.recurrence(*x.values(), x["q"].shape[3] ** -0.5, delta, chunk=chunk)
    compare(ours, oracle(x, delta), x)


@pytest.mark.parametrize("delta", RULES, ids=["delta", "hebbian"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_without_an_initial_state_it_starts_from_zeros(backend, delta):
    x = draw(19)
    zeros = x | {"initial_state": torch.zeros_like(x["initial_state"])}
    del x["initial_state"]
    for a, b in zip(call(RULES[delta], x, backend=backend), oracle(zeros, delta)):
        close(a, b)


@pytest.mark.parametrize("delta", RULES, ids=["delta", "hebbian"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cut_anywhere_changes_nothing(backend, delta):
    x = draw(30)
    whole = call(RULES[delta], x, backend=backend)
    for cut in (1, 13, 16, 29):
        first, second = ({n: z[:, part] for n, z in x.items()} for part in (slice(cut), slice(cut, None)))
        first["initial_state"] = x["initial_state"]
        o1, second["initial_state"] = call(RULES[delta], first, backend=backend)
        o2, S = call(RULES[delta], second, backend=backend)
        close(torch.cat((o1, o2), dim=1), whole[0])
        close(S, whole[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_matter(backend):
    x = draw(17)
    for name, z in x.items():
        wide = z.detach().repeat_interleave(2, dim=-1)
        strided = wide[..., ::2] if name != "v" else z.detach().transpose(1, 2).contiguous().transpose(1, 2)
        assert not strided.is_contiguous()
        x[name] = strided.requires_grad_()
    compare(call(sl.gated_delta_rule, x, backend=backend), oracle(x, True), x)


@pytest.mark.parametrize("delta", RULES, ids=["delta", "hebbian"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("g", [0.0, -1e-30, -90.0, -1e30, -math.inf, "mixed"])
def test_any_decay_is_safe(g, dtype, backend, delta):
    x = draw(70, dtype=dtype)
    if g == "mixed":
        generator = torch.Generator().manual_seed(0)
        values = torch.tensor([0.0, -1e-3, -1.0, -1e30, -math.inf])
        g = values[torch.randint(5, x["g"].shape, generator=generator)]
    else:
        g = torch.full(x["g"].shape, g)
    x["g"] = g.to(dtype).requires_grad_()
    compare(call(RULES[delta], x, backend=backend), oracle(x, delta), x)


@pytest.mark.parametrize("delta", RULES, ids=["delta", "hebbian"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_of_a_strong_decay_is_as_small_as_it_must_be(backend, delta):
    """Relative to itself: a chain rule multiplies it by 1 / alpha, and noise with it."""
    for g in (-5.0, -20.0, -math.inf):
        x = draw(40, K=8, V=16, dtype=torch.float32)
        x["g"] = torch.full_like(x["g"], g).requires_grad_()
        found = gradients(call(RULES[delta], x, backend=backend), x)["g"].double()
        wanted = gradients(oracle(x, delta), x)["g"].double()
        if g == -math.inf:
            assert not found.any() and not wanted.any()
        else:
            assert float((found - wanted).norm() / wanted.norm()) < 1e-4


@pytest.mark.parametrize("backend", ["reference", "wy"])  # the others' way back is PyTorch's own
def test_autocast_may_be_on_in_the_backward_pass(backend):
    x = draw(40, dtype=torch.float32)
    truth = gradients(call(sl.gated_delta_rule, x, backend=backend), x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(call(sl.gated_delta_rule, x, backend=backend), x)
    for name in truth:
        close(found[name], truth[name], what=name)


def test_autocast_changes_norms_that_a_product_would_round_and_no_others():
    for kind, low, wanted in (
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float16, torch.float32),
        (torch.float64, torch.bfloat16, torch.float64),
    ):
        x, w = noise(3, 5, 8, dtype=kind), noise(8, dtype=kind)
        with torch.autocast("cpu", dtype=low):
            y = kernels.rms_norm(x, w, 1e-6)
        truth = kernels.rms_norm(x, w, 1e-6)
        assert y.dtype == wanted and truth.dtype == kind
        close(y, truth.to(wanted))
        weight = torch.ones_like(truth)
        for a, b in zip(
            torch.autograd.grad(y, (x, w), weight.to(wanted)), torch.autograd.grad(truth, (x, w), weight)
        ):
            close(a, b)


@pytest.mark.parametrize("numba", [True, False])
@pytest.mark.parametrize("window", [None, 5])
def test_attention_stays_in_float32_under_autocast(numba, window):
    q, k, v = (noise(2, 20, 2, 8, seed=i, dtype=torch.float32) for i in range(3))
    ages = torch.arange(20, 0, -1)
    with kernels.use_numba(numba):
        truth = layers.attend(q, k, v, window)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for given in (None, ages):
                close(layers.attend(q, k, v, window, given), truth)


def test_a_small_decay_after_a_large_one_is_resolved():
    """exp(G_i - G_j) is a difference of running sums: a large common part must cancel exactly."""
    x = draw(64, dtype=torch.float32)
    g = torch.full(x["g"].shape, -1e-4)
    g[:, 3] = -99.0
    x["g"] = g.requires_grad_()
    compare(call(sl.gated_delta_rule, x, backend="chunked"), oracle(x, True), x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_inputs_keep_a_float32_state(backend):
    x = draw(40, dtype=torch.bfloat16)
    x["initial_state"] = x["initial_state"].detach().float()
    x["g"], x["beta"] = x["g"].detach().float(), x["beta"].detach().float()
    o, S = call(sl.gated_delta_rule, x, backend=backend)
    # `compare` holds S to the tolerance of its own dtype: as exact as float32, whatever the inputs.
    assert o.dtype == torch.bfloat16 and S.dtype == torch.float32
    compare((o, S), oracle(x, True), x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_reach_the_state(backend):
    x = draw(20, dtype=torch.float32)
    plain = call(sl.gated_delta_rule, x, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = call(sl.gated_delta_rule, x, backend=backend)
    for a, b in zip(cast, plain):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_and_state_are_left_alone(backend):
    x = draw(20)
    before = {n: z.detach().clone() for n, z in x.items()}
    gradients(call(sl.gated_delta_rule, x, backend=backend), x)
    for name, z in x.items():
        assert torch.equal(z, before[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("delta", RULES, ids=["delta", "hebbian"])
def test_gradcheck(backend, delta):
    x = draw(5, B=1, H=2, K=2, V=3)

    def f(q, k, v, g, beta, S):
        # `g` is nudged by gradcheck: validation would mind a decay nudged above 0
        return RULES[delta](q, k, v, g=g, beta=beta, initial_state=S, backend=backend, validate=False)

    assert torch.autograd.gradcheck(f, tuple(x.values()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "truth", [qwen.torch_recurrent_gated_delta_rule, qwen.torch_chunk_gated_delta_rule], ids=["loop", "chunk"]
)
def test_transformers_agrees(truth, backend):
    x = {n: z.detach() for n, z in draw(65, dtype=torch.float32).items()}
    theirs = truth(
        **{n: x[n] for n in ("g", "beta", "initial_state")},
        **dict(query=x["q"], key=x["k"], value=x["v"]),
        output_final_state=True,
        use_qk_l2norm_in_kernel=False,
    )
    for a, b in zip(call(sl.gated_delta_rule, x, backend=backend), theirs):
        close(a, b)


# Which path ran


@pytest.mark.parametrize(
    "T, K, V, backend, wanted",
    [
        (9, 4, 6, "auto", "reference"),
        (9, 64, 64, "auto", "reference"),
        (8, 64, 65, "auto", "reference"),
        (9, 64, 65, "auto", "wy"),
        (3, 4, 6, "wy", "wy"),
        (3, 4, 6, "chunked", "chunked"),
        (9, 64, 65, "reference", "reference"),
        (3, 4, 6, "fla", "fla"),
    ],
)
def test_the_path_that_was_asked_for_runs_once(monkeypatch, T, K, V, backend, wanted):
    ran, honest = [], chunked.recurrence

    def spy(name):
        def recurrence(*args):
            ran.append(name)
            return honest(*args)

        return recurrence

    for name, module in (("reference", reference), ("chunked", chunked), ("wy", wy), ("fla", fla)):
        monkeypatch.setattr(module, "recurrence", spy(name))
    x = {n: z.detach() for n, z in draw(T, B=1, H=1, K=K, V=V, dtype=torch.float32).items()}
    call(sl.gated_delta_rule, x, backend=backend)
    assert ran == [wanted]


@pytest.mark.skipif(importlib.util.find_spec("fla") is not None, reason="fla is installed")
def test_without_fla_the_error_says_what_to_install():
    with pytest.raises(ImportError, match="pip install flash-linear-attention"):
        call(sl.gated_delta_rule, draw(3), backend="fla")


@pytest.mark.parametrize("delta", RULES, ids=["delta", "hebbian"])
def test_fla_gets_no_infinite_decay(monkeypatch, delta):
    """Its chunk kernels subtract running sums of g."""
    given = []
    for path, name in (("gated_delta_rule", "chunk_gated_delta_rule"), ("simple_gla", "chunk_simple_gla")):
        module = types.ModuleType(f"fla.ops.{path}")
        setattr(module, name, lambda *args, g, **options: given.append(g))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    q = types.SimpleNamespace(device=torch.device("cuda"))
    g, v = torch.tensor([[[-math.inf], [-3.0]]]), torch.ones(1, 2, 1, 2)
    fla.recurrence(q, q, v, g, torch.ones(1, 2, 1), None, 1.0, delta)
    (g,) = given
    assert g.isfinite().all() and g.exp()[0, 0, 0] < 1e-40 and g[0, 1, 0] == -3


# Bad input


def bad(**changes):
    x = {n: z.detach() for n, z in draw(6).items()}
    return x | {n: (f(x[n]) if callable(f) else f) for n, f in changes.items()}


def set_one(value):
    def change(g):
        g = g.clone()
        g[0, 3, 1] = value
        return g

    return change


@pytest.mark.parametrize("rule", RULES.values(), ids=["delta", "hebbian"])
@pytest.mark.parametrize(
    "error, names, changes",
    [
        (ValueError, "q must have shape", dict(q=lambda x: x[0])),
        (ValueError, "q must have shape", dict(q=lambda x: x[:, :0])),
        (ValueError, "k must have shape", dict(k=lambda x: x[..., :3])),
        (ValueError, "k must have shape", dict(k=lambda x: x[:1])),  # would broadcast
        (ValueError, "v must have shape", dict(v=lambda x: x[:, :5])),
        (ValueError, "v must have shape", dict(v=lambda x: x[..., 0])),
        (ValueError, "v must have shape", dict(v=lambda x: x[..., :0])),
        (ValueError, "g must have shape", dict(g=lambda x: x[..., :1])),  # would broadcast
        (ValueError, "g must have shape", dict(g=lambda x: x.unsqueeze(-1))),
        (ValueError, "beta must have shape", dict(beta=lambda x: x[:1])),
        (ValueError, "initial_state must have shape", dict(initial_state=lambda x: x.transpose(2, 3))),
        (ValueError, "initial_state must have shape", dict(initial_state=lambda x: x[:1])),
        (TypeError, "q must be a floating-point tensor; got list", dict(q=lambda x: x.tolist())),
        (TypeError, "v must be .* got torch.int64", dict(v=lambda x: x.long())),
        (TypeError, "beta must be .* got float", dict(beta=0.5)),
        (TypeError, "initial_state must be", dict(initial_state=0)),
        (TypeError, "k is torch.float32", dict(k=lambda x: x.float())),
        (TypeError, "g is torch.float32", dict(g=lambda x: x.float())),
        (TypeError, "initial_state is torch.float32", dict(initial_state=lambda x: x.float())),
        (ValueError, "^g: ", dict(g=set_one(math.nan))),
        (ValueError, "^g: ", dict(g=set_one(1e-9))),
        (ValueError, "^g: ", dict(g=set_one(math.inf))),
        (ValueError, "scale must be", dict(scale=math.nan)),
        (ValueError, "scale must be", dict(scale="1")),
        (ValueError, "backend must be one of auto, reference", dict(backend="cuda")),
    ],
)
def test_bad_input_names_the_argument(rule, error, names, changes):
    with pytest.raises(error, match=names):
        call(rule, bad(**changes))


def test_a_double_state_goes_with_double_inputs_only():
    x = {n: z.detach().float() for n, z in draw(6).items()}
    with pytest.raises(TypeError, match="initial_state is torch.float64"):
        call(sl.gated_delta_rule, x | {"initial_state": x["initial_state"].double()})


def test_validation_can_be_switched_off():
    x = bad(g=set_one(0.1))
    o, _ = call(sl.gated_delta_rule, x, validate=False)
    close(o, oracle(x, True)[0])


# The other kernels


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    T=st.integers(1, 9),
    cached=st.integers(0, 9),
    window=st.one_of(st.none(), st.integers(1, 12)),
    scale=st.sampled_from((None, 0.7)),
    dtype=st.sampled_from((torch.float32, torch.float64)),
)
def test_softmax_attention(T, cached, window, scale, dtype):
    generator = torch.Generator().manual_seed(T)
    q = torch.randn(2, T, 2, 4, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    k, v = (torch.randn(2, cached + T, 2, n, generator=generator, dtype=torch.float64) for n in (4, 3))
    k, v = (x.to(dtype).requires_grad_() for x in (k, v))
    age = torch.arange(cached, cached + T)[:, None] - torch.arange(cached + T)
    visible = (age >= 0) & (age < (window or 99))
    ours = kernels.softmax_attention(q, k, v, sliding_window=window, scale=scale)
    truth = oracles.attention(*(x.double() for x in (q, k, v)), visible, scale).to(dtype)
    agree_with_torch(ours, truth, (q, k, v))


@pytest.mark.parametrize(
    "names, shapes, window",
    [
        ("q must have shape", [(2, 3, 4), (2, 3, 2, 4), (2, 3, 2, 4)], None),
        ("k must have a key", [(2, 3, 2, 4), (2, 2, 2, 4), (2, 2, 2, 4)], None),
        ("k must have shape", [(2, 3, 2, 4), (1, 3, 2, 4), (2, 3, 2, 4)], None),
        ("v must have shape", [(2, 3, 2, 4), (2, 3, 2, 4), (2, 4, 2, 4)], None),
        ("sliding_window must be", [(2, 3, 2, 4)] * 3, 0),
    ],
)
def test_softmax_attention_minds_its_arguments(names, shapes, window):
    with pytest.raises(ValueError, match=names):
        kernels.softmax_attention(*(torch.zeros(s) for s in shapes), sliding_window=window)


def agree_with_torch(ours, truth, leaves):
    close(ours, truth)
    dy = torch.randn(ours.shape, generator=torch.Generator().manual_seed(3)).to(ours.dtype)
    pairs = zip(torch.autograd.grad(ours, leaves, dy), torch.autograd.grad(truth, leaves, dy))
    for a, b in pairs:
        close(a, b)


PRECISIONS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def noise(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def test_exp_in_float32_is_right_to_seven_digits_and_keeps_nan():
    @njit
    def apply(x, y):
        for i in range(len(x)):
            y[i] = jit.exp(x[i])

    x = np.linspace(-86, 88, 100_001).astype(np.float32)
    y = np.empty_like(x)
    apply(x, y)
    assert (np.abs(y / np.exp(x.astype(np.float64)) - 1) < 3e-7).all()
    apply(np.array([-np.inf, -1e30, np.nan, np.inf], np.float32), y)
    assert 0 <= y[0] < 1e-37 and 0 <= y[1] < 1e-37 and np.isnan(y[2]) and y[3] > 1e38


@PRECISIONS
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "context"])
@pytest.mark.parametrize(
    "B, taps, T, form", [(3, 1, 3, ""), (3, 4, 1, ""), (9, 4, 9, "part"), (3, 2, 70, "odd")]
)
def test_causal_convolution(dtype, B, taps, T, form, given, silu):
    x = noise(B, T, 5, dtype=dtype)
    ours = x
    if form == "part":  # columns of something wider, as the layers cut them
        x = noise(B, T, 9, dtype=dtype)
        ours = x[..., 2:7]
    elif form == "odd":
        x = x.detach().mT.contiguous().mT.requires_grad_()
        ours = x
    weight, context = noise(taps, 5, seed=1, dtype=dtype), noise(B, taps - 1, 5, seed=2, dtype=dtype)
    before = context if given else torch.zeros_like(context)
    truth = F.conv1d(torch.cat((before, ours), 1).mT, weight.T.unsqueeze(1), groups=5).mT
    truth = F.silu(truth) if silu else truth
    result = kernels.causal_convolution(ours, weight, context if given else None, silu)
    agree_with_torch(result, truth, (x, weight, context) if given and taps > 1 else (x, weight))


@PRECISIONS
@pytest.mark.parametrize("shape", [(7,), (1, 5), (2, 65, 6), (3, 2, 70, 1)], ids=str)
def test_rms_norm(dtype, shape):
    x, weight = noise(*shape, dtype=dtype), noise(shape[-1], seed=1, dtype=dtype)
    truth = F.rms_norm(x, weight.shape, weight, 1e-3)
    agree_with_torch(kernels.rms_norm(x, weight, 1e-3), truth, (x, weight))


@PRECISIONS
@pytest.mark.parametrize("B, T, H, n", [(1, 1, 1, 3), (2, 1, 2, 5), (2, 70, 3, 4), (1, 3, 70, 2)])
@pytest.mark.parametrize("part", [False, True])
def test_gated_rms_norm(dtype, B, T, H, n, part):
    x, weight = noise(B, T, H, n, dtype=dtype), noise(n, seed=1, dtype=dtype)
    wide = noise(B, T, H * n + 3 * part, seed=2, dtype=dtype)
    gate = wide[..., 2 * part : H * n + 2 * part].unflatten(-1, (H, n))
    truth = F.rms_norm(x, (n,), weight, 1e-3) * F.silu(gate)
    agree_with_torch(kernels.rms_norm(x, weight, 1e-3, gate), truth, (x, weight, wide))


@PRECISIONS
@pytest.mark.parametrize("B, T, H, K, V", [(1, 1, 1, 1, 1), (2, 3, 2, 4, 6), (3, 40, 3, 2, 3)])
def test_split_heads(dtype, B, T, H, K, V):
    x = noise(B, T, H * (2 * K + V), dtype=dtype)
    q, k, v = x.split((H * K, H * K, H * V), dim=-1)
    truth = *(oracles.unit(z.unflatten(-1, (H, K))) for z in (q, k)), v.unflatten(-1, (H, V))
    joined = (torch.cat([z.flatten(2) for z in part], -1) for part in (kernels.split_heads(x, H, K), truth))
    agree_with_torch(*joined, (x,))


@PRECISIONS
@pytest.mark.parametrize("shape", [(2,), (3, 8), (2, 40, 70)], ids=str)
def test_swiglu(dtype, shape):
    x = noise(*shape, dtype=dtype)
    gate, up = x.chunk(2, dim=-1)
    agree_with_torch(kernels.swiglu(x), F.silu(gate) * up, (x,))


@PRECISIONS
def test_rotation_of_a_part(dtype):
    x, (cos, sin) = noise(2, 9, 3, 4, 6, dtype=dtype), layers._rotary_table(9, 6, 100.0, dtype)
    for part in x.unbind(2):
        truth = oracles.rotate(part, torch.arange(9), 100.0).to(dtype)
        agree_with_torch(kernels.apply_rotary(part, cos, sin), truth, (x,))


def test_low_precision_takes_the_other_path_to_the_same_place():
    generator = torch.Generator().manual_seed(0)
    x, context = (torch.randn(2, n, 6, generator=generator).bfloat16() for n in (9, 3))
    weight = torch.randn(4, 6, generator=generator).bfloat16()
    low = dict(
        conv=kernels.causal_convolution(x, weight, context, silu=True),
        norm=kernels.rms_norm(x, weight[0].float(), 1e-6, x),
    )
    wide = x.float(), weight.float(), context.float()
    high = dict(
        conv=kernels.causal_convolution(*wide, silu=True),
        norm=kernels.rms_norm(wide[0], wide[1][0], 1e-6, wide[0]),
    )
    low["swiglu"], high["swiglu"] = kernels.swiglu(x), kernels.swiglu(wide[0])
    low["heads"], high["heads"] = (
        torch.cat([z.flatten(2) for z in kernels.split_heads(y, 1, 2)], -1) for y in (x, wide[0])
    )
    cos, sin = layers._rotary_table(9, 6, 100.0, torch.float32)
    low["turn"], high["turn"] = (
        kernels.apply_rotary(y.unsqueeze(2), cos.to(y.dtype), sin.to(y.dtype)) for y in (x, wide[0])
    )
    for name in low:
        close(low[name], high[name].bfloat16(), what=name)


def test_bits_of_bfloat16_are_rounded_as_pytorch_rounds_them():
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=generator, dtype=torch.int64).to(torch.int32)
    halfway = bits & ~0xFFFF | 0x8000  # as near to one as to the other
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, 3.4e38, -3.4e38, 1e-45, 1e-38])
    x = torch.cat((bits.view(torch.float32), halfway.view(torch.float32), special))

    @njit(**jit.NUMBA_OPTIONS)
    def there(x, low):
        for i in range(len(x)):
            low[i] = jit.narrow(x[i], low)

    @njit(**jit.NUMBA_OPTIONS)
    def back(low, x):
        for i in range(len(x)):
            x[i] = jit.wide(low[i])

    low, again = np.empty(len(x), np.uint16), np.empty(len(x), np.float32)
    there(x.numpy(), low)
    back(low, again)
    wanted = x.bfloat16().float()
    found = torch.from_numpy(again)
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found[~wanted.isnan()], wanted[~wanted.isnan()])


def test_bfloat16_kernels_are_the_equations_of_what_they_get():
    """Values and gradients, each in the precision of what it belongs to."""
    x, w, gate, context = noise(2, 9, 4, 6), noise(6), noise(2, 9, 4, 6), noise(2, 3, 24)
    flat, taps = x.detach().flatten(2).requires_grad_(), noise(4, 24)
    convolve = kernels.causal_convolution
    cases = dict(
        swiglu=(kernels.swiglu, (gate,), (True,)),
        norm=(lambda x, w, z: kernels.rms_norm(x, w, 1e-6, z), (x, w, gate), (False, False, True)),
        conv=(lambda x, w, c: convolve(x, w, c, True), (flat, taps, context), (True, False, True)),
        bare=(convolve, (flat, taps), (True, False)),
    )
    for name, (f, tensors, low) in cases.items():
        rounded = [z.detach().bfloat16() if is_low else z.detach().float() for z, is_low in zip(tensors, low)]
        rounded = [z.requires_grad_() for z in rounded]
        exact = [z.detach().double().requires_grad_() for z in rounded]
        ours = f(*rounded)
        assert type(ours.grad_fn).__name__ in (
            "_SwiGLUBackward",
            "_RMSNormBackward",
            "_ConvolutionBackward",
        ), name
        truth = f(*exact)
        weight = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1)).to(ours.dtype)
        close(ours, truth.to(ours.dtype), 4e-3 if ours.dtype == torch.bfloat16 else 1e-5, what=name)
        found = torch.autograd.grad(ours, rounded, weight)
        wanted = torch.autograd.grad(truth, exact, weight.double())
        for a, b, z in zip(found, wanted, rounded):
            assert a.dtype == z.dtype
            close(a, b.to(a.dtype), 4e-3 if a.dtype == torch.bfloat16 else 1e-5, what=f"{name} {z.dtype}")


@pytest.fixture
def many_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_threads_share_the_work_and_change_nothing(many_threads):
    x = draw(19, B=13, H=3, dtype=torch.float32)

    def everything():
        both = [call(sl.gated_delta_rule, x, backend=name) for name in ("reference", "wy")]
        return *both[0], *both[1], *(z for o in both for z in gradients(o, x).values())

    calls = []
    with patch.object(jit, "GRAIN", 1):
        shared = everything()
        jit.launch(lambda first, last, y: calls.append((first, last)), 37, torch.zeros(5))
    assert len(calls) > 3 and sorted(i for part in calls for i in range(*part)) == list(range(37))
    torch.set_num_threads(1)
    for a, b in zip(shared, everything(), strict=True):
        assert torch.equal(a, b)


def test_a_fault_in_a_thread_is_not_swallowed(many_threads):
    def fault(first, last, x):
        if first > 0:
            raise ZeroDivisionError

    with patch.object(jit, "GRAIN", 1), pytest.raises(ZeroDivisionError):
        jit.launch(fault, 12, torch.zeros(5))


# On a GPU


@cuda
@pytest.mark.cuda
@pytest.mark.parametrize("delta", RULES, ids=["delta", "hebbian"])
@pytest.mark.parametrize("T", (1, 17, 64, 130))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_chunked_on_cuda_is_the_reference(T, delta, dtype):
    x = draw(T, dtype=dtype)
    y = {n: z.cuda() for n, z in x.items()}
    compare(call(RULES[delta], y, backend="chunked"), call(RULES[delta], x, backend="reference"), x)


@cuda
@pytest.mark.cuda
def test_on_cuda_the_values_of_g_are_checked_when_asked():
    x = {n: z.detach().cuda() for n, z in draw(6).items()}
    x["g"][0, 0, 0] = math.nan
    call(sl.gated_delta_rule, x)
    with pytest.raises(ValueError, match="^g: "):
        call(sl.gated_delta_rule, x, validate=True)
    with pytest.raises(ValueError, match="backend='reference' runs on the CPU only"):
        call(sl.gated_delta_rule, x | {"g": -x["g"].abs().nan_to_num(1.0)}, backend="reference")
    with pytest.raises(ValueError, match="k is on cpu"):
        call(sl.gated_delta_rule, x | {"k": x["k"].cpu()})


@cuda
@pytest.mark.cuda
@pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="fla is not installed")
@pytest.mark.parametrize("delta", RULES, ids=["delta", "hebbian"])
def test_fla_is_the_reference(delta):
    x = {n: z.detach() for n, z in draw(70, K=32, V=32, dtype=torch.bfloat16).items()}
    x |= {n: x[n].float() for n in ("g", "beta", "initial_state")}
    ours = call(RULES[delta], {n: z.cuda() for n, z in x.items()}, backend="fla")
    for a, b in zip(ours, oracle(x, delta)):
        close(a.cpu().bfloat16(), b.bfloat16())
