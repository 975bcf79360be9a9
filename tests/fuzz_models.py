"""Odd and wrong arguments for models, sleep, streams and tasks: the right answer, or an error by name.

``python tests/fuzz_models.py --calls 2000 --seed 0`` prints a summary and every fault, ``--call 137`` repeats
one call.  What kernels are asked is in fuzz.py.  The truth is the same call on plain PyTorch in float64.
"""

import copy
import dataclasses
import re
import signal
from collections import Counter
from contextlib import contextmanager

import numpy as np
import torch
from fuzz import main
from tiny import VOCAB, tiny_model

import sleeplib as sl
from sleeplib import kernels

L, WIDTH = 4, 16
PATTERNS = ("agag", "ahja", "gaga", "aa", "g")
MODELS = {
    (pattern, dtype): tiny_model(pattern, loop, dtype=dtype).requires_grad_(False)
    for dtype in (torch.float64, torch.float32)
    for pattern, loop in zip(PATTERNS, (None, (1, 2), (1, 1), None, None))
}
ODD = [None, True, 0, -1, 1.5, "4", 10**30, float("nan"), float("inf"), [], (), np.int64(2), np.float64(2.0)]


def tokens(rng, B, T):
    return torch.from_numpy(rng.integers(0, VOCAB, (B, T)))


def state_of(rng, model, B, T):
    state = model.initial_state(B)
    return model(tokens(rng, B, T), state)[1] if T else state


def labels_for(rng, inputs, window):
    """Labels in some chunks; within a chunk rows differ, but each has one."""
    labels = torch.full_like(inputs, -100)
    for start in range(0, inputs.shape[1], window):
        if rng.random() < 0.5:
            for row in labels[:, start : start + window]:
                row[rng.integers(len(row))] = int(rng.integers(VOCAB))
    return labels


# What is called: a function of named arguments, and good arguments


def forward(rng, model):
    B, T, past = rng.integers(1, 4), rng.integers(1, 7), rng.integers(0, 6)
    good = dict(tokens=tokens(rng, B, T), state=state_of(rng, model, B, past), window=None)
    return lambda tokens, state, window: model(tokens, state, window), good


def blocks(rng, model):
    B, T, past = rng.integers(1, 4), rng.integers(1, 7), rng.integers(0, 6)
    h = torch.from_numpy(rng.standard_normal((B, T, WIDTH))).to(model.head.weight.dtype)
    return model.blocks, dict(h=h, state=state_of(rng, model, B, past), passes=2, window=None)


def readout(rng, model):
    h = torch.from_numpy(rng.standard_normal((2, 3, WIDTH))).to(model.head.weight.dtype)
    return model.readout, dict(h=h)


def sleep(rng, model):
    B, T = rng.integers(1, 4), rng.integers(1, 7)
    good = dict(model=model, tokens=tokens(rng, B, T), state=state_of(rng, model, B, 0), passes=3)
    eviction = ["hard", "keys", "sliding"][rng.integers(3)]
    return sl.sleep, good | dict(eviction=eviction, window=[None, 1, 3, 9][rng.integers(4)])


def sleep_forward(rng, model):
    B, T = rng.integers(1, 4), rng.integers(1, 14)
    inputs = tokens(rng, B, T)
    good = dict(model=model, inputs=inputs, labels=labels_for(rng, inputs, L), window=L, passes=2)
    good |= dict(eviction=["hard", "keys", "sliding"][rng.integers(3)], state=None, awake=None)
    return sl.sleep_forward, good | dict(checkpoint=bool(rng.integers(2)))


def stream(rng, model):
    def call(tokens, more, window, passes, eviction, count):
        sleeper = sl.Sleeper(model, window=window, passes=passes, eviction=eviction)
        return sleeper.feed(tokens), sleeper.feed(more), sleeper.generate(count), sleeper.state

    B = rng.integers(1, 4)
    good = dict(tokens=tokens(rng, B, rng.integers(1, 9)), more=tokens(rng, B, rng.integers(1, 9)))
    good |= dict(window=int(rng.integers(1, 6)), passes=int(rng.integers(1, 4)), count=2)
    return call, good | dict(eviction=["hard", "keys", "sliding"][rng.integers(3)])


