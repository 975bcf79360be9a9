"""Without Numba: the plain form is the same function, can be differentiated twice, traced and exported."""

import os
import subprocess
import sys
import warnings

import pytest
import test_kernels
import torch
from test_kernels import RULES, call, compare, draw, oracle
from tiny import close, sequence, tiny_model

import sleeplib as sl
from sleeplib import kernels
from sleeplib.kernels import jit


@pytest.fixture
def off():
    with kernels.use_numba(False):
        yield


def spy_on_launches(monkeypatch):
    calls = []
    for module in ("attention", "convolution", "gate", "norm", "reference", "wy"):
        module = sys.modules[f"sleeplib.kernels.{module}"]
        monkeypatch.setattr(module, "launch", lambda *args: calls.append(args) or jit.launch(*args))
    return calls


@pytest.mark.parametrize("delta", RULES, ids=["delta", "hebbian"])
@pytest.mark.parametrize("backend", ["auto", "reference", "chunked", "wy"])
def test_every_backend_is_the_equations_without_numba(off, backend, delta, monkeypatch):
    launched = spy_on_launches(monkeypatch)
    x = draw(19)
    compare(call(RULES[delta], x, backend=backend), oracle(x, delta), x)
    assert not launched


def test_one_switch_turns_every_kernel_off_and_on(monkeypatch):
    launched = spy_on_launches(monkeypatch)
    model, tokens = tiny_model("agj"), sequence(4)

    def read():
        logits, _ = model(tokens, model.initial_state(2))
        return logits, *torch.autograd.grad(logits.square().sum(), list(model.parameters()))

    fast = read()
    assert {call[0].py_func.__module__.split(".")[-1] for call in launched} == {
        "attention",
        "convolution",
        "gate",
        "norm",
        "reference",
    }
    launched.clear()
    with kernels.use_numba(False):
        plain = read()
    assert not launched and jit.use_numba.on
    for a, b in zip(fast, plain):
        close(a, b)


def test_the_switch_holds_until_it_is_turned_again():
    try:
        kernels.use_numba(False)
        assert not kernels.compiled(torch.ones(2))
        with kernels.use_numba(True):
            assert kernels.compiled(torch.ones(2))
        assert not kernels.compiled(torch.ones(2))
    finally:
        kernels.use_numba(True)
    with pytest.raises(TypeError, match="^on must be"):
        kernels.use_numba(0)


@pytest.mark.parametrize("value, wanted", [("0", "False"), ("1", "True")])
def test_the_environment_sets_the_switch(value, wanted):
    code = "import torch; from sleeplib.kernels import compiled; print(compiled(torch.ones(2)))"
    env = os.environ | {"SLEEPLIB_NUMBA": value}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == wanted


def test_who_is_compiled():
    x = torch.ones(2, 2)
    odd = dict(half=x.half(), integers=x.long(), meta=x.to("meta"), sparse=x.to_sparse(), empty=x[:0])
    odd["negated"] = torch.complex(x, x).conj().imag
    assert kernels.compiled(x, None, torch.nn.Parameter(x)) and kernels.compiled(x.double())
    for name, y in odd.items():
        assert not kernels.compiled(y) and not kernels.compiled(x, y), name
    assert not kernels.compiled(x, x.double())
    with torch._subclasses.FakeTensorMode():
        assert not kernels.compiled(torch.ones(2))
    torch.func.vmap(lambda row: row * (not kernels.compiled(row)))(x)


@pytest.mark.parametrize("delta", RULES, ids=["delta", "hebbian"])
@pytest.mark.parametrize("backend", ["auto", "chunked", "wy", "reference"])
def test_rules_can_be_differentiated_twice(off, backend, delta):
    x = draw(3, B=1, H=1, K=2, V=2)

    def f(q, k, v, g, beta, S):
        return RULES[delta](q, k, v, g=g, beta=beta, initial_state=S, backend=backend, validate=False)

    assert torch.autograd.gradgradcheck(f, tuple(x.values()))


def curvature(f, model):
    """A Hessian-vector product, and the same by a difference of gradients."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(0)
    along = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    first = torch.autograd.grad(f(), parameters, create_graph=True)
    second = torch.autograd.grad(sum((g * a).sum() for g, a in zip(first, along)), parameters)
    step, sides = 1e-6, []
    for sign in (1, -1):
        with torch.no_grad():
            for p, a in zip(parameters, along):
                p += sign * step * a
        sides.append(torch.autograd.grad(f(), parameters))
        with torch.no_grad():
            for p, a in zip(parameters, along):
                p -= sign * step * a
    return second, [(a - b) / (2 * step) for a, b in zip(*sides)]


@pytest.mark.parametrize("asleep", [False, True], ids=["awake", "asleep"])
def test_a_model_can_be_differentiated_twice(off, asleep):
    model, tokens = tiny_model("ahgj", mlp_size=4), sequence(4)

    def f():
        state = model.initial_state(2)
        if asleep:
            state = sl.sleep(model, tokens, state, passes=2)
        return model(tokens, state)[0].square().mean()

    for a, b in zip(*curvature(f, model)):
        close(a, b, tolerance=1e-5)


def test_with_numba_a_second_derivative_is_refused_clearly():
    x = draw(3)
    (first,) = torch.autograd.grad(call(sl.gated_delta_rule, x)[0].square().sum(), x["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("numba", [True, False])
def test_an_awake_pass_is_one_graph(numba):
    model, tokens = tiny_model("agj"), sequence(4)
    state = model.initial_state(2)
    torch._dynamo.reset()
    with kernels.use_numba(numba), warnings.catch_warnings():
        warnings.simplefilter("error")
        graph = torch.compile(model, fullgraph=True, backend="eager")
        wanted, after = model(tokens, state)
        logits, following = graph(tokens, state)
        close(logits, wanted)
        for a, b in zip(following.fast_weights, after.fast_weights):
            assert a is b is None or close(a, b) is None
        parameters = list(model.parameters())
        for a, b in zip(*(torch.autograd.grad(x.square().sum(), parameters) for x in (logits, wanted))):
            close(a, b)


class Awake(torch.nn.Module):
    """An awake pass from the fast weights alone, as tensors in and tensors out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens, *fast):
        logits, state = self.model(tokens, sl.LMState(fast))
        return logits, *(S for S in state.fast_weights if S is not None)


