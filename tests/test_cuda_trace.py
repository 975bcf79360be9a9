"""CUDA paths, traced without a GPU.

Fake tensors have a shape, a dtype and a device and no numbers, so a step of a preset at its real size can
be followed where there is no GPU: the forward pass and the optimizers on device "cuda", and, as autograd asks
for a driver, forward and backward on device "meta", which takes the same branches.  What shows: operands on
two devices, shapes that do not fit, and whatever makes the processor wait.  What does not: any number, speed,
memory.
"""

import ctypes
import dataclasses
import importlib.util
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sleeplib as sl
from sleeplib import muon
from sleeplib.algorithm import awake_chunks
from sleeplib.layers import _rotary_table
from sleeplib.training import make_optimizers

aten = torch.ops.aten
READS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero}


class NoSync(TorchDispatchMode):
    """Refuse whatever reads a number back from the device; count what ran there."""

    def __init__(self, device="cuda"):
        super().__init__()
        self.device, self.count = device, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        ours = any(x.device.type == self.device for x in given)
        masks = function.overloadpacket is aten.index and any(x.dtype == torch.bool for x in given)
        assert not (ours and (masks or function.overloadpacket in READS)), f"{function} waits for the GPU"
        out = function(*args, **kwargs or {})
        if ours:
            self.count += 1
            made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
            assert all(x.device.type == self.device for x in made), f"{function} copies from the GPU"
        return out


@pytest.fixture(autouse=True)
def a_guard_for_cuda(monkeypatch):
    """Lend "cuda" the CPU's device guard, which does nothing: slices ask for one, and this build has none.

    Rotary tables are kept from call to call; fake ones must not reach other tests.
    """
    if torch.version.cuda:  # FakeTensorMode sees to it
        guards = [None, None]
    elif sys.platform == "linux":
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
        guards = (ctypes.c_void_p * 2).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    else:
        pytest.skip("not traced: the device guards of this build are out of reach")
    _rotary_table.cache_clear()
    monkeypatch.setattr(muon, "multiplies_bfloat16", lambda device: True)  # it would ask a driver
    guards[1] = guards[0]
    yield
    guards[1] = None
    _rotary_table.cache_clear()


def kinds():
    """One preset of each kind: those that differ in width, depth or length only take the same path.

    Evictions are followed on a small model below.
    """
    found = {}
    for e in sorted(sl.experiments.PRESETS.values(), key=lambda e: len(e.model.pattern) * e.task.length):
        train = e.train.checkpoint, e.train.precision
        found.setdefault((*sorted(set(e.model.pattern)), *train, e.model.loop), e.name)
    return list(found.values())


def move(model, device):
    """Put a fake model on a device; ``model.to`` would ask for a driver."""
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            moved = aten._to_copy(p.detach(), device=device)
            module.register_parameter(name, nn.Parameter(moved))
    return model


def follow(experiment, passes, eviction, checkpoint):
    """One step: forward and optimizers on "cuda", then forward and backward on "meta"."""
    task, train = experiment.task, experiment.train
    batch = task.batch(2, np.random.default_rng(0))
    options = dict(window=task.window, passes=passes, eviction=eviction, checkpoint=checkpoint)
    options |= dict(awake=awake_chunks(batch.labels, task.window), return_logits=not checkpoint)
    low = train.precision == "bfloat16"
    with FakeTensorMode(allow_non_fake_inputs=False) as fake:
        model = move(sl.HybridLM(experiment.model), "cuda:0")
        optimizers = make_optimizers(model, train)
        inputs, labels = (aten._to_copy(fake.from_tensor(x), device="cuda:0") for x in batch[:2])
        with NoSync() as seen, torch.no_grad():
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=low):
                out = sl.sleep_forward(model, inputs, labels, **options)
            for p in model.parameters():
                p.grad = torch.empty_like(p)
            torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip, foreach=True)
            for optimizer in optimizers:
                optimizer.step()
        assert out.loss.device.type == "cuda" and out.state.position == task.length and seen.count > 100

        model = move(model, "meta")
        inputs, labels = (aten._to_copy(x, device="meta") for x in (inputs, labels))
        no_autocast = patch.object(torch, "autocast", lambda *args, **options: nullcontext())
        with no_autocast, NoSync("meta") as seen:  # "meta" has no autocast
            sl.sleep_forward(model, inputs, labels, **options).loss.backward()
        assert seen.count > 200
        for name, p in model.named_parameters():
            assert p.grad is not None and p.grad.device.type == "meta", name


