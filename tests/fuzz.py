"""Odd and wrong arguments for public functions: the right answer, or an error that names an argument.

``python tests/fuzz.py --calls 2000 --seed 0`` prints a summary and every fault, ``--call 137``
repeats one call.  Whoever adds a function adds a :class:`Target` to ``TARGETS``.
"""

import argparse
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from sleeplib import kernels
from sleeplib.kernels import naive

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Target:
    """A function to call, and what to hold its answers against.

    Parameters
    ----------
    draw : callable
        A NumPy generator to good arguments, by name; tensors are float64 and get another dtype later.
    call, truth : callable
        Named arguments to a tensor or tuple of tensors; the truth gets float64 in plain memory.  No gradient
        is compared where there is no truth, only that nothing worse than a named error happens.
    values : dict of str to (list, list)
        For an argument that is no tensor: other values that must work, and values that must be refused.
    names : tuple of str
        Further words that an error may name.
    """

    draw: Callable
    call: Callable
    truth: Callable | None = None
    values: dict = field(default_factory=dict)
    names: tuple = ()


# Ways to change a tensor: what follows the same rules in other memory, and what does not


def relay(rng, x):
    """Numbers of x in memory that is laid out in another way; shape and signs stay."""
    kind = rng.integers(6)
    if kind == 0:  # axes in another order
        order = rng.permutation(x.ndim).tolist()
        return x.permute(order).contiguous().permute([order.index(i) for i in range(x.ndim)])
    if kind == 1:  # every second number of something wider
        return x.repeat_interleave(2, dim=-1)[..., ::2] if x.ndim else x
    if kind == 2:  # columns of something wider
        return torch.cat((x, x, x), dim=-1)[..., x.shape[-1] : 2 * x.shape[-1]] if x.ndim else x
    if kind == 3 and x.numel():  # overlapping and repeated rows
        strides = [int(rng.integers(0, s + 1)) for s in x.contiguous().stride()]
        return x.contiguous().as_strided(x.shape, strides)
    if kind == 4 and x.numel():  # an axis of size 1 may have any stride
        strides = [10**12 if n == 1 else s for n, s in zip(x.shape, x.contiguous().stride())]
        return x.contiguous().as_strided(x.shape, strides)
    if kind == 5 and x.dtype in (torch.float32, torch.float64):  # negated when it is read
        return torch.complex(torch.zeros_like(x), -x).conj().imag
    return x


def reshape(rng, x):
    """x in a shape that does not fit."""
    axis = int(rng.integers(x.ndim)) if x.ndim else 0
    changes = [lambda: x.unsqueeze(axis), lambda: x.to("meta"), lambda: x.new_zeros(())]
    if x.ndim:
        n = x.shape[axis]
        changes += [lambda: x.select(axis, 0) if n else x.unsqueeze(0), lambda: x.narrow(axis, 0, 0)]
        changes += [lambda: x.narrow(axis, 0, max(0, n - 1)), lambda: torch.cat((x, x), axis)]
        changes += [lambda: x.narrow(axis, 0, min(1, n)), lambda: x.transpose(axis, -1), lambda: x.flatten()]
        changes += [lambda: torch.cat((x, x.narrow(axis, 0, min(1, n))), axis)]
    return changes[rng.integers(len(changes))]()


def replace(rng, x):
    """Something that is no float tensor in ordinary memory."""
    numbers = x.to(torch.float64).resolve_neg()
    kinds = [numbers.long, numbers.bool, lambda: numbers.to(torch.complex64), numbers.numpy, numbers.tolist]
    kinds += [lambda: numbers.to(torch.float8_e5m2), lambda: "x", lambda: 0.5, lambda: None]
    kinds += [numbers.to_sparse, lambda: torch.nested.nested_tensor([numbers.flatten()], layout=torch.jagged)]
    return kinds[rng.integers(len(kinds))]()


