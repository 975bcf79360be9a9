"""A short run of the fuzzer, and proof that it finds what it is for."""

from unittest.mock import patch

import fuzz
import pytest
import torch

from sleeplib import kernels
from sleeplib.kernels import convolution, jit, norm, reference


@pytest.mark.parametrize("numba", [True, False])
def test_every_call_is_right_or_refused_by_name(numba):
    with kernels.use_numba(numba):
        counts, faults = fuzz.run(400, seed=20 + numba)
    assert not faults, "\n".join(faults)
    for name in fuzz.TARGETS:
        assert counts[name, "right"] and counts[name, "refused"], name


def transposed_copy(honest, *args):
    """Fill a copy of what lies in memory in another order, as `launch` does with such a tensor."""
    o, S = honest(*args)
    return o, args[5].detach() if not args[5].is_contiguous() else S


@pytest.mark.parametrize(
    "names, fault",
    [
        (["causal_convolution", "apply_rotary"], lambda: unchecked()),
        (["rms_norm"], lambda: patch.object(norm.naive, "rms_norm", lambda x, *rest: x.clone())),
        (["gated_delta_rule"], lambda: wrapped(reference, "recurrence", transposed_copy)),
    ],
    ids=["shapes are not checked", "the answer is wrong", "an odd layout is forgotten"],
)
def test_the_fuzzer_finds_planted_faults(names, fault):
    targets = {name: fuzz.TARGETS[name] for name in names}
    with kernels.use_numba(False) if len(names) > 1 else kernels.use_numba(True), fault():
        assert fuzz.run(200, seed=0, targets=targets)[1]


def wrapped(module, name, fault):
    honest = getattr(module, name)
    return patch.object(module, name, lambda *args: fault(honest, *args))


def unchecked():
    """No kernel looks at shapes; with Numba off nothing is read out of bounds."""
    return patch.multiple(convolution, check_tensor=lambda *args, **options: None)


def test_a_foreign_shape_never_reaches_a_kernel():
    """The calls that once read or wrote beyond an array."""
    x, ones = torch.randn(2, 9, 6), torch.ones
    calls = {
        "weight": [
            lambda: kernels.causal_convolution(x, ones(4, 7)),
            lambda: kernels.rms_norm(x, ones(7), 1e-6),
        ],
        "context": [lambda: kernels.causal_convolution(x, ones(4, 6), ones(2, 2, 6))],
        "cos": [lambda: kernels.apply_rotary(x.unsqueeze(2), ones(8, 3), ones(9, 3))],
        "sin": [lambda: kernels.apply_rotary(x.unsqueeze(2), ones(9, 3), ones(9, 2))],
        "gate": [lambda: kernels.rms_norm(x, ones(6), 1e-6, ones(2, 8, 6))],
        "x": [
            lambda: kernels.swiglu(ones(3, 5)),
            lambda: kernels.split_heads(x, 2, 2),
            lambda: kernels.split_heads(x, 4, 1),
            lambda: kernels.apply_rotary(ones(1, 2, 1, 5), ones(2, 2), ones(2, 2)),
        ],
    }
    launched = []
    with patch.object(jit, "_array", lambda x: launched.append(x)):
        for name, bad in calls.items():
            for call in bad:
                with pytest.raises(ValueError, match=f"^{name} must have"):
                    call()
    assert not launched
