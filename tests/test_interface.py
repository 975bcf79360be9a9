"""What can be put to sleep: a model that is not HybridLM, caches with gaps, states that do not fit."""

import dataclasses
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from tiny import VOCAB, WINDOW, close, labels_at, sequence, tiny_model

import sleeplib as sl
from sleeplib.layers import Attention, rotary_angles
from sleeplib.state import Memory

L = WINDOW
D = 4


class Counter(sl.Sleepable):
    """Not a HybridLM, not even a module: one block averages its cache, one adds up what it reads.

    The second block's fast weight is (B, 1, 1, D), the sum of all inputs so far, and decays by half with each
    token; its output is that sum.
    """

    vocab_size, d_model, loop = VOCAB, D, (0, 1)

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(VOCAB, D, generator=generator, dtype=torch.float64).requires_grad_()
        self.layers = [self.average, self.add_up]

    def initial_state(self, batch_size):
        return sl.LMState((None, torch.zeros(batch_size, 1, 1, D, dtype=torch.float64)))

    def embed(self, tokens):
        return self.table[tokens]

    def readout(self, h):
        return h @ self.table.T

    def average(self, h, memory, sliding_window=None, write_only=False):
        past = h if memory.kv is None else torch.cat((memory.kv[0], h), dim=1)
        counts = torch.arange(1, past.shape[1] + 1)[:, None]
        means = (past.cumsum(1) / counts)[:, -h.shape[1] :]
        return h + means, Memory(kv=(past, past))

    def add_up(self, h, memory, sliding_window=None, write_only=False):
        S, outputs = memory.S, []
        for t in range(h.shape[1]):
            S = 0.5 * S + h[:, t, None, None]
            outputs.append(S[:, 0])
        return None if write_only else h + torch.cat(outputs, dim=1), Memory(S=S)


def counter_by_hand(model, tokens, passes, asked_last):
    """Algorithm 1 on windows of L for :class:`Counter`, written out; logits of the last window if asked."""
    S = torch.zeros(len(tokens), D, dtype=torch.float64)
    for window in tokens.split(L, dim=1):
        awake = asked_last and window.shape[1] < L
        h = model.table[window]
        for _ in range(1 if awake else passes):
            h = h + torch.stack([h[:, : t + 1].mean(1) for t in range(h.shape[1])], dim=1)
            rows = []
            for t in range(h.shape[1]):
                S = S / 2 + h[:, t]
                rows.append(S)
            h = h + torch.stack(rows, dim=1)
    return S, h @ model.table.T


@pytest.mark.parametrize("passes", [1, 3])
def test_a_model_of_another_kind_sleeps_through_the_same_code(passes):
    model, tokens = Counter(), sequence(2 * L + 2)
    S, logits = counter_by_hand(model, tokens, passes, asked_last=True)

    labels = labels_at(tokens, [2 * L, 2 * L + 1])
    out = sl.sleep_forward(model, tokens, labels, window=L, passes=passes)
    close(out.logits[:, 2 * L :], logits)
    close(out.state.fast_weights[1][:, 0, 0], S)
    (gradient,) = torch.autograd.grad(out.loss, model.table)
    assert gradient.abs().sum() > 0

    state = model.initial_state(2)
    for window in tokens[:, : 2 * L].split(L, dim=1):
        state = sl.sleep(model, window, state, passes=passes)
    h, _ = model.blocks(model.embed(tokens[:, 2 * L :]), state)
    close(model.readout(h), logits)

    for pieces in (1, 3, 2 * L + 2):
        sleeper = sl.Sleeper(model, window=L, passes=passes)
        streamed = torch.cat([sleeper.feed(piece) for piece in tokens.split(pieces, dim=1)], dim=1)
        close(streamed[:, 2 * L :], logits.detach())
    assert sleeper.naps == 2 and sleeper.generate(3).shape == (2, 3)


