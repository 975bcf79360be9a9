"""The rivals of sleep: each against the equations written out, and every budget counted anew."""

import dataclasses
import json

import numpy as np
import oracles
import pytest
import torch
import torch.nn.functional as F
from tiny import VOCAB, WINDOW, close, labels_at, sequence, tiny_model, weights

import sleeplib as sl
from sleeplib import flops, kernels
from sleeplib.baselines import PassesConfig, PruneConfig, UntiedConfig
from sleeplib.experiments import Experiment, TrainConfig
from sleeplib.presets import SWEEPS, chosen
from sleeplib.training import Trainer
from sleeplib.ttt import TTTConfig

L = WINDOW
WAYS = ("replay", "frozen", "rewrite", "awake", "awake-cache")


def rival(kind, pattern="agag", seed=0, **settings):
    """A rival in float64, and the plain model with the same weights (as far as it has them)."""
    plain = tiny_model(pattern, seed=seed)
    config = {f.name: getattr(plain.config, f.name) for f in dataclasses.fields(plain.config)}
    model = kind(**config | settings).build().double()
    extra = model.load_state_dict(plain.state_dict(), strict=False)
    assert not extra.unexpected_keys
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in extra.missing_keys and "rate" not in name and p.ndim == 2:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model, plain


# Pruning


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("pattern", ["aaa", "agag"])
@pytest.mark.parametrize("keep, sinks", [(3, 0), (4, 2), (7, 1), (None, 0)])
def test_a_pruned_cache_is_the_tokens_that_were_kept(keep, sinks, pattern, passes):
    """The oracle keeps the inputs of those tokens, recomputes their keys, and counts positions among them."""
    model, plain = rival(PruneConfig, pattern, keep=keep, sinks=sinks)
    tokens = sequence(3 * L + 2)
    labels = labels_at(tokens, [3 * L, 3 * L + 1])
    out = sl.sleep_forward(model, tokens, labels, window=L, passes=passes)

    w, config = weights(plain), plain.config
    past, S = [None] * len(pattern), [None] * len(pattern)
    for start in range(0, 3 * L, L):
        h, read = w["embedding.weight"][tokens[:, start : start + L]], list(past)
        for _ in range(1 if set(pattern) == {"a"} else passes):
            for i in range(len(pattern)):
                h, read[i], S[i] = oracles.block(w, config, i, h, past[i], S[i])
        past = [x if kind == "a" else None for kind, x in zip(pattern, read)]
        if keep:
            past = [
                x if x is None or x.shape[1] <= keep else torch.cat((x[:, :sinks], x[:, sinks - keep :]), 1)
                for x in past
            ]
    h = w["embedding.weight"][tokens[:, 3 * L :]]
    for i in range(len(pattern)):
        h, _, _ = oracles.block(w, config, i, h, past[i], S[i])
    close(out.logits[:, 3 * L :], oracles.readout(w, h))
    for pair in out.state.kv:
        assert pair is None or pair[0].shape[1] == (keep or 3 * L)


def test_everything_kept_is_full_attention():
    model, plain = rival(PruneConfig, "aaa")
    tokens = sequence(3 * L + 2)
    out = sl.sleep_forward(model, tokens, labels_at(tokens, [3 * L, 3 * L + 1]), window=L, passes=1)
    whole, _ = oracles.one_pass(weights(plain), plain.config, tokens)
    close(out.logits[:, 3 * L :], whole[:, 3 * L :])


def heavy_by_hand(layer, x, base, keep):
    """One row of x (T, D), one window after the other: which positions stay, and the last window's output."""
    kept, new = [], keep - keep // 2
    for start in range(0, len(x), L):
        seen = [*kept, *range(start, min(start + L, len(x)))]
        position = torch.tensor(seen)
        q, k, v = (
            oracles.rotate((x[seen] @ z.weight.T).unflatten(-1, (2, -1))[None], position, base)
            for z in (layer.q, layer.k, layer.v)
        )
        v = (x[seen] @ layer.v.weight.T).unflatten(-1, (2, -1))[None]
        visible = position[:, None] >= position
        first = len(kept)
        y = oracles.attention(q[:, first:], k, v, visible[first:])[0].flatten(1) @ layer.o.weight.T
        received = torch.zeros(len(seen), dtype=x.dtype)
        q, k = q.detach(), k.detach()
        for t in range(first, len(seen)):
            scores = torch.einsum("hk,shk->hs", q[0, t], k[0, : t + 1]) * q.shape[3] ** -0.5
            received[: t + 1] += scores.softmax(-1).sum(0)
        if len(seen) > keep:
            old = sorted(range(len(seen) - new), key=lambda i: -float(received[i]))[: keep - new]
            seen = [seen[i] for i in sorted(old)] + seen[len(seen) - new :]
        kept = seen
    return kept, y