def poison(rng, x):
    """One number of x is NaN."""
    x = x.clone(memory_format=torch.contiguous_format)
    if x.numel():
        x.view(-1)[rng.integers(x.numel())] = torch.nan
    return x


def arguments(rng, target):
    """Arguments of a call, and whether they all fit (None: that is for the truth to say)."""
    x = target.draw(rng)
    dtype = [torch.float32, torch.float64, torch.float32, torch.float64, torch.bfloat16][rng.integers(5)]
    tensors = [name for name, z in x.items() if isinstance(z, torch.Tensor)]
    x |= {name: x[name].to(dtype) for name in tensors}
    fits = True
    for name, (good, bad) in target.values.items():
        if good and rng.random() < 0.3:
            x[name] = good[rng.integers(len(good))]
        elif rng.random() < 0.05:
            x[name], fits = bad[rng.integers(len(bad))], False
    whole = rng.random()
    if whole < 0.03:
        return x | {name: x[name].to("meta") for name in tensors}, None
    for name in tensors:
        if rng.random() < 0.4:
            x[name] = relay(rng, x[name])
        if rng.random() < 0.5 and x[name].dtype in (torch.float32, torch.float64):
            x[name] = x[name].detach().requires_grad_()
    if whole < 0.55:
        return x, fits
    name = tensors[rng.integers(len(tensors))]
    changes = (reshape, replace, poison, lambda rng, z: z.to(list(TOLERANCE)[rng.integers(4)]))
    x[name] = changes[rng.integers(4)](rng, x[name].detach())
    return x, fits and None


# One call, and the verdict


def tensors_of(result):
    return result if isinstance(result, tuple) else (result,)


def widened(z):
    """A float64 copy in plain memory, that wants a gradient where z does."""
    if not isinstance(z, torch.Tensor) or not z.is_floating_point():
        return z
    return z.detach().to(torch.float64).clone().contiguous().requires_grad_(z.requires_grad)


def check(ours, truth, x, wide, rng):
    """Shapes, NaNs, numbers and gradients; raises AssertionError."""
    given = [z for z in x.values() if isinstance(z, torch.Tensor)]
    tolerance = max((TOLERANCE[z.dtype] for z in given), default=1e-9)
    for a, b in zip(ours, truth, strict=True):
        assert a.shape == b.shape, f"shape {tuple(a.shape)}, truth {tuple(b.shape)}"
        if a.is_meta or not a.numel():
            continue
        a = a.double()
        assert torch.equal(a.isnan(), b.isnan()), "NaN in other places"
        error = (a - b).detach().nan_to_num().abs().max()
        assert error <= tolerance * max(1.0, float(b.detach().nan_to_num().abs().max())), (
            f"off by {error:.2g}"
        )
    names = [name for name, z in x.items() if isinstance(z, torch.Tensor) and z.requires_grad]
    if not names or tolerance > 1e-3 or any(b.is_meta or bool(b.isnan().any()) for b in truth):
        return
    noise = [relay(rng, normal(rng, *b.shape)) for b in truth]  # a gradient may lie in any memory too
    found = torch.autograd.grad(
        [a for a in ours if a.requires_grad],
        [x[name] for name in names],
        [n.to(a.dtype) for a, n in zip(ours, noise) if a.requires_grad],
        allow_unused=True,
    )
    wanted = torch.autograd.grad(
        [b for b in truth if b.requires_grad],
        [wide[name] for name in names],
        [n for b, n in zip(truth, noise) if b.requires_grad],
        allow_unused=True,
    )
    for name, a, b in zip(names, found, wanted):
        a, b = (z if z is not None else torch.zeros(()) for z in (a, b))
        assert a.numel() == b.numel() or not b.any(), f"gradient of {name} has shape {tuple(a.shape)}"
        error = (a.double() - b).abs().max() if a.numel() else 0
        assert error <= 10 * tolerance * max(1.0, float(b.abs().max()) if b.numel() else 1), (
            f"gradient of {name} off by {error:.2g}"
        )


