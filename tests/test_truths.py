"""The truths of DESIGN.md, one check each, and for each the planted faults that it must catch."""

import gc
import json
from contextlib import ExitStack
from dataclasses import replace
from unittest.mock import patch

import mutants
import numpy as np
import oracles
import pytest
import test_depo
import test_kernels
import test_rule110
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import VOCAB, WINDOW, close, labels_at, sequence, tiny_model, weights

import sleeplib as sl
from sleeplib.model import Block

L = WINDOW
MODELS = [
    ("agag", None),
    ("ahja", (1, 2)),
    ("gaga", (1, 1)),
]  # all kinds of block; before, in and after a loop


def chunks(tokens):
    return tokens.split(L, dim=1)


def feed_in_pieces(sleeper, tokens, pieces):
    """Feed tokens in pieces of these lengths, cut short at the end, the rest at once."""
    logits, start = [], 0
    for size in [*pieces, tokens.shape[1]]:
        if start < tokens.shape[1]:
            logits.append(sleeper.feed(tokens[:, start : start + size]))
            start += size
    return torch.cat(logits, dim=1)


def close_states(a, b):
    for x, y in zip(a, b, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            close(x, y, what="S")


# Every backend agrees with the reference: outputs, final state, gradients, odd lengths, an initial state.


def check_backends_agree():
    for delta, rule in test_kernels.RULES.items():
        for T in (1, 17, 65):
            x = test_kernels.draw(T, seed=T)
            for backend in test_kernels.BACKENDS:
                ours = test_kernels.call(rule, x, backend=backend)
                test_kernels.compare(ours, test_kernels.oracle(x, delta), x, what=backend)


# Sleep is Algorithm 1 (the truth that all others lean on).


def check_sleep_is_algorithm_1(passes=3, models=MODELS, evictions=("hard", "keys", "sliding")):
    tokens = sequence(4 * L - 2)
    labels = labels_at(tokens, [2 * L + 1, 3 * L, 3 * L + 2])  # asleep, asleep, awake, awake and short
    for pattern, loop in models:
        model = tiny_model(pattern, loop)
        w = weights(model, grad=True)
        for eviction in evictions:
            out = sl.sleep_forward(model, tokens, labels, window=L, passes=passes, eviction=eviction)
            loss, logits, S = oracles.algorithm_1(w, model.config, tokens, labels, L, passes, eviction)
            close(out.loss, loss, what="loss")
            close(out.logits, logits, what="logits")
            close_states(out.state.fast_weights, S)
            assert out.state.position == tokens.shape[1]
            names, parameters = zip(*model.named_parameters())
            ours = torch.autograd.grad(out.loss, parameters)
            for name, a, b in zip(names, ours, torch.autograd.grad(loss, [w[n] for n in names])):
                close(a, b, what=f"gradient of {name}")


# N = 1 is the plain hybrid; splitting a batch of windows at a boundary changes nothing.


def check_n1_is_the_plain_hybrid():
    tokens = sequence(4 * L)
    labels = labels_at(tokens, [2 * L, 4 * L - 1])
    for pattern, loop in MODELS:
        model = tiny_model(pattern, loop)
        out = sl.sleep_forward(model, tokens, labels, window=L, passes=1)
        state, plain = model.initial_state(2), []
        for chunk in chunks(tokens):
            logits, state = model(chunk, state)
            state = replace(state, kv=None, conv=None)
            plain.append(logits)
        for piece, logits, awake in zip(chunks(out.logits), plain, (False, False, True, True)):
            assert torch.equal(piece, logits if awake else torch.zeros_like(logits))
        for a, b in zip(out.state.fast_weights, state.fast_weights):
            assert a is b is None or torch.equal(a, b)
        # The same at once: attention and filters within windows, the recurrence over the whole sequence.
        whole, S = oracles.one_pass(weights(model), model.config, tokens, torch.arange(4 * L) // L)
        close(out.logits[:, 2 * L :], whole[:, 2 * L :])
        close_states(out.state.fast_weights, S)


def check_a_cut_at_a_boundary_changes_nothing():
    tokens = sequence(4 * L + 2)
    labels = labels_at(tokens, [3 * L + 1, 4 * L])
    for eviction in ("hard", "sliding"):
        model = tiny_model("ahja", (1, 2))
        options = dict(window=L, passes=3, eviction=eviction)
        whole = sl.sleep_forward(model, tokens, labels, **options)
        for cut in (L, 2 * L, 3 * L, 4 * L):
            one = sl.sleep_forward(model, tokens[:, :cut], labels[:, :cut], **options)
            two = sl.sleep_forward(model, tokens[:, cut:], labels[:, cut:], state=one.state, **options)
            assert torch.equal(torch.cat((one.logits, two.logits), dim=1), whole.logits)
            assert two.state.position == whole.state.position
            for a, b in zip(two.state.fast_weights, whole.state.fast_weights):
                assert a is b is None or torch.equal(a, b)


# After eviction nothing but S (and position) survives.


def check_nothing_survives_eviction():
    for pattern, loop in MODELS:
        model = tiny_model(pattern, loop)
        one, two = (
            sl.sleep(model, sequence(L, seed=seed), model.initial_state(2), passes=2) for seed in (5, 6)
        )
        assert any(not torch.equal(a, b) for a, b in zip(one.fast_weights, two.fast_weights) if a is not None)
        two = replace(two, fast_weights=one.fast_weights)  # another past, the same S
        for passes in (1, 3):
            (a, after_a), (b, after_b) = (
                model.blocks(model.embed(sequence(L, seed=7)), state, passes=passes) for state in (one, two)
            )
            assert torch.equal(a, b)
            for x, y in zip(after_a.fast_weights, after_b.fast_weights):
                assert x is y is None or torch.equal(x, y)


# Streaming, token by token or in ragged pieces, is Algorithm 1.


def check_streaming_is_algorithm_1(pieces=(1,) * (3 * L) + (2,), passes=3, models=MODELS):
    tokens = sequence(3 * L + 3)
    labels = labels_at(tokens, [3 * L, 3 * L + 2])  # three windows asleep, then an open one
    for pattern, loop in models:
        model = tiny_model(pattern, loop)
        for eviction in ("hard", "sliding"):
            options = dict(window=L, passes=passes, eviction=eviction)
            sleeper = sl.Sleeper(model, **options)
            logits = feed_in_pieces(sleeper, tokens, pieces)
            out = sl.sleep_forward(model, tokens, labels, **options)
            close(logits[:, 3 * L :], out.logits[:, 3 * L :].detach(), what="logits")
            close_states(sleeper.state.fast_weights, out.state.fast_weights)
            assert sleeper.state.position == out.state.position and sleeper.naps == 3


# Sliding with N = 1 is one pass of sliding-window attention over the whole sequence.


def check_sliding_n1_is_window_attention():
    tokens = sequence(3 * L + 2)
    labels = labels_at(tokens, [2 * L, 3 * L + 1])
    for pattern, loop in (*MODELS, ("aa", None)):
        model = tiny_model(pattern, loop)
        whole, S = oracles.one_pass(weights(model), model.config, tokens, window=L)
        options = dict(window=L, passes=1, eviction="sliding")
        at_once, state = model(tokens, model.initial_state(2), window=L)
        out = sl.sleep_forward(model, tokens, labels, **options)
        sleeper = sl.Sleeper(model, **options)
        streamed = feed_in_pieces(sleeper, tokens, (1, 2, 7))
        close(at_once, whole)
        close(streamed, whole)
        close(out.logits[:, 2 * L :], whole[:, 2 * L :])
        for each in (state, out.state, sleeper.state):
            close_states(each.fast_weights, S)


# The gradient reaches the first sleep pass only through S; with S detached it is exactly zero.


def check_gradient_flows_only_through_S():
    tokens, labels = sequence(2 * L, vocab=VOCAB - 1), torch.full((2, 2 * L), -100)
    tokens[:, 1] = VOCAB - 1  # a token that is read in the first window only
    labels[:, -1] = 0
    for pattern, loop in MODELS:
        for passes in (1, 3):
            for detach in (False, True):
                model = tiny_model(pattern, loop)
                state = sl.sleep(model, tokens[:, :L], model.initial_state(2), passes=passes)
                if detach:
                    state = replace(state, fast_weights=mutants.detached(state.fast_weights))
                out = sl.sleep_forward(model, tokens[:, L:], labels[:, L:], window=L, state=state)
                out.loss.backward()
                reached = float(model.embedding.weight.grad[VOCAB - 1].abs().max())
                assert (reached == 0.0) if detach else (reached > 1e-9), (pattern, passes, detach, reached)


# Wake-time cost does not depend on N.


def count_blocks(f, *args, **options):
    """How many tokens times blocks f runs."""
    honest, count = Block.forward, [0]

    def forward(self, h, *rest):
        count[0] += h.shape[1]
        return honest(self, h, *rest)

    with patch.object(Block, "forward", forward):
        f(*args, **options)
    return count[0]


def gradients_at_windows(truncate, asked, windows=6):
    """Loss, logits and last S, and the gradient that reaches the embedding of each window, None if none."""
    model, reached = tiny_model(), []
    honest = model.embed

    def embed(tokens):
        reached.append(honest(tokens))
        reached[-1].retain_grad()
        return reached[-1]

    tokens = sequence(windows * L)
    labels = labels_at(tokens, asked)
    with patch.object(model, "embed", embed):
        options = dict(window=L, passes=2, truncate=truncate)
        out = sl.sleep_forward(model, tokens, labels, **options)
        out.loss.backward()
    values = (out.loss, out.logits, *(s for s in out.state.fast_weights if s is not None))
    return [x.detach() for x in values], [e.grad for e in reached]


def check_truncation_cuts_before_every_nth_nap():
    last, middle = 5 * L + 1, 3 * L + 1
    for asked, naps in (([last], [0, 1, 2, 3, 4]), ([middle, last], [0, 1, 2, 4])):
        values, whole = gradients_at_windows(None, asked)
        assert all(g.abs().max() > 1e-9 for g in whole)
        for truncate in (1, 2, 3, 4, 5, 9):
            same, cut = gradients_at_windows(truncate, asked)
            assert all(torch.equal(a, b) for a, b in zip(values, same, strict=True))  # to the bit
            kept = naps[-truncate] if truncate <= len(naps) else 0
            for window, (a, b) in enumerate(zip(cut, whole, strict=True)):
                if window >= kept:
                    assert a is not None, f"no gradient reaches window {window}"
                    close(a, b)
                elif asked == [last]:
                    assert a is None or not a.any(), f"the gradient reaches window {window}"
                else:  # it may have a road to the question in the middle
                    assert a is None or not torch.equal(a, b)


def check_wake_cost_does_not_depend_on_N():
    model = tiny_model("agag")
    tokens = sequence(3 * L)
    labels = labels_at(tokens, [2 * L + 1])
    for passes in (1, 2, 8):
        sleeper = sl.Sleeper(model, window=L, passes=passes)
        naps = count_blocks(sleeper.feed, tokens[:, : 2 * L])
        assert naps == 4 * 2 * L * passes
        for t in range(2 * L, 3 * L - 1):
            assert count_blocks(sleeper.feed, tokens[:, t : t + 1]) == 4  # one call of each block
        whole = count_blocks(sl.sleep_forward, model, tokens, labels, window=L, passes=passes)
        assert whole == 4 * (2 * L * passes + L)  # the last window is awake


# Carried bytes after sleep do not depend on how much was read.


def bytes_held(x):
    """Bytes of all tensors that can be reached from an object, other than a model's, shared storage once."""
    found, seen, todo = {}, set(), [x]
    while todo:
        x = todo.pop()
        if id(x) in seen or isinstance(x, (torch.nn.Module, type)):
            continue
        seen.add(id(x))
        if isinstance(x, torch.Tensor):
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        elif isinstance(x, (dict, list, tuple)) or type(x).__module__.startswith("sleeplib."):
            todo.extend(gc.get_referents(x))
    return sum(found.values())


def check_carried_bytes_are_constant():
    model, tokens = tiny_model("agja"), sequence(12 * L)
    depth_a, B, D, size = 2, 2, 16, 8
    H, K, V, taps = 2, 4, 8, 4
    fast = 2 * B * H * K * V
    last = B * VOCAB
    keys = 2 * depth_a * B * (L - 1) * D
    contexts = B * (taps - 1) * (2 * H * K + H * V + H * V)
    extra = {"hard": 0, "keys": contexts, "sliding": keys + contexts}
    for eviction, more in extra.items():
        kept = fast + last + more
        for passes in (1, 3):
            for pieces in ((L,), (2 * L,) * 5, (12 * L,), (1,) * (7 * L)):
                sleeper = sl.Sleeper(model, window=L, passes=passes, eviction=eviction)
                for piece in torch.split(tokens, pieces[0], dim=1)[: len(pieces)]:
                    sleeper.feed(piece)
                assert sleeper.nbytes() == bytes_held(sleeper)
                if sleeper.naps > 1 or eviction != "sliding":  # before, there may be less to keep
                    assert sleeper.nbytes() == kept * size, (eviction, passes, pieces)
            sleeper.feed(tokens[:, : L - 1])
            assert sleeper.nbytes() == bytes_held(sleeper) > kept * size


# float32 stays exact after 100,000 tokens.


def check_float32_stays_exact():
    tokens, found = sequence(100_000, batch=1), []
    for dtype in (torch.float32, torch.float64):
        model = tiny_model("ag", dtype=dtype, d_model=8)
        sleeper = sl.Sleeper(model, window=100, passes=1, eviction="sliding")
        sleeper.feed(tokens[:, :-8])
        found.append(torch.cat([sleeper.feed(t) for t in tokens[:, -8:].split(3, dim=1)], dim=1))
        assert sleeper.state.position == 100_000
        near = sl.sleep(model, tokens[:, :L], model.initial_state(1), passes=2, eviction="sliding")
        far = replace(near, position=near.position + 10**9)
        found += [model(tokens[:, :L], state)[0].detach() for state in (near, far)]
    for single, double in zip(found[:3], found[3:]):
        close(single, double.float())
    assert torch.equal(found[1], found[2])


# Same seed, same data order for every N.


def tiny_experiment(**train):
    return sl.experiments.Experiment(
        name="tiny",
        task=sl.tasks.Rule110(width=8, strings=2, steps=1),
        model=sl.ModelConfig(vocab_size=4, d_model=16, pattern="ag", num_heads=2, mlp_size=16),
        train=sl.experiments.TrainConfig(
            **(dict(steps=3, batch=4, eval_every=3, eval_batch=8, warmup=2) | train)
        ),
    )


def check_same_seed_same_data_for_every_N():
    orders = []
    for passes in (1, 2, 4):
        drawn = []
        honest = sl.Trainer.forward_backward

        def forward_backward(self, batch, drawn=drawn, honest=honest):
            drawn.append(batch.inputs)
            return honest(self, batch)

        with patch.object(sl.Trainer, "forward_backward", forward_backward):
            trainer = sl.Trainer(tiny_experiment(), passes, seed=5, device="cpu")
            trainer.run(progress=False)
        orders.append((torch.stack(drawn), trainer.test.inputs, trainer.data_hash))
    (first, test, digest), *others = orders
    assert first.shape[0] == 3 and not torch.equal(first[0], first[1])
    for other in others:
        assert torch.equal(other[0], first) and torch.equal(other[1], test) and other[2] == digest


# Each generator: an independent solver agrees on all, a golden hash.


def check_rule110_solver_agrees():
    for width, strings, steps in ((24, 4, 32), (12, 2, 6), (5, 1, 1), (3, 2, 9), (63, 2, 7)):
        task = sl.tasks.Rule110(width=width, strings=strings, steps=steps)
        for split in ("train", "test"):
            batch = task.batch(200, np.random.default_rng(width), split=split)
            assert torch.equal(task.solve(batch.inputs), batch.labels)


def check_rule110_golden():
    assert test_rule110.golden() == json.loads(test_rule110.GOLDEN.read_text())


def check_depo_solver_agrees():
    for task in (
        *test_depo.TASKS.values(),
        sl.tasks.Depo(nodes=6, hops=20, letters=3, word=(2, 4), queries=3),
    ):
        for split in ("train", "test"):
            batch = task.batch(200, np.random.default_rng(task.nodes), split=split)
            assert torch.equal(task.solve(batch.inputs), batch.labels)


def check_depo_golden():
    assert test_depo.golden() == json.loads(test_depo.GOLDEN.read_text())


CHECKS = {name: f for name, f in list(globals().items()) if name.startswith("check_")}


@pytest.mark.parametrize("name", CHECKS)
def test_truth(name):
    CHECKS[name]()


@pytest.mark.parametrize("fault", mutants.MUTANTS)
def test_the_truth_catches_its_mutant(fault):
    context, name = mutants.MUTANTS[fault]
    with context(), pytest.raises(AssertionError):
        CHECKS[name]()


def test_every_truth_has_a_mutant():
    assert {name for _, name in mutants.MUTANTS.values()} == set(CHECKS)


def test_the_mutants_scaffold_is_not_what_is_caught():
    with mutants.honest_scaffold():
        check_backends_agree()
        check_sleep_is_algorithm_1(models=MODELS[1:2])
        check_streaming_is_algorithm_1(models=MODELS[:1])
        check_nothing_survives_eviction()
        check_rule110_solver_agrees()


def test_mutants_leave_no_trace():
    before = [sl.HybridLM.blocks, sl.Sleeper._nap, sl.sleep_forward, sl.evict, sl.Trainer.__init__]
    for context, _ in mutants.MUTANTS.values():
        with ExitStack() as stack:
            stack.enter_context(context())
    assert before == [sl.HybridLM.blocks, sl.Sleeper._nap, sl.sleep_forward, sl.evict, sl.Trainer.__init__]


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    pieces=st.lists(st.integers(1, 2 * L + 1), max_size=8),
    passes=st.integers(1, 4),
    model=st.sampled_from(MODELS),
)
def test_streaming_in_any_pieces(pieces, passes, model):
    check_streaming_is_algorithm_1(pieces, passes, [model])


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    pattern=st.text("aghj", min_size=1, max_size=4),
    passes=st.integers(1, 3),
    eviction=st.sampled_from(("hard", "keys", "sliding")),
    data=st.data(),
)
def test_any_pattern_and_loop_is_algorithm_1(pattern, passes, eviction, data):
    first = data.draw(st.integers(0, len(pattern) - 1))
    last = data.draw(st.integers(first, len(pattern) - 1))
    check_sleep_is_algorithm_1(
        passes, [(pattern, data.draw(st.sampled_from([None, (first, last)])))], [eviction]
    )


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    pieces=st.lists(st.integers(1, 2 * L + 1), max_size=6),
    passes=st.integers(1, 3),
    eviction=st.sampled_from(("hard", "keys", "sliding")),
    model=st.sampled_from([*MODELS, ("aa", None)]),
)
def test_every_answer_of_the_stream(pieces, passes, eviction, model):
    """Also inside windows that are slept on later: each answer is the awake pass's."""
    model, tokens = tiny_model(*model), sequence(3 * L + 2, seed=4)
    sleeper = sl.Sleeper(model, window=L, passes=passes, eviction=eviction)
    logits = feed_in_pieces(sleeper, tokens, pieces)
    wanted, S = oracles.stream(weights(model), model.config, tokens, L, passes, eviction)
    close(logits, wanted)
    close_states(sleeper.state.fast_weights, S)
