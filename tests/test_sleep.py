"""sleep, sleep_forward and Sleeper: shapes, edges, errors.  What they compute is in test_truths.py."""

from dataclasses import replace

import oracles
import pytest
import torch
from test_truths import count_blocks
from tiny import VOCAB, WINDOW, close, labels_at, sequence, tiny_model, weights

import sleeplib as sl
from sleeplib.algorithm import awake_chunks

L = WINDOW


def test_a_window_without_labels_is_slept_on_and_answers_nothing():
    model, tokens = tiny_model(), sequence(2 * L)
    out = sl.sleep_forward(model, tokens, torch.full_like(tokens, -100), window=L, passes=2)
    assert out.loss.isnan() and not out.logits.any() and out.logits.shape == (2, 2 * L, VOCAB)
    state = model.initial_state(2)
    for window in tokens.split(L, dim=1):
        state = sl.sleep(model, window, state, passes=2)
    for a, b in zip(out.state.fast_weights, state.fast_weights):
        assert a is b is None or torch.equal(a, b)


def test_a_trailing_partial_window_without_labels_stays_open():
    model, tokens = tiny_model(), sequence(2 * L - 2)
    out = sl.sleep_forward(model, tokens, torch.full_like(tokens, -100), window=L, passes=3)
    assert out.state.kv[0][0].shape[1] == L - 2  # read, not slept on, not evicted
    assert count_blocks(sl.sleep, model, tokens[:, L:], model.initial_state(2), passes=3) == 12 * (L - 2)


def test_labels_without_numbers_are_refused():
    model, tokens = tiny_model("ag"), sequence(L + 1)
    labels = labels_at(tokens, [L])
    with pytest.raises(ValueError, match="^labels are on meta, inputs on cpu"):
        sl.sleep_forward(model, tokens, labels.to("meta"), window=L, awake=(False, True))
    with pytest.raises(ValueError, match="^labels on device meta hold no numbers"):
        awake_chunks(labels.to("meta"), L)


def test_the_loss_is_the_mean_over_all_labels():
    model, tokens = tiny_model(), sequence(3 * L)
    labels = labels_at(tokens, [L, 2 * L, 2 * L + 1, 3 * L - 1])
    labels[0, 2 * L] = -100  # rows may differ within a chunk
    out = sl.sleep_forward(model, tokens, labels, window=L, passes=2)
    asked = labels != -100
    assert asked.sum() == 7
    close(out.loss, torch.nn.functional.cross_entropy(out.logits[asked], labels[asked]))
    assert out.logits[:, :L].abs().sum() == 0 and out.logits[:, L:].abs().min() > 0


def test_logits_are_optional():
    model, tokens = tiny_model(), sequence(2 * L)
    labels = labels_at(tokens, [2 * L - 1])
    full = sl.sleep_forward(model, tokens, labels, window=L)
    bare = sl.sleep_forward(model, tokens, labels, window=L, return_logits=False)
    assert bare.logits is None and torch.equal(bare.loss, full.loss)