def evict(rng, model):
    return sl.evict, dict(state=state_of(rng, model, 2, 5), eviction="sliding", window=3)


def config(rng, model):
    def call(**fields):
        return sl.HybridLM(sl.ModelConfig(**fields)).embedding.weight.shape

    return call, dataclasses.asdict(model.config) | dict(vocab_size=VOCAB, key_size=4, value_size=8)


def drawn(task):
    """Draw a batch, solve it, score a guess."""

    def of(rng, model):
        seed = int(rng.integers(2**31))
        inputs = task.batch(2, np.random.default_rng(0)).inputs

        def call(count, split, inputs):
            batch = task.batch(count, np.random.default_rng(seed), split=split)
            scores = task.score(torch.zeros(*batch.inputs.shape, task.vocab_size), batch)
            return batch.inputs, batch.labels, task.solve(inputs), torch.tensor(scores["loss"])

        return call, dict(count=3, split="test", inputs=inputs)

    return of


def made(cls, **good):
    """A task of these settings."""

    def of(rng, model):
        return lambda **settings: cls(**settings).batch(1, np.random.default_rng(0)).inputs, good

    return of


TARGETS = {
    "forward": forward,
    "blocks": blocks,
    "readout": readout,
    "sleep": sleep,
    "sleep_forward": sleep_forward,
    "Sleeper": stream,
    "evict": evict,
    "ModelConfig": config,
    "Rule110.batch": drawn(sl.tasks.Rule110(width=8, strings=2, steps=2)),
    "Depo.batch": drawn(
        sl.tasks.Depo(nodes=5, hops=2, letters=8, word=(1, 1), queries=2, windows=2, fewest=5)
    ),
    "Rule110": made(sl.tasks.Rule110, width=9, strings=2, steps=3),
    "Depo": made(sl.tasks.Depo, nodes=5, hops=2, letters=8, queries=2, windows=2, fewest=5),
}
ALSO = "tokens inputs labels state initial_state h model passes window eviction awake count split".split()
ALSO += "d_model num_heads vocab_size rope_base letters nodes queries windows fewest word hops".split()
ALSO += ["g"]  # where a NaN of the caller's shows first, as a decay


# What is done to one of the arguments


def odd_tensor(rng, x):
    """x in another shape, dtype, layout or with other numbers."""
    changes = [x.float, x.double, x.half, x.int, x.long, x.bool, x.tolist, x.numpy, x.flatten, x.clone]
    changes += [lambda: x[0], lambda: x[:1], lambda: x[:, :0], lambda: x[:, :1], lambda: x[..., :1]]
    changes += [lambda: x.unsqueeze(0), lambda: torch.cat((x, x), 0), lambda: torch.cat((x, x), 1)]
    changes += [lambda: x.mT, lambda: x + 10**6, lambda: -x - 1, lambda: x * float("nan"), x.to_sparse]
    changes += [lambda: x.to("meta"), lambda: x.repeat_interleave(2, -1)[..., ::2]]
    changes += [lambda: x[:1].expand_as(x)]
    return changes[rng.integers(len(changes))]()


def odd_state(rng, state):
    """A state of another model, or one that was put together wrongly."""
    other = MODELS[PATTERNS[rng.integers(len(PATTERNS))], torch.float64]
    if rng.random() < 0.3:
        return state_of(rng, other, int(rng.integers(1, 4)), int(rng.integers(0, 4)))
    name = ["fast_weights", "kv", "conv", "key_ages"][rng.integers(4)]
    value = getattr(state, name)
    if value is None:
        return dataclasses.replace(state, key_ages=tuple(torch.arange(3) for _ in state.fast_weights))
    kinds = [lambda: value[1:], lambda: value[::-1], lambda: value + value[:1], lambda: ()]
    kinds += [lambda: tuple(_narrowed(rng, x) for x in value)] * 4
    return dataclasses.replace(state, **{name: kinds[rng.integers(len(kinds))]()})


def _narrowed(rng, x):
    if isinstance(x, tuple):
        return tuple(_narrowed(rng, y) for y in x)
    return odd_tensor(rng, x) if isinstance(x, torch.Tensor) and rng.random() < 0.7 else x