@pytest.mark.parametrize("keep", [2, 5, 6])
def test_heavy_hitters_are_the_keys_that_got_most_attention(keep):
    model, _ = rival(PruneConfig, "aa", keep=keep, how="heavy")
    layer = model.layers[0].mixer
    x = torch.randn(3, 3 * L, 16, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    memory = sl.LMState((None,)).block(0)
    for window in x.split(L, dim=1):
        y, memory = layer(window, memory)
    for row in range(3):
        kept, last = heavy_by_hand(layer, x[row], model.config.rope_base, keep)
        assert memory.ages[row].tolist() == [3 * L - p for p in kept]
        close(memory.kv[0][row].flatten(1), x[row][kept] @ layer.k.weight.T)
        close(y[row], last)


def test_the_question_does_not_push_out_what_was_kept_for_it():
    for how in ("recent", "heavy"):
        model, _ = rival(PruneConfig, "aaaa", keep=3, how=how)
        state = sl.sleep(model, sequence(L), model.initial_state(2), passes=1)
        _, after = model.predict(sequence(L, seed=3), state, 1)
        for before, now in zip(state.kv, after.kv):
            assert torch.equal(before[0], now[0]) and before[0].shape[1] == 3


def test_what_is_pruned_is_gone():
    """With one block a key knows its own token alone."""
    model, _ = rival(PruneConfig, "a", keep=2)
    one = sequence(2 * L + 1)
    two = one.clone()
    two[:, : 2 * L - 2] = (two[:, : 2 * L - 2] + 1) % VOCAB
    labels = labels_at(one, [2 * L])
    a, b = (sl.sleep_forward(model, x, labels, window=L, passes=1).logits[:, -1] for x in (one, two))
    assert torch.equal(a, b)
    two[:, 2 * L - 2] = (two[:, 2 * L - 2] + 1) % VOCAB
    assert not torch.equal(a, sl.sleep_forward(model, two, labels, window=L, passes=1).logits[:, -1])


# Passes, spent otherwise


@pytest.mark.parametrize("how", WAYS)
def test_one_pass_of_any_kind_is_the_plain_hybrid(how):
    model, plain = rival(PassesConfig, how=how)
    tokens = sequence(2 * L + 2)
    labels = labels_at(tokens, [2 * L, 2 * L + 1])
    out, ours = (sl.sleep_forward(m, tokens, labels, window=L, passes=1) for m in (plain, model))
    if how != "awake-cache":
        assert torch.equal(out.logits, ours.logits)
    for kv in ours.state.kv or ():
        assert kv is None or kv[0].shape[1] == 2 * L


def test_replay_is_sleep_of_one_pass_again_and_again():
    model, plain = rival(PassesConfig, how="replay")
    state = slept = plain.initial_state(2)
    for window in sequence(2 * L).split(L, dim=1):
        state = sl.sleep(model, window, state, passes=3)
        for _ in range(3):
            slept = sl.sleep(plain, window, slept, passes=1)
        for a, b in zip(state.fast_weights, slept.fast_weights):
            assert a is b is None or torch.equal(a, b)
    assert state.position == 2 * L


def test_frozen_passes_think_on_the_boundarys_fast_weight_and_the_last_one_writes():
    model, plain = rival(PassesConfig, how="frozen")
    state = by_hand = plain.initial_state(2)
    for window in sequence(2 * L).split(L, dim=1):
        state = sl.sleep(model, window, state, passes=3)
        h = plain.embed(window)
        for _ in range(3):
            h, after = plain.blocks(h, by_hand)
        by_hand = after.evict("hard")
        for a, b in zip(state.fast_weights, by_hand.fast_weights):
            assert a is b is None or torch.equal(a, b)


def test_rewriting_is_the_rule_on_the_same_keys_and_values():
    model, plain = rival(PassesConfig, "g", how="rewrite")
    tokens, (block,) = sequence(L), plain.layers
    state = sl.sleep(model, tokens, model.initial_state(2), passes=3)
    seen = []

    def record(*args, **kwargs):
        seen.append((args, kwargs))
        return kernels.gated_delta_rule(*args, **kwargs)

    block.mixer.rule = record
    sl.sleep(plain, tokens, plain.initial_state(2), passes=1)
    (qkv, options) = seen[0]
    S = None
    for _ in range(3):
        _, S = kernels.gated_delta_rule(*qkv, **options | dict(initial_state=S))
    close(state.fast_weights[0], S)


def test_n_steps_of_the_delta_rule_are_gradient_steps():
    """Without decay and at one token: S - beta dL/dS, L = |S^T k - v|^2 / 2, is what the rule writes."""
    S = torch.randn(1, 1, 4, 6, dtype=torch.float64, requires_grad=True)
    k, v = F.normalize(torch.randn(1, 1, 1, 4).double(), dim=-1), torch.randn(1, 1, 1, 6).double()
    beta, g = (torch.full((1, 1, 1), x, dtype=torch.float64) for x in (0.3, 0.0))
    by_rule = by_gradient = S
    for _ in range(3):
        _, by_rule = kernels.gated_delta_rule(k, k, v, g=g, beta=beta, initial_state=by_rule)
        loss = 0.5 * (torch.einsum("bhkv,bthk->bthv", by_gradient, k) - v).square().sum()
        by_gradient = by_gradient - 0.3 * torch.autograd.grad(loss, by_gradient, create_graph=True)[0]
    close(by_rule, by_gradient)


@pytest.mark.parametrize("how", ["awake", "awake-cache"])
def test_passes_after_the_question(how):
    model, plain = rival(PassesConfig, how=how)
    tokens = sequence(2 * L + 3)
    labels = labels_at(tokens, [2 * L + 1])
    out = sl.sleep_forward(model, tokens, labels, window=L, passes=3)
    state = plain.initial_state(2)
    for window in tokens[:, : 2 * L].split(L, dim=1):
        _, state = plain.blocks(plain.embed(window), state)
        state = state.evict("hard") if how == "awake" else dataclasses.replace(state, conv=None)
    h = plain.embed(tokens[:, 2 * L :])
    for _ in range(3):
        h, _ = plain.blocks(h, state)
    close(out.logits[:, 2 * L :], plain.readout(h))


ARMS = [(PassesConfig, dict(how=how)) for how in WAYS] + [(UntiedConfig, dict(sets=3)), (TTTConfig, {})]
ARMS += [(PruneConfig, dict(keep=3)), (PruneConfig, dict(keep=4, how="heavy")), (PruneConfig, {})]


@pytest.mark.parametrize("kind, settings", ARMS, ids=lambda x: getattr(x, "__name__", str(x)))
def test_no_answer_is_read_from_the_tokens_after_it(kind, settings):
    """Answers are teacher-forced: the token that follows a question is its answer."""
    model, _ = rival(kind, "aaaa" if kind is TTTConfig else "agag", **settings)
    tokens = sequence(2 * L + 4)
    labels = labels_at(tokens, range(2 * L, 2 * L + 4))
    other = tokens.clone()
    other[:, 2 * L + 2 :] = (other[:, 2 * L + 2 :] + 1) % VOCAB
    a, b = (sl.sleep_forward(model, x, labels, window=L, passes=3).logits for x in (tokens, other))
    close(a[:, 2 * L : 2 * L + 2], b[:, 2 * L : 2 * L + 2])
    assert not torch.allclose(a[:, 2 * L + 2 :], b[:, 2 * L + 2 :])


def test_untied_passes_with_equal_weights_are_sleep():
    model, plain = rival(UntiedConfig, sets=3)
    for blocks in model.earlier:
        blocks.load_state_dict(model.layers.state_dict())
    tokens = sequence(2 * L + 2)
    labels = labels_at(tokens, [2 * L])
    ours, theirs = (sl.sleep_forward(m, tokens, labels, window=L, passes=3) for m in (model, plain))
    assert torch.equal(ours.logits, theirs.logits)
    with torch.no_grad():
        model.earlier[0][0].mlp.down.weight.add_(0.1)
    assert not torch.equal(sl.sleep_forward(model, tokens, labels, window=L, passes=3).logits, theirs.logits)
    with pytest.raises(ValueError, match="passes must be 3"):
        sl.sleep(model, tokens[:, :L], model.initial_state(2), passes=2)


# Test-time training


def inner_steps_by_hand(model, tokens, steps):
    """One row at a time: the weights after some gradient steps, and how a question would be answered."""
    block, (*others, _) = model.layers[-1], model.layers
    weights = []
    for row in tokens:
        state = model.initial_state(1)
        h = model.embed(row[None])
        for i, other in enumerate(others):
            h, _ = other(h, state.block(i))
        h = h + block.mixer(block.mixer_norm(h), state.block(0)._replace(S=None))[0]
        x = block.mlp_norm(h)
        W = [block.first.gate.weight, block.first.up.weight, block.first.down.weight]
        for _ in range(steps):
            fast = (F.silu(x @ W[0].T) * (x @ W[1].T)) @ W[2].T
            y = oracles.rms_norm(h + block.mlp(x) + fast, model.norm.weight, 1e-6) @ model.head.weight.T
            loss = -y[0, :-1].log_softmax(-1)[range(len(row) - 1), row[1:]].sum()
            gradients = torch.autograd.grad(loss, W, create_graph=True)
            W = [w - rate * g for w, rate, g in zip(W, block.log_rate.exp(), gradients)]
        weights.append(torch.stack((W[0].T, W[1].T, W[2])))
    return torch.stack(weights)


@pytest.mark.parametrize("fast_size", [None, 5])
def test_test_time_training_is_gradient_descent_on_the_next_token(fast_size):
    model, _ = rival(TTTConfig, "aaaa", fast_size=fast_size)
    tokens = sequence(L)
    for steps in (1, 3):
        with kernels.use_numba(False):
            wanted = inner_steps_by_hand(model, tokens, steps)
        state = sl.sleep(model, tokens, model.initial_state(2), passes=steps)
        close(state.fast_weights[-1], wanted)
        with torch.no_grad():
            same = sl.sleep(model, tokens, model.initial_state(2), passes=steps)
        close(same.fast_weights[-1], wanted.detach())
        assert not same.fast_weights[-1].requires_grad
        assert state.kv is None and [S is None for S in state.fast_weights] == [True] * 3 + [False]


def test_test_time_training_is_trained_through_its_steps():
    """Second order: the outer gradients against differences, also by the first weights and rates."""
    model, _ = rival(TTTConfig, "aaaa")
    tokens = sequence(2 * L + 1)
    labels = labels_at(tokens, [2 * L])

    def loss():
        return sl.sleep_forward(model, tokens, labels, window=L, passes=2).loss

    block = model.layers[-1]
    chosen = [
        block.first.gate.weight,
        block.first.down.weight,
        block.log_rate,
        model.layers[0].mixer.q.weight,
    ]
    for p, gradient in zip(chosen, torch.autograd.grad(loss(), chosen)):
        index, step = (0,) * p.ndim, 1e-5
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                p[index] += sign * step
            ends.append(loss().item())
            with torch.no_grad():
                p[index] -= sign * step
        assert abs((ends[0] - ends[1]) / (2 * step) - gradient[index].item()) < 1e-7
        assert gradient.abs().max() > 1e-6


@pytest.mark.parametrize("how", ["truncate", "checkpoint", "frozen", "fast"])
def test_test_time_training_learns_also_where_its_own_training_is_cut(how):
    """The inner steps need a gradient of their own, whatever is trained from outside."""
    model, _ = rival(TTTConfig, "aaaa")
    tokens = sequence(3 * L + 1)
    labels = labels_at(tokens, [3 * L])

    def run(**options):
        model.zero_grad()
        out = sl.sleep_forward(model, tokens, labels, window=L, passes=2, **options)
        if out.loss.requires_grad:
            out.loss.backward()
        assert out.loss.requires_grad == out.state.fast_weights[-1].requires_grad == (how != "frozen")
        return out.logits, [p.grad for p in model.parameters()]

    if how == "frozen":
        with torch.no_grad():
            logits = sl.sleep_forward(model, tokens, labels, window=L, passes=2).logits
        model.requires_grad_(False)
    else:
        logits, gradients = run()
    if how == "fast":
        model.learn("fast")
    cut, after = run(**{"truncate": dict(truncate=1), "checkpoint": dict(checkpoint=True)}.get(how, {}))
    close(cut, logits)
    if how == "checkpoint":
        for a, b in zip(after, gradients, strict=True):
            close(a, b)
    trained = {name for (name, _), g in zip(model.named_parameters(), after, strict=True) if g is not None}
    fast = {"layers.3.log_rate", *(f"layers.3.first.{name}.weight" for name in ("gate", "up", "down"))}
    assert how != "fast" or trained == fast
    with torch.inference_mode(), pytest.raises(RuntimeError, match="no_grad"):
        run()


def test_untied_passes_learn_all_their_fast_weights_first():
    model, plain = rival(UntiedConfig, sets=3)
    assert len(model.fast_parameters()) == 3 * len(plain.fast_parameters()) > 0
    assert {id(p) for p in model.earlier[0][1].mixer.parameters()} < {id(p) for p in model.fast_parameters()}


@pytest.mark.parametrize("kind, settings", ARMS, ids=lambda x: getattr(x, "__name__", str(x)))
def test_a_window_that_is_still_open_is_read_once_and_kept(kind, settings, monkeypatch):
    model, _ = rival(kind, "aaaa" if kind is TTTConfig else "agag", **settings)
    tokens = sequence(L + 2)
    labels = torch.full_like(tokens, -100)
    state = sl.sleep_forward(model, tokens[:, :L], labels[:, :L], window=L, passes=3).state
    reads = []
    monkeypatch.setattr(model, "readout", lambda h: pytest.fail("nothing is asked"))
    model.layers[0].register_forward_hook(lambda *_: reads.append(1))
    with torch.no_grad():
        after = sl.sleep_forward(model, tokens[:, L:], labels[:, L:], window=L, passes=3, state=state).state
    assert len(reads) == 1 and after.position == L + 2
    with pytest.raises(ValueError, match="^window must be an int of at least 1; got 0"):
        sl.sleep(model, tokens[:, :L], state, passes=3, window=0)
    before = 0 if state.kv is None or state.kv[0] is None else state.kv[0][0].shape[1]
    most = settings.get("keep") or before + 2
    assert after.kv[0][0].shape[1] == min(before + 2, most) > 0


def test_its_loss_carries_no_signal_on_rule_110_and_some_on_depo():
    """Rule 110's bits are fair coins: none predicts the next.  In Depo it is an edge's end, as asked."""
    cells = sl.tasks.Rule110(12, 2, 6).batch(20_000, np.random.default_rng(0)).inputs[:, :12]
    share = (cells[:, 1:] == cells[:, :-1]).float().mean(0)
    assert ((share - 0.5).abs() < 0.02).all()
    task = sl.experiments.get("depo-ablation-ring8").task
    edges = task.batch(2000, np.random.default_rng(0)).inputs[:, : task.context].unflatten(1, (-1, 2))
    ring = [dict(row.tolist()) for row in edges]
    assert all(len(r) == 8 and set(r) == set(r.values()) for r in ring)


# Records, files, errors


KINDS = {
    "prune": (PruneConfig, dict(pattern="aa", keep=3), 1),
    "heavy": (PruneConfig, dict(pattern="aa", keep=3, how="heavy"), 1),
    **{how: (PassesConfig, dict(pattern="ag", how=how), 2) for how in WAYS},
    "untied": (UntiedConfig, dict(pattern="ag", sets=2), 2),
    "ttt": (TTTConfig, dict(pattern="aaaa", fast_size=5), 2),
}


def tiny_experiment(kind):
    cls, settings, passes = KINDS[kind]
    task = sl.tasks.Rule110(width=5, strings=2, steps=1)
    model = cls(vocab_size=4, d_model=16, num_heads=2, mlp_size=16, **settings)
    return Experiment(f"tiny-{kind}", task, model, TrainConfig(4, 8, eval_every=2, eval_batch=8)), passes


@pytest.mark.parametrize("kind", KINDS)
def test_a_rival_is_trained_recorded_and_kept_as_any_model_is(kind, tmp_path):
    experiment, passes = tiny_experiment(kind)
    options = dict(out=tmp_path, progress=False, threads=1)
    piece = sl.run(experiment, passes, stop_after=2, **options)
    assert piece["status"].startswith("stopped")
    record = sl.run(experiment, passes, resume=True, keep=tmp_path / "kept", **options)
    assert record["status"] == "done"
    whole = sl.run(experiment, passes, out=tmp_path / "whole", progress=False, threads=1)
    assert record["curve"] == whole["curve"] and record["final"] == whole["final"]
    assert record["config"]["model"]["kind"] == KINDS[kind][0].__name__
    kept = tmp_path / "kept" / experiment.name / f"N{passes}-seed0"
    again = type(experiment.model.build()).from_checkpoint(kept)
    assert again.config == experiment.model
    assert json.loads((kept / "config.json").read_text()) == dataclasses.asdict(experiment.model) | {
        "loop": None
    }


def test_every_hidden_matrix_of_a_rival_is_muons():
    for kind in ("untied", "ttt"):
        trainer = Trainer(tiny_experiment(kind)[0], 2, 0, "cpu")
        muon = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
        names = {n for n, p in trainer.model.named_parameters() if id(p) in muon}
        hidden = "earlier.0.0.mlp.up.weight" if kind == "untied" else "layers.3.first.gate.weight"
        assert hidden in names and "layers.0.mixer.q.weight" in names
        assert not names & {"embedding.weight", "head.weight", "layers.1.mixer.conv.weight"}


def test_a_hash_tells_a_rival_from_the_model_that_it_is_built_on():
    plain = sl.experiments.get("rule110-quick")
    fields = dataclasses.asdict(plain.model)
    kinds = (PruneConfig, PassesConfig, UntiedConfig)
    rivals = [dataclasses.replace(plain, model=kind(**fields)) for kind in kinds]
    assert len({e.config_hash() for e in (plain, *rivals)}) == 4
    assert rivals[0].replace({"model.keep": "3"}).model.keep == 3


@pytest.mark.parametrize(
    "kind, settings, match",
    [
        (PruneConfig, dict(keep=0), "keep"),
        (PruneConfig, dict(how="newest"), "how"),
        (PruneConfig, dict(keep=3, sinks=3), "sinks"),
        (PruneConfig, dict(keep=3, how="heavy", sinks=1), "sinks"),
        (PruneConfig, dict(sinks=1), "sinks"),
        (PassesConfig, dict(how="asleep"), "how"),
        (PassesConfig, dict(loop=(0, 1)), "loop"),
        (UntiedConfig, dict(sets=0), "sets"),
        (UntiedConfig, dict(loop=(0, 1)), "loop"),
        (TTTConfig, dict(pattern="agag"), "pattern"),
        (TTTConfig, dict(pattern="aaa"), "pattern"),
        (TTTConfig, dict(fast_size=0), "fast_size"),
        (TTTConfig, dict(inner_lr=0.0), "inner_lr"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(kind, settings, match):
    with pytest.raises(ValueError, match=match):
        kind(vocab_size=4, d_model=16, num_heads=2, **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rival_does_not_stream(kind):
    with pytest.raises(TypeError, match="stream"):
        sl.Sleeper(tiny_experiment(kind)[0].model.build(), window=5, passes=2)


# Budgets: what chapter 15 says of them


def presets(arm, task="rule110"):
    """The experiments of an arm's sweep: they differ in the rate alone."""
    found = [sl.experiments.get(name) for name in SWEEPS[f"{task}-{arm}"].values()]
    assert len({e.replace(muon_lr=1.0).config_hash() for e in found}) == 1
    assert [e.train.muon_lr for e in found] == [float(rate) for rate in SWEEPS[f"{task}-{arm}"]]
    return found


BYTES = dict(recent2=1 / 4, recent4=1 / 2, recent8=1, sinks8=1, heavy8=1, recent16=2, full=3, hybrid8=1.5)
BYTES |= {"ttt-small": 1, "ttt": 6, "state": 1 / 4, "deep": 4, "wide": 1, "awake-cache": 3}
BYTES |= dict.fromkeys(("rewrite", "replay", "frozen", "awake", "untied"), 1)
WORK = {"ttt": (8, 1), "frozen": (4, 1), "untied": (4, 1), "wide": (1, 1), "hybrid8": (4, 1)}
PARAMETERS = dict(rewrite=1, replay=1, frozen=1, awake=1, hybrid8=1, untied=4, deep=4, wide=4.5)


@pytest.mark.parametrize("arm", BYTES)
def test_bytes_carried(arm):
    """As a multiple of those that sleep carries, which are the same for every N."""
    sleep = flops.carried_bytes("rule110-quick", 4)
    assert sleep == flops.carried_bytes("rule110-quick", 1) == 2 * 4 * 16 * 32 * 4
    experiment = presets(arm)[0]
    for passes in experiment.passes:
        assert flops.carried_bytes(experiment, passes) / sleep == pytest.approx(BYTES[arm], rel=0.02)


@pytest.mark.parametrize("arm", WORK)
def test_operations_equal_to_those_of_sleep(arm):
    passes, ratio = WORK[arm]
    budget = flops.training_flops("rule110-quick", 4)
    assert flops.training_flops(presets(arm)[0], passes) / budget == pytest.approx(ratio, rel=0.03)


def test_the_deep_model_has_more_operations_and_the_others_fewer():
    budget = flops.training_flops("rule110-quick", 4)
    assert flops.training_flops(presets("deep")[0], 1) / budget == pytest.approx(1.06, abs=0.01)
    for arm in ("recent8", "rewrite", "replay", "awake", "awake-cache", "ttt-small", "state"):
        experiment = presets(arm)[0]
        assert flops.training_flops(experiment, experiment.passes[-1]) < 0.9 * budget


# On Depo: (bytes, operations, parameters) as multiples of what sleep has at N = 4.
ON_DEPO = dict(recent8=(1, 0.39, 0.82), heavy8=(1.02, 0.40, 0.82), full=(2, 0.40, 0.82), frozen=(1, 0.98, 1))
ON_DEPO |= {"rewrite": (1, 0.67, 1), "replay": (1, 0.90, 1), "awake-cache": (2, 1.24, 0.82)}
ON_DEPO |= {"ttt": (6, 0.98, 0.94), "sleep": (1, 1, 1)}  # each with the largest N that it is run with


@pytest.mark.parametrize("arm", ON_DEPO)
def test_budgets_on_depo(arm):
    sleep = sl.experiments.get("depo-ablation-ring8")
    experiment = presets(arm, "depo")[0]
    passes = experiment.passes[-1]
    counts = [
        flops.carried_bytes(experiment, passes) / flops.carried_bytes(sleep, 4),
        flops.training_flops(experiment, passes) / flops.training_flops(sleep, 4),
        flops.parameters(experiment) / flops.parameters(sleep),
    ]
    assert counts == pytest.approx(ON_DEPO[arm], rel=0.015)


@pytest.mark.parametrize("arm", PARAMETERS)
def test_parameters(arm):
    ratio = flops.parameters(presets(arm)[0]) / flops.parameters("rule110-quick")
    assert ratio == pytest.approx(PARAMETERS[arm], rel=0.01)


@pytest.mark.parametrize("arm", chosen)
def test_the_rate_of_an_arm_is_the_best_of_its_sweep(arm):
    """On seed 0 by `exact`, and where that is level by `token`; every rate of the sweep is recorded."""
    best = set()
    for passes in sl.experiments.get([*SWEEPS[arm].values()][0]).passes:
        found = {}
        for rate, preset in SWEEPS[arm].items():
            if passes not in sl.experiments.get(preset).passes:
                continue  # a rate beyond the sweep, for the N that was best at its end
            (record,) = [r for r in sl.load_records(preset, passes) if r["seed"] == 0]
            found[rate] = [record["final"][key] for key in ("exact", "token")]
        best.add(max(found, key=found.get))
    assert best == set(chosen[arm].split())


@pytest.mark.parametrize("passes", [1, 4])
@pytest.mark.parametrize("preset", ["rule110-quick", "depo-quick"])
def test_the_two_counts_of_operations_agree(preset, passes):
    counted, derived = flops.counted_flops(preset, passes), flops.training_flops(preset, passes)
    assert counted / derived == pytest.approx(1, abs=0.05)