def one_call(name, target, seed, number):
    """What became of a call: "right" or "refused", or a sentence that says what is wrong."""
    rng = np.random.default_rng((seed, number))
    x, fits = arguments(rng, target)
    words = "|".join(map(re.escape, (*x, *target.names)))
    try:
        ours = tensors_of(target.call(**x))
    except (TypeError, ValueError) as error:
        if fits is True:
            return f"refuses what fits: {error}"
        return "refused" if re.search(rf"\b({words})\b", str(error)) else f"names no argument: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if fits is False:
        return "takes a value that it should refuse"
    try:
        wide = {key: widened(z) for key, z in x.items()}
        check(ours, tensors_of(target.truth(**wide)), x, wide, rng)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "right"


def described(z):
    """A tensor by shape, dtype and strides, anything else as it is."""
    if not isinstance(z, torch.Tensor) or z.is_nested or z.layout is not torch.strided:
        return z
    return tuple(z.shape), z.dtype, z.stride()


def run(calls, seed=0, targets=None, only=None):
    """Make so many calls, each target in turn: (Counter of (name, verdict), list of faults)."""
    targets = list((targets or TARGETS).items())
    counts, faults = Counter(), []
    for number in range(calls) if only is None else [only]:
        name, target = targets[number % len(targets)]
        verdict = one_call(name, target, seed, number)
        counts[name, verdict if verdict in ("right", "refused") else "fault"] += 1
        if verdict not in ("right", "refused"):
            x, _ = arguments(np.random.default_rng((seed, number)), target)
            shapes = {key: described(z) for key, z in x.items()}
            faults.append(f"--seed {seed} --call {number}: {name} {verdict} {shapes}")
    return counts, faults


# The kernels

NUMBERS = (
    [None, 1, 0.3, -2.0, np.float32(0.5), np.array(0.5), torch.tensor(0.5)],
    [True, "1", float("nan"), float("inf"), 10**400, [1.0], np.ones(2), torch.ones(2), 1j],
)
EPS = [1e-6, 1e-3, np.float64(1e-3), 1], [True, None, "1", float("nan"), -1.0, torch.ones(2)]
SIZES = [0, -1, 1.0, True, None, "2", 10**30]


def normal(rng, *shape):
    return torch.from_numpy(rng.standard_normal(shape))


def sizes(rng, *most, least=1):
    return (int(rng.integers(least, n + 1)) for n in most)


def draw_rule(rng):
    B, H, K, V = sizes(rng, 2, 2, 4, 5)
    T = int(rng.choice([1, 3, 17, 70]))
    x = dict(q=normal(rng, B, T, H, K), k=normal(rng, B, T, H, K) / K**0.5 / 2, v=normal(rng, B, T, H, V))
    x |= dict(g=-normal(rng, B, T, H).exp(), beta=normal(rng, B, T, H).sigmoid())
    x |= dict(initial_state=normal(rng, B, H, K, V), scale=None)
    return x | dict(backend=["auto", "reference", "chunked", "wy"][rng.integers(4)])


def rule_truth(delta):
    def truth(q, k, v, g, beta, initial_state, scale, backend):
        (B, _, H, K), V = q.shape, v.shape[3]
        S = q.new_zeros(B, H, K, V) if initial_state is None else initial_state
        return naive.recurrence(q, k, v, g, beta, S, K**-0.5 if scale is None else float(scale), delta)

    return truth


def draw_attention(rng):
    B, T, H, K, V, past = sizes(rng, 2, 4, 2, 4, 5, 4)
    x = dict(q=normal(rng, B, T, H, K), k=normal(rng, B, T + past, H, K), v=normal(rng, B, T + past, H, V))
    return x | dict(sliding_window=None, scale=None)


def attention_truth(q, k, v, sliding_window, scale):
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    return naive.softmax_attention(q, k, v, scale, k.shape[1] if sliding_window is None else sliding_window)