@pytest.mark.slow
@pytest.mark.parametrize("name, passes", [*((name, 2) for name in kinds()), ("rule110-quick", 1)])
def test_a_training_step_of_every_kind_of_preset(name, passes):
    experiment = sl.experiments.get(name)
    train = experiment.train
    if experiment.task.length > 1000:  # the same path on fewer tokens
        short = {"task.tokens": "[100, 200]", "task.window": 100, "task.noise": "[4, 4]"}
        experiment = experiment.replace(short)
    follow(experiment, passes, train.eviction_at(0), train.checkpoint)


@pytest.mark.parametrize("eviction, checkpoint", [("hard", False), ("keys", False), ("sliding", True)])
def test_a_training_step_of_every_way_to_forget(eviction, checkpoint):
    experiment = sl.experiments.get("rule110-quick")
    model = dataclasses.replace(experiment.model, pattern="aghj", loop=(1, 2))
    task = sl.tasks.Rule110(width=3, strings=2, steps=1)  # an operation traced takes as long as a large one
    follow(dataclasses.replace(experiment, model=model, task=task), 2, eviction, checkpoint)


@pytest.mark.parametrize("eviction", ("hard", "sliding"))
def test_a_sleeper_on_a_stream(eviction):
    with FakeTensorMode():
        config = sl.ModelConfig(vocab_size=9, d_model=32, pattern="agaj", num_heads=2)
        model = move(sl.HybridLM(config), "cuda:0")
        sleeper = sl.Sleeper(model, window=4, passes=2, eviction=eviction)
        with NoSync() as seen:  # feed takes no gradients
            logits = sleeper.feed(torch.zeros(2, 11, dtype=torch.int64, device="cuda"))
            tokens = sleeper.generate(6)
        assert logits.device.type == tokens.device.type == "cuda" and seen.count > 100
        assert logits.shape == (2, 11, 9) and tokens.shape == (2, 6) and sleeper.naps == 4


def test_a_sync_and_a_device_mix_are_seen():
    """Else the tests above could not fail."""
    faults = [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: (x > 0).nonzero(),
    ]
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.ones(3, device="cuda")
        for fault in faults:
            with pytest.raises(AssertionError, match="waits for the GPU|copies from the GPU"), NoSync():
                fault(x)
        with pytest.raises(RuntimeError, match="device"), NoSync():
            x + torch.ones(3)


def missing():
    return [name for name in ("fla", "triton") if importlib.util.find_spec(name) is None]


@pytest.mark.skipif(bool(missing()), reason=f"did not run: {' and '.join(missing())} cannot be imported")
def test_flas_token_loop_is_the_reference_under_tritons_interpreter():
    """On the CPU, at toy size.  The chunked kernels that the bridge calls do not run in the interpreter."""
    code = """if True:
        import torch, sleeplib as sl
        from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule
        torch.manual_seed(0)
        B, T, H, K, V = 1, 5, 2, 8, 8
        q, k = (torch.nn.functional.normalize(torch.randn(B, T, H, K), dim=-1) for _ in range(2))
        v, g, beta = torch.randn(B, T, H, V), -torch.rand(B, T, H), torch.rand(B, T, H)
        S = torch.randn(B, H, K, V)
        ours = sl.gated_delta_rule(q, k, v, g=g, beta=beta, initial_state=S, backend="reference")
        theirs = fused_recurrent_gated_delta_rule(
            q, k, v, g=g, beta=beta, scale=K**-0.5, initial_state=S, output_final_state=True
        )
        print(max(float((a - b).abs().max()) for a, b in zip(ours, theirs)))
    """
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 2e-6