@pytest.mark.parametrize("eviction", ["hard", "keys", "sliding"])
def test_recomputing_windows_changes_nothing(eviction):
    tokens = sequence(3 * L + 1)
    labels = labels_at(tokens, [3 * L - 1, 3 * L])
    found = []
    for checkpoint in (False, True):
        model = tiny_model("ahja", (1, 2))
        options = dict(window=L, passes=3, eviction=eviction, checkpoint=checkpoint)
        out = sl.sleep_forward(model, tokens, labels, **options)
        out.loss.backward()
        found.append([out.loss.detach(), out.logits.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*found):
        assert torch.equal(a, b)


def test_without_fast_weights_sleep_only_evicts():
    model, tokens = tiny_model("aa"), sequence(L)
    state = sl.sleep(model, tokens, model.initial_state(2), passes=4)
    assert state == sl.LMState((None, None), position=L)
    assert count_blocks(sl.sleep, model, tokens, model.initial_state(2), passes=4) == 2 * L


@pytest.mark.parametrize("window", [1, 2, L, 3 * L])
def test_any_window(window):
    model, tokens = tiny_model(), sequence(2 * L)
    labels = labels_at(tokens, [2 * L - 1])
    for eviction in ("hard", "keys", "sliding"):
        out = sl.sleep_forward(model, tokens, labels, window=window, passes=2, eviction=eviction)
        truth = oracles.algorithm_1(weights(model), model.config, tokens, labels, window, 2, eviction)
        close(out.loss, truth[0])
        close(out.logits, truth[1])


def test_evict_drops_what_it_says():
    model = tiny_model("ag")
    _, state = model(sequence(2 * L), model.initial_state(2))
    assert state.kv[0][0].shape[1] == 2 * L and state.conv[1].shape[1] == 3
    hard, sliding = sl.evict(state), sl.evict(state, "sliding", window=L)
    assert hard == replace(state, kv=None, conv=None)
    assert sl.evict(state, "keys") == replace(state, kv=None)
    for full, kept in zip(state.kv[0], sliding.kv[0]):
        assert torch.equal(kept, full[:, L + 1 :])
    assert sliding.conv is state.conv and sliding.position == 2 * L
    assert sl.evict(hard, "sliding", window=L) is hard


def test_sleep_is_differentiable_in_the_state_and_the_parameters():
    model = tiny_model("gh")
    S = [s.requires_grad_() for s in model.initial_state(2).fast_weights]
    state = sl.sleep(model, sequence(L), replace(model.initial_state(2), fast_weights=tuple(S)), passes=2)
    total = sum(s.square().sum() for s in state.fast_weights)
    for g in torch.autograd.grad(total, [*S, model.layers[0].mixer.b.weight, model.embedding.weight]):
        assert g.abs().sum() > 0


CALLS = {
    "sleep": lambda m, t, **o: sl.sleep(m, t, m.initial_state(2), **o),
    "sleep_forward": lambda m, t, **o: sl.sleep_forward(m, t, labels_at(t, [L - 1]), **(dict(window=L) | o)),
    "Sleeper": lambda m, t, **o: sl.Sleeper(m, **(dict(window=L) | o)).feed(t),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "names, options",
    [
        ("passes must be an int .*; got 0 .to wake unslept", dict(passes=0)),
        ("passes must be .* got -1", dict(passes=-1)),
        ("passes must be .* got 2.0", dict(passes=2.0)),
        ("passes must be .* got True", dict(passes=True)),
        ("eviction must be one of hard, keys, sliding; got 'soft'", dict(eviction="soft")),
        ("window must be an int of at least 1; got 0", dict(window=0)),
        ("window must be .* got 2.5", dict(window=2.5)),
    ],
)
def test_bad_options_are_refused(call, names, options):
    with pytest.raises(ValueError, match=names):
        CALLS[call](tiny_model(), sequence(L), **options)


@pytest.mark.parametrize("truncate", [0, 1.0, True])
def test_a_bad_truncation_is_refused(truncate):
    with pytest.raises(ValueError, match="truncate must be an int of at least 1"):
        CALLS["sleep_forward"](tiny_model(), sequence(L), truncate=truncate)


def test_a_window_is_asked_for_where_it_is_needed():
    with pytest.raises(ValueError, match="window must be .* got None"):
        sl.evict(tiny_model().initial_state(1), "sliding")


@pytest.mark.parametrize(
    "error, names, change",
    [
        (ValueError, "labels .2, 9. must have the shape of inputs .2, 10.", lambda t, y: (t, y[:, :-1])),
        (ValueError, "labels .1, 10. must have the shape", lambda t, y: (t, y[:1])),  # would broadcast
        (TypeError, "labels must be an int64 tensor", lambda t, y: (t, y.float())),
        (TypeError, "labels must be an int64 tensor", lambda t, y: (t, y.tolist())),
        (TypeError, "inputs must be an int64 tensor", lambda t, y: (t.float(), y)),
        (ValueError, "inputs must have shape .B, T.", lambda t, y: (t[0], y[0])),
        (ValueError, "inputs must lie in", lambda t, y: (t + VOCAB, y)),
        (TypeError, "inputs must be an int64 tensor; got list", lambda t, y: (t.tolist(), y)),
        (ValueError, "labels must be -100 or lie in 0 .. 5", lambda t, y: (t, y.clamp(min=-1))),
        (ValueError, "labels must be -100 or lie in", lambda t, y: (t, y + VOCAB * (y >= 0))),
    ],
)
def test_bad_tensors_are_refused(error, names, change):
    tokens = sequence(2 * L)
    tokens, labels = change(tokens, labels_at(tokens, [2 * L - 1]))
    with pytest.raises(error, match=names):
        sl.sleep_forward(tiny_model(), tokens, labels, window=L)


def test_rows_that_disagree_are_refused():
    tokens = sequence(3 * L)
    labels = labels_at(tokens, [2 * L, 3 * L - 1])
    labels[1, 2 * L :] = -100
    with pytest.raises(ValueError, match=f"labels: rows disagree in chunk 2 .tokens {2 * L} "):
        sl.sleep_forward(tiny_model(), tokens, labels, window=L)


# Sleeper


def test_generate_feeds_back_its_own_choice():
    model, tokens = tiny_model(), sequence(L + 2)
    one, two = sl.Sleeper(model, window=L, passes=2), sl.Sleeper(model, window=L, passes=2)
    logits = one.feed(tokens)
    made = one.generate(2 * L)
    assert made.shape == (2, 2 * L) and made.dtype == torch.int64
    assert torch.equal(made[:, 0], logits[:, -1].argmax(-1))
    both = two.feed(torch.cat((tokens, made), dim=1))
    assert torch.equal(both[:, L + 1 : -1].argmax(-1), made)
    assert one.naps == two.naps == 3 and one.state.position == 3 * L + 2


def test_the_nap_comes_with_the_last_token_of_a_window():
    sleeper = sl.Sleeper(tiny_model(), window=L, passes=2)
    assert sleeper.state is None and sleeper.naps == 0 and sleeper.nbytes() == 0
    sleeper.feed(sequence(L - 1))
    assert sleeper.naps == 0 and sleeper.state.kv is not None
    sleeper.feed(sequence(1))
    assert sleeper.naps == 1 and sleeper.state.kv is None and sleeper.state.position == L


def test_a_model_without_fast_weights_keeps_nothing_for_a_nap():
    once, often = (sl.Sleeper(tiny_model("aa"), window=L, passes=n) for n in (1, 4))
    for sleeper in (once, often):
        sleeper.feed(sequence(L - 1))
    assert once.nbytes() == often.nbytes() > 0


def test_what_is_kept_of_a_window_keeps_the_rest_of_it_not_alive():
    model = tiny_model("agja")
    state = sl.sleep(model, sequence(50), model.initial_state(2), passes=2, eviction="keys")
    kept = [x for x in state.conv if x is not None]
    assert len(kept) == 2 and all(x.untyped_storage().nbytes() == x.nbytes for x in kept)


def test_a_sleeper_keeps_no_graph():
    sleeper = sl.Sleeper(tiny_model(), window=L, passes=2)
    assert not sleeper.feed(sequence(L + 1)).requires_grad
    assert not any(s.requires_grad for s in sleeper.state.fast_weights if s is not None)


def test_a_refused_feed_changes_nothing():
    model, tokens = tiny_model(), sequence(L)
    sleeper, other = (sl.Sleeper(model, window=L, passes=2) for _ in range(2))
    sleeper.feed(tokens[:, :2])
    other.feed(tokens[:, :2])
    for error, names, bad in (
        (ValueError, "tokens: the stream has 2 rows; got 1", tokens[:1]),
        (ValueError, "tokens must have shape", tokens[:, :0]),
        (TypeError, "tokens must be an int64 tensor", tokens.float()),
        (ValueError, "tokens must lie in", tokens + VOCAB),
    ):
        with pytest.raises(error, match=names):
            sleeper.feed(bad)
    assert torch.equal(sleeper.feed(tokens[:, 2:]), other.feed(tokens[:, 2:]))


def test_generate_needs_a_beginning_and_a_count():
    sleeper = sl.Sleeper(tiny_model(), window=L)
    with pytest.raises(ValueError, match="feed at least one token first"):
        sleeper.generate(1)
    sleeper.feed(sequence(1))
    with pytest.raises(ValueError, match="count must be"):
        sleeper.generate(0)


# On a GPU


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("eviction", ["hard", "keys", "sliding"])
def test_a_whole_step_on_cuda_is_the_one_on_the_cpu(eviction):
    tokens = sequence(3 * L + 1)
    labels = labels_at(tokens, [3 * L - 1, 3 * L])
    found = []
    for device in ("cpu", "cuda"):
        model = tiny_model("ahja", (1, 2)).to(device)
        out = sl.sleep_forward(model, tokens.to(device), labels, window=L, passes=3, eviction=eviction)
        out.loss.backward()
        sleeper = sl.Sleeper(model, window=L, passes=3, eviction=eviction)
        streamed = sleeper.feed(tokens.to(device))
        found.append([out.loss, out.logits, streamed, *(p.grad for p in model.parameters())])
    for a, b in zip(*found):
        close(b.cpu(), a)