def draw_convolution(rng):
    B, T, C = sizes(rng, 3, 6, 4, least=0)
    (taps,) = sizes(rng, 4)
    context = normal(rng, B, taps - 1, C) if rng.random() < 0.7 else None
    x = dict(x=normal(rng, B, T, C), weight=normal(rng, taps, C))
    return x | dict(context=context, silu=bool(rng.integers(2)))


def draw_context(rng):
    B, T, C = sizes(rng, 3, 6, 4, least=0)
    (taps,) = sizes(rng, 4)
    return dict(x=normal(rng, B, T, C), context=normal(rng, B, taps - 1, C), taps=taps)


def draw_rotation(rng):
    B, T, H, half = sizes(rng, 3, 5, 3, 3, least=0)
    angle = normal(rng, T, half)
    return dict(x=normal(rng, B, T, H, 2 * half), cos=angle.cos(), sin=angle.sin())


def draw_norm(rng):
    *leading, n = sizes(rng, *[4] * int(rng.integers(4)), 5)
    x = dict(x=normal(rng, *leading, n), weight=normal(rng, n), eps=1e-6)
    return x | dict(gate=normal(rng, *leading, n) if rng.random() < 0.6 else None)


def draw_heads(rng):
    B, T = sizes(rng, 3, 5, least=0)
    H, K, V = sizes(rng, 3, 3, 3)
    return dict(x=normal(rng, B, T, H * (2 * K + V)), H=H, K=K, eps=1e-6)


TARGETS = {
    "gated_delta_rule": Target(
        draw_rule,
        kernels.gated_delta_rule,
        rule_truth(True),
        dict(scale=NUMBERS, backend=(["auto"], [0, "x"])),
    ),
    "gated_hebbian_rule": Target(
        draw_rule, kernels.gated_hebbian_rule, rule_truth(False), dict(scale=NUMBERS)
    ),
    "softmax_attention": Target(
        draw_attention,
        kernels.softmax_attention,
        attention_truth,
        dict(scale=NUMBERS, sliding_window=([None, 1, 2, 2**31 - 1], [0, 1.0, True, "2", 10**30])),
    ),
    "causal_convolution": Target(draw_convolution, kernels.causal_convolution, naive.causal_convolution),
    "prepend_context": Target(
        draw_context, kernels.prepend_context, naive.prepend_context, dict(taps=([], SIZES))
    ),
    "apply_rotary": Target(draw_rotation, kernels.apply_rotary, naive.apply_rotary),
    "rms_norm": Target(
        draw_norm,
        kernels.rms_norm,
        lambda x, weight, eps, gate: naive.rms_norm(x, weight, float(eps), gate),
        dict(eps=EPS),
    ),
    "l2_normalize": Target(
        lambda rng: dict(x=draw_norm(rng)["x"], eps=1e-6),
        kernels.l2_normalize,
        lambda x, eps: naive.l2_normalize(x, float(eps)),
        dict(eps=EPS),
    ),
    "split_heads": Target(
        draw_heads,
        kernels.split_heads,
        lambda x, H, K, eps: naive.split_heads(x, H, K, float(eps)),
        dict(eps=EPS),
    ),
    "swiglu": Target(
        lambda rng: dict(x=normal(rng, *sizes(rng, *[4] * int(rng.integers(4)), least=0), 6)),
        kernels.swiglu,
        naive.swiglu,
    ),
}


def main(run, names, about):
    """The command line of a fuzzer: make the calls, print a summary and every fault."""
    parser = argparse.ArgumentParser(description=about.split("\n")[0])
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--call", type=int, help="repeat this one only")
    options = parser.parse_args()
    counts, faults = run(options.calls, options.seed, only=options.call)
    print("\n".join(faults))
    for name in names:
        line = ", ".join(f"{counts[name, verdict]} {verdict}" for verdict in ("right", "refused", "fault"))
        print(f"{name}: {line}")
    raise SystemExit(bool(faults))


if __name__ == "__main__":
    main(run, TARGETS, __doc__)