@pytest.mark.parametrize("strict", [True, False])
def test_an_awake_pass_can_be_exported(strict):
    sl.layers._rotary_table.cache_clear()  # a traced table kept for later would hold no numbers
    model, tokens = tiny_model("agj"), sequence(4)
    example = tokens, *model.initial_state(2).fast_weights
    program = torch.export.export(Awake(model), example, strict=strict)
    for a, b in zip(program.module()(*example), Awake(model)(*example)):
        close(a, b)


@pytest.mark.parametrize("numba", [True, False])
def test_a_model_made_in_float64_runs(numba):
    torch.set_default_dtype(torch.float64)
    try:
        with kernels.use_numba(numba):
            model = sl.HybridLM(sl.ModelConfig(vocab_size=6, d_model=16, pattern="aghj", num_heads=2))
            tokens = sequence(4)
            state = sl.sleep(model, tokens, model.initial_state(2), passes=2)
            logits, state = model(tokens, state)
            logits.sum().backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert logits.dtype == state.fast_weights[1].dtype == model.head.weight.grad.dtype == torch.float64


# What a NaN reaches


@pytest.mark.parametrize("delta", RULES, ids=["delta", "hebbian"])
@pytest.mark.parametrize("name", ["q", "k", "v", "beta", "initial_state"])
@pytest.mark.parametrize("backend", test_kernels.BACKENDS)
def test_a_nan_reaches_what_it_reaches_in_truth(backend, name, delta):
    x = {n: z.detach() for n, z in draw(70, dtype=torch.float32).items()}
    x[name][(0, 1, 0, 2) if name == "initial_state" else (0, 66, 1, 2)[: x[name].ndim]] = torch.nan
    for a, b in zip(call(RULES[delta], x, backend=backend), oracle(x, delta)):
        assert torch.equal(a.isnan(), b.isnan())
        assert a.isnan().any() == (name != "q" or a.shape[1] == 70)


@pytest.mark.parametrize("delta", RULES, ids=["delta", "hebbian"])
def test_a_state_in_any_memory_comes_back_whole(delta):
    x = draw(5)
    x["initial_state"] = x["initial_state"].detach().mT.contiguous().mT.requires_grad_()
    for numba in (True, False):
        with kernels.use_numba(numba):
            compare(call(RULES[delta], x, backend="reference"), oracle(x, delta), x)


def test_a_gradient_in_any_memory_is_read_right():
    x, weight = test_kernels.noise(5, 7), test_kernels.noise(7, seed=1)
    c = test_kernels.noise(7, 5, seed=2).detach()
    truth = torch.nn.functional.rms_norm(x, (7,), weight, 1e-3)
    pairs = (
        torch.autograd.grad((y.mT * c).sum(), (x, weight)) for y in (kernels.rms_norm(x, weight, 1e-3), truth)
    )
    for a, b in zip(*pairs):
        close(a, b)


def test_tables_that_want_a_gradient_get_one():
    x, angle = test_kernels.noise(1, 3, 2, 4), test_kernels.noise(3, 2, seed=1)
    y = kernels.apply_rotary(x, angle.cos(), angle.sin())
    (found,) = torch.autograd.grad(y.square().sum() + y[0, 1, 0, 0], angle)
    assert found[1].abs().sum() > 0


@pytest.mark.parametrize("scale", [torch.tensor(0.5), 0.5, jit.np.float32(0.5), jit.np.array(0.5)], ids=str)
def test_a_scale_may_be_any_finite_number(scale):
    x = draw(4)
    close(call(sl.gated_delta_rule, x, scale=scale)[0], oracle(x, True, 0.5)[0])


NO_NUMBERS = (True, "1", 10**400, torch.ones(2), torch.tensor(1.0, requires_grad=True), 1j)


@pytest.mark.parametrize("scale", NO_NUMBERS, ids=range(len(NO_NUMBERS)))
def test_a_scale_that_is_no_number_is_refused(scale):
    with pytest.raises(ValueError, match="^scale must be a finite number"):
        call(sl.gated_delta_rule, draw(4), scale=scale)


@pytest.mark.parametrize("change", [torch.Tensor.to_sparse, lambda x: x.to("meta")], ids=["sparse", "meta"])
@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta", "initial_state"])
def test_sparse_and_meta_tensors_are_refused(name, change):
    x = {n: z.detach() for n, z in draw(4).items()}
    with pytest.raises((TypeError, ValueError)):
        call(sl.gated_delta_rule, x | {name: change(x[name])})


def test_the_reference_runs_without_numba_where_numba_cannot(off):
    x = {n: z.detach().to("meta") for n, z in draw(4).items()}
    o, S = call(sl.gated_delta_rule, x, backend="reference")
    assert o.is_meta and o.shape == (2, 4, 2, 6) and S.shape == (2, 2, 4, 6)
    with kernels.use_numba(True), pytest.raises(ValueError, match="backend='reference' runs on the CPU only"):
        call(sl.gated_delta_rule, x, backend="reference")