def test_checkpointing_a_model_of_another_kind_changes_nothing():
    tokens = sequence(2 * L + 1)
    labels, found = labels_at(tokens, [2 * L]), []
    for checkpoint in (False, True):
        model = Counter()
        loss = sl.sleep_forward(model, tokens, labels, window=L, passes=2, checkpoint=checkpoint).loss
        found.append(torch.autograd.grad(loss, model.table)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("call", ["sleep", "sleep_forward", "Sleeper"])
def test_what_cannot_sleep_is_refused_by_what_it_lacks(call):
    tokens, state = sequence(L), sl.LMState((None,))
    calls = {
        "sleep": lambda m: sl.sleep(m, tokens, state),
        "sleep_forward": lambda m: sl.sleep_forward(m, tokens, tokens, window=L),
        "Sleeper": lambda m: sl.Sleeper(m, window=L),
    }
    for model in (None, torch.nn.Linear(2, 2)):
        with pytest.raises(TypeError, match="^model: .* cannot sleep, it lacks initial_state, embed, blocks"):
            calls[call](model)


# A cache with gaps


def attention_with_all_keys(layer, x, kept, T, sliding_window):
    """The newest T outputs, each from the kept keys and the new ones, with every key at its own place."""
    q, k, v = (
        F.linear(x, w.weight).unflatten(-1, (layer.num_heads, -1)) for w in (layer.q, layer.k, layer.v)
    )
    total, size = x.shape[1], q.shape[-1]
    cos, sin = rotary_angles(torch.arange(total), size, layer.rope_base, x.dtype)

    def turn(z):
        one, two = z.chunk(2, dim=-1)
        c, s = cos[:, None], sin[:, None]
        return torch.cat((one * c - two * s, two * c + one * s), dim=-1)

    q, k = turn(q), turn(k)
    scores = torch.einsum("bthk,bshk->bhts", q, k) * size**-0.5
    t, s = torch.arange(total)[:, None], torch.arange(total)
    seen = (s <= t) & (True if sliding_window is None else t - s < sliding_window)
    seen = seen & (kept | (s >= total - T)).unsqueeze(1)  # (B, T, S)
    weights = scores.masked_fill(~seen.unsqueeze(1), -torch.inf).softmax(-1)
    y = torch.einsum("bhts,bshk->bthk", weights, v).flatten(2)
    return layer.o(y)[:, total - T :]


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("sliding_window", [None, 4])
@pytest.mark.parametrize("per_row", [False, True])
def test_a_cache_with_gaps_stays_right(T, sliding_window, per_row):
    torch.manual_seed(0)
    layer = Attention(16, 2).double()
    torch.nn.init.normal_(layer.o.weight)
    total, past = 9 + T, 9
    x = torch.randn(2, total, 16, dtype=torch.float64)
    index = torch.tensor([[0, 3, 4, 7], [1, 2, 6, 8]] if per_row else [[0, 3, 4, 7]] * 2)
    kept = torch.zeros(2, total, dtype=torch.bool).scatter(1, index, True)

    _, whole = layer(x[:, :past], Memory())
    rows = torch.arange(2)[:, None]
    ages = past - index
    pruned = Memory(kv=tuple(z[rows, index] for z in whole.kv), ages=ages if per_row else ages[0])
    y, memory = layer(x[:, past:], pruned, sliding_window)
    close(y, attention_with_all_keys(layer, x, kept, T, sliding_window))

    # The new ages serve the next call too.
    more = torch.randn(2, 2, 16, dtype=torch.float64)
    y, _ = layer(more, memory, sliding_window)
    kept = torch.cat(
        (kept[:, :past], torch.ones(2, T, dtype=torch.bool), torch.zeros(2, 2, dtype=torch.bool)), 1
    )
    close(y, attention_with_all_keys(layer, torch.cat((x, more), dim=1), kept, 2, sliding_window))


def test_ages_without_a_gap_are_no_ages():
    model, tokens = tiny_model("ag"), sequence(9)
    _, state = model(tokens[:, :6], model.initial_state(2))
    said = dataclasses.replace(state, key_ages=(torch.arange(6, 0, -1), None))
    close(model(tokens[:, 6:], said)[0], model(tokens[:, 6:], state)[0])
    for eviction in ("hard", "keys", "sliding"):
        a, b = (s.evict(eviction, 4) for s in (said, state))
        close(model(tokens[:, 6:], a, window=4)[0], model(tokens[:, 6:], b, window=4)[0])
        assert eviction == "sliding" or a.key_ages is None


# A state of another model


def read(pattern="agag", **settings):
    model = tiny_model(pattern, **settings)
    return model(sequence(4), model.initial_state(2))[1]


STATES = {
    "other taps": (lambda: read(conv_taps=3), "state: the convolution context must be"),
    "other order of blocks": (lambda: read("gaga"), "state: "),
    "other heads": (lambda: read(num_heads=4), "state: "),
    "other size of the fast weight": (
        lambda: dataclasses.replace(read(key_size=2), kv=None, conv=None),
        "initial_state must have shape",
    ),
    "a context one row short": (
        lambda: dataclasses.replace(read(), conv=tuple(c if c is None else c[:, 1:] for c in read().conv)),
        "state: the convolution context must be",
    ),
    "keys without values": (
        lambda: dataclasses.replace(read(), kv=tuple(p and (p[0], p[1][:, 1:]) for p in read().kv)),
        "state: cached keys and values must be",
    ),
    "a fast weight for attention": (
        lambda: dataclasses.replace(read(), fast_weights=(read().fast_weights[1],) * 4),
        "state: an attention block carries no fast weight",
    ),
    "an age too few": (
        lambda: dataclasses.replace(read(), key_ages=(torch.arange(3, 0, -1), None, None, None)),
        "state: cached keys and values must be",
    ),
    "a sparse context": (
        lambda: dataclasses.replace(read(), conv=(None, read().conv[1].to_sparse(), None, read().conv[3])),
        "state: its fields must hold dense",
    ),
    "rows of two batches": (
        lambda: dataclasses.replace(read(), conv=tuple(c if c is None else c[:1] for c in read().conv)),
        "state is not of 2 rows",
    ),
    "None": (lambda: None, "state must be an LMState; got NoneType"),
    "a number": (lambda: 3, "state must be an LMState; got int"),
}


def test_keys_and_values_of_two_lengths_are_not_cut():
    state = read()
    for odd in (lambda v: v[:, 1:], lambda v: v.flatten()):
        kv = tuple(pair and (pair[0], odd(pair[1])) for pair in state.kv)
        with pytest.raises(ValueError, match="^state: cached keys and values must be"):
            dataclasses.replace(state, kv=kv).evict("sliding", 3)


@pytest.mark.parametrize("how", STATES)
def test_a_foreign_state_is_refused(how):
    make, names = STATES[how]
    model, tokens, state = tiny_model(), sequence(4), make()
    for call in (model, lambda t, s: sl.sleep(model, t, s, passes=2)):
        with pytest.raises((ValueError, TypeError), match=names):
            call(tokens, state)
    if state is not None:
        with pytest.raises((ValueError, TypeError), match=names):
            sl.sleep_forward(model, tokens, torch.full_like(tokens, -100), window=2, state=state, truncate=1)


@pytest.mark.parametrize(
    "names, options",
    [
        ("awake must have one bool for each of 3 chunks; got 2", dict(awake=(False, True))),
        ("awake .True, False, True. is not where the labels are", dict(awake=(True, False, True))),
    ],
)
def test_awake_must_be_where_the_labels_are(names, options):
    tokens = sequence(3 * L)
    with pytest.raises(ValueError, match=names):
        sl.sleep_forward(tiny_model(), tokens, labels_at(tokens, [3 * L - 1]), window=L, **options)


def test_h_of_another_width_or_kind_is_refused():
    model = tiny_model()
    for error, h in ((ValueError, torch.zeros(2, 3, 1)), (TypeError, None), (TypeError, sequence(3))):
        with pytest.raises(error, match="^h must"):
            model.blocks(h, model.initial_state(2))


# The state


def test_a_state_can_be_detached_cloned_and_weighed():
    model = tiny_model("agja")
    _, state = model(sequence(6), model.initial_state(2))
    detached, clone = state.detach(), state.clone()
    assert not any(x.requires_grad for x in detached.tensors()) and detached.position == 6
    pairs = list(zip(state.tensors(), detached.tensors(), clone.tensors(), strict=True))
    assert len(pairs) == 8
    for a, b, c in pairs:
        assert torch.equal(a, b) and torch.equal(a, c)
        assert a.data_ptr() == b.data_ptr() != c.data_ptr()
    assert clone.nbytes() == sum(x.numel() * 8 for x in state.tensors()) <= state.nbytes()
    again = sl.LMState.from_blocks(state.blocks(), 6)
    assert all(a is b for a, b in zip(again.tensors(), state.tensors(), strict=True))


# A stream that is interrupted


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_an_interrupted_feed_leaves_the_stream_as_it_was(eviction):
    """Ctrl-C at every block call of a feed over two naps, one after the other."""
    model, tokens = tiny_model(), sequence(4 * L)
    options = dict(window=L, passes=3, eviction=eviction)
    honest = sl.Sleeper(model, **options)
    wanted = torch.cat([honest.feed(tokens[:, : L + 2]), honest.feed(tokens[:, L + 2 :])], dim=1)
    block, calls = type(model.layers[0]), [0, None]

    def forward(self, *args, forward=block.forward):
        calls[0] += 1
        if calls[0] == calls[1]:
            raise KeyboardInterrupt
        return forward(self, *args)

    with patch.object(block, "forward", forward):
        sleeper = sl.Sleeper(model, **options)
        sleeper.feed(tokens[:, : L + 2])
        before, stop = sleeper.state, 0
        while True:
            stop += 1
            calls[:] = [0, stop]
            try:
                logits = sleeper.feed(tokens[:, L + 2 :])
                break
            except KeyboardInterrupt:
                assert sleeper.state is before and sleeper.naps == 1
    assert stop > 30
    close(logits, wanted[:, L + 2 :])

    sleeper, calls[0] = sl.Sleeper(model, **options), 0
    sleeper.feed(tokens[:, : L + 2])
    before, calls[1] = sleeper.state, 20
    with patch.object(block, "forward", forward), pytest.raises(KeyboardInterrupt):
        sleeper.generate(2 * L)
    assert sleeper.state is before


def test_a_sleepers_settings_are_fixed():
    sleeper = sl.Sleeper(tiny_model(), window=L, passes=2)
    for name in ("window", "passes", "eviction", "naps", "state"):
        with pytest.raises(AttributeError):
            setattr(sleeper, name, 3)
    assert (sleeper.window, sleeper.passes, sleeper.eviction) == (L, 2, "hard")
    with pytest.raises(TypeError, match="count must be an int of at least 1; got True"):
        sleeper.generate(True)


# Layers are called as modules


@pytest.mark.parametrize("block, name", [(0, "q"), (0, "v"), (1, "gate"), (1, "a"), (2, "q"), (3, "k")])
def test_a_hook_or_a_wrapper_on_a_projection_is_not_bypassed(block, name):
    model, tokens = tiny_model("agja"), sequence(6)
    plain = model(tokens, model.initial_state(2))[0]
    owner = model.layers[block].mixer
    layer, called = getattr(owner, name), []
    handle = layer.register_forward_hook(lambda module, args, output: called.append(module) or 2 * output)
    hooked = model(tokens, model.initial_state(2))[0]
    handle.remove()
    assert called == [layer] and not torch.allclose(hooked, plain)

    class Wrapped(torch.nn.Module):  # as LoRA adapters are
        def __init__(self, layer):
            super().__init__()
            self.base, self.down = layer, torch.nn.Linear(layer.in_features, 2, bias=False).double()
            self.up = torch.nn.Linear(2, layer.out_features, bias=False).double()

        def forward(self, x):
            return self.base(x) + self.up(self.down(x))

    setattr(owner, name, Wrapped(layer))
    logits = model(tokens, model.initial_state(2))[0]
    assert not torch.allclose(logits, plain)
    logits.sum().backward()
    assert getattr(owner, name).down.weight.grad.abs().sum() > 0
    with torch.no_grad():
        getattr(owner, name).up.weight.zero_()
    close(model(tokens, model.initial_state(2))[0], plain)


def test_a_hook_on_the_feed_forward_layer_is_not_bypassed():
    model, tokens, called = tiny_model("ag"), sequence(3), []
    for name in ("gate", "up", "down"):
        getattr(model.layers[0].mlp, name).register_forward_pre_hook(lambda *_: called.append(1))
    model(tokens, model.initial_state(2))
    assert len(called) == 3


def test_double_precision_by_default():
    torch.set_default_dtype(torch.float64)
    try:
        model = sl.HybridLM(sl.ModelConfig(vocab_size=VOCAB, d_model=16, pattern="agjh", num_heads=2))
        tokens = sequence(3 * L)
        labels = labels_at(tokens, [3 * L - 1])
        out = sl.sleep_forward(model, tokens, labels, window=L, passes=2)
        out.loss.backward()
        assert out.loss.dtype == out.logits.dtype == torch.float64
        assert sl.Sleeper(model, window=L, passes=2).feed(tokens).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


class Plain(sl.Sleepable, torch.nn.Module):
    """A module whose blocks have no parts that the library knows."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(3))

    def initial_state(self, batch_size):
        return sl.LMState((None, torch.zeros(batch_size, 1, 1, 2), None))


def test_the_fast_weight_layers_of_any_model_are_its_blocks_with_a_fast_weight():
    model = Plain()
    for part, learning in (("fast", {"1"}), ("all", {"0", "1", "2"})):
        model.learn(part)
        assert {n.split(".")[1] for n, p in model.named_parameters() if p.requires_grad} == learning