def changed(rng, good):
    name = list(good)[rng.integers(len(good))]
    value = good[name]
    if isinstance(value, torch.Tensor) and rng.random() < 0.8:
        value = odd_tensor(rng, value)
    elif isinstance(value, sl.LMState) and rng.random() < 0.8:
        value = odd_state(rng, value)
    else:
        value = ODD[rng.integers(len(ODD))]
    return good | {name: value}


# One call, and the verdict


def flat(x):
    """Every tensor of a result, in order."""
    if isinstance(x, torch.Tensor):
        return [x]
    if isinstance(x, (sl.LMState, sl.algorithm.SleepOutput)):
        x = [getattr(x, f.name) for f in dataclasses.fields(x)]
    return [z for y in x for z in flat(y)] if isinstance(x, (tuple, list)) else []


def wide(x):
    """The same in float64."""
    if isinstance(x, torch.Tensor) and x.is_floating_point():
        return x.double()
    if isinstance(x, torch.nn.Module):
        return copy.deepcopy(x).double()
    if isinstance(x, sl.LMState):
        fields = {f.name: wide(getattr(x, f.name)) for f in dataclasses.fields(x)}
        return sl.LMState(**fields)
    return tuple(map(wide, x)) if type(x) is tuple else x


def attempt(name, seed, number, truth=False):
    rng = np.random.default_rng((seed, number))
    keys = list(MODELS)
    key = keys[rng.integers(len(keys))]
    call, good = TARGETS[name](np.random.default_rng((seed, number)), MODELS[key])
    x, bent = good, rng.random() < 0.75
    if bent:
        x = changed(rng, good)
    if truth:
        call, good = TARGETS[name](np.random.default_rng((seed, number)), MODELS[key[0], torch.float64])
        x = {k: wide(v) for k, v in x.items()}
    return call, x, bent, key[1]


@contextmanager
def limited(seconds):
    """Raise TimeoutError if what is inside takes longer (where the system has an alarm clock)."""

    def ring(number, frame):
        raise TimeoutError(f"hangs: {seconds} s were not enough")

    if not hasattr(signal, "SIGALRM"):
        yield
        return
    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def one_call(name, seed, number):
    """What became of a call: "right" or "refused", or a sentence that says what is wrong."""
    try:
        with limited(20):
            return verdict_of(name, seed, number)
    except TimeoutError as error:
        return str(error)


def verdict_of(name, seed, number):
    call, x, bent, dtype = attempt(name, seed, number)
    try:
        ours = flat(call(**x))
    except TimeoutError:
        raise
    except (TypeError, ValueError) as error:
        words = "|".join(map(re.escape, (*x, *ALSO)))
        if not bent:
            return f"refuses what fits: {error}"
        return "refused" if re.search(rf"\b({words})\b", str(error)) else f"names no argument: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    call, x, _, _ = attempt(name, seed, number, truth=True)
    try:
        with kernels.use_numba(False):
            truth = flat(call(**x))
        for a, b in zip(ours, truth, strict=True):
            assert a.shape == b.shape, f"shape {tuple(a.shape)}, truth {tuple(b.shape)}"
            if a.numel() and a.is_floating_point() and not (a.is_meta or a.is_sparse):
                a, b = a.double(), b.double()
                assert torch.equal(a.isnan(), b.isnan()), "NaN in other places"
                error = (a - b).nan_to_num().abs().max()
                size = max(1.0, float(b.nan_to_num().abs().max()))
                assert error <= (1e-8 if dtype == torch.float64 else 1e-3) * size, f"off by {error:.2g}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "right"


def run(calls, seed=0, only=None, targets=None):
    """Make so many calls, each target in turn: (Counter of (name, verdict), list of faults)."""
    names, counts, faults = list(targets or TARGETS), Counter(), []
    for number in range(calls) if only is None else [only]:
        name = names[number % len(names)]
        verdict = one_call(name, seed, number)
        counts[name, verdict if verdict in ("right", "refused") else "fault"] += 1
        if verdict not in ("right", "refused"):
            faults.append(f"--seed {seed} --call {number}: {name}: {verdict.splitlines()[0][:300]}")
    return counts, faults


if __name__ == "__main__":
    main(run, TARGETS, __doc__)
