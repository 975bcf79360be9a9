"""Planted faults, each with the truth that must catch it.

A mutant is a context in which sleeplib is wrong in one way.  ``MUTANTS`` maps its name to the context and to
the name of a check in test_truths.py; a test shows that the check passes outside and fails inside.
"""

from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import torch

import sleeplib as sl
from sleeplib import algorithm, layers, training
from sleeplib.kernels import chunked, reference, wy
from sleeplib.model import Block
from sleeplib.tasks import depo, rule110

MUTANTS = {}
PLANTED = []  # where: (target, name of the attribute)


def mutant(check):
    def register(f):
        MUTANTS[f.__name__] = (contextmanager(f), check)
        return f

    return register


def plant(check, target, name, fault):
    """Register fault(honest, *args) in the place of the attribute `name` of `target`."""

    def register(label):
        MUTANTS[label] = (partial(wrapped, target, name, fault), check)
        PLANTED.append((target, name))

    return register


@contextmanager
def wrapped(target, name, fault):
    honest = getattr(target, name)

    def faulty(*args, **kwargs):
        return fault(honest, *args, **kwargs)

    with patch.object(target, name, faulty):
        yield


def no_change(honest, *args, **kwargs):
    return honest(*args, **kwargs)


@contextmanager
def honest_scaffold():
    """Right code in the clothes of all mutants: a check that fails here looks at the clothes."""
    with ExitStack() as stack:
        for target, name in dict.fromkeys(PLANTED):
            stack.enter_context(wrapped(target, name, no_change))
        stack.enter_context(honest_rewrite())
        stack.enter_context(fault_in_evict(no_change)())
        yield


def detached(tensors):
    return tuple(None if x is None else x.detach() for x in tensors)


# What goes wrong between the passes of one sleep


def rewritten_blocks(between, spans=None, caches="last"):
    """`Sleepable.blocks`, written again, with `between(h, S, start, ...)` before each repeated pass."""

    def blocks(self, h, state, passes=1, window=None, write_only=False):
        first, last = self.loop
        depth, position = len(self.layers), state.position + h.shape[1]
        looped = range(first, last + 1)
        order = [range(first), *[looped] * passes, range(last + 1, depth)]
        if spans == "all":
            order = [range(0), *[range(depth)] * passes, range(0)]
        start, now, embedded, seen = state.blocks(), state.blocks(), h, set()
        for n, span in enumerate(order):
            if n == 1:
                embedded = h
            before, S = start, [m.S for m in now]
            if 1 < n <= passes:
                h, S, before = between(h, S, start, embedded, now)
            h, after = self.run(h, [m._replace(S=s) for m, s in zip(before, S)], span, window)
            for i in span:
                now[i] = after[i] if caches == "last" or i not in seen else now[i]._replace(S=after[i].S)
            seen |= set(span)
        return h, sl.LMState.from_blocks(now, position)

    return blocks


def fast_weights(memories):
    return [m.S for m in memories]


BETWEEN = {
    "re_embeds_every_pass": lambda h, S, start, embedded, now: (embedded, S, start),
    "adds_the_embedding_every_pass": lambda h, S, start, embedded, now: (h + embedded, S, start),
    "resets_S_between_passes": lambda h, S, start, embedded, now: (h, fast_weights(start), start),
    "detaches_S_between_passes": lambda h, S, start, embedded, now: (h, detached(S), start),
    "detaches_h_between_passes": lambda h, S, start, embedded, now: (h.detach(), S, start),
    "a_pass_sees_the_keys_of_the_pass_before": lambda h, S, start, embedded, now: (h, S, now),
}


def no_fault(h, S, start, embedded, now):
    return h, S, start


def honest_rewrite():
    """The rewritten blocks without a fault."""
    return patch.object(sl.Sleepable, "blocks", rewritten_blocks(no_fault))


for label, between in BETWEEN.items():
    MUTANTS[label] = (
        partial(patch.object, sl.Sleepable, "blocks", rewritten_blocks(between)),
        "check_sleep_is_algorithm_1",
    )
for label, options in {
    "an_unlooped_block_runs_N_times": dict(spans="all"),
    "keeps_the_caches_of_the_first_pass": dict(caches="first"),
}.items():
    MUTANTS[label] = (
        partial(patch.object, sl.Sleepable, "blocks", rewritten_blocks(no_fault, **options)),
        "check_sleep_is_algorithm_1",
    )


# Sleep and eviction


def fault_in_evict(fault):
    """`evict` is a method of the state and a name of sleeplib."""

    @contextmanager
    def context():
        honest = sl.LMState.evict

        def evict(state, eviction="hard", window=None):
            return fault(honest, state, eviction, window)

        with patch.object(sl.LMState, "evict", evict), patch.object(sl, "evict", evict):
            yield

    return context


def keep_other_than_window(change):
    def fault(honest, state, eviction, window):
        return honest(state, eviction, window + change if eviction == "sliding" else window)

    return fault


MUTANTS |= {
    "leaks_keys_over_hard_eviction": (
        fault_in_evict(lambda honest, state, *rest: replace(honest(state, *rest), kv=state.kv)),
        "check_nothing_survives_eviction",
    ),
    "leaks_the_convolution_context": (
        fault_in_evict(lambda honest, state, *rest: replace(honest(state, *rest), conv=state.conv)),
        "check_nothing_survives_eviction",
    ),
    "forgets_S_at_eviction": (
        fault_in_evict(
            lambda honest, state, *rest: replace(
                honest(state, *rest),
                fast_weights=tuple(s if s is None else 0 * s for s in state.fast_weights),
            )
        ),
        "check_n1_is_the_plain_hybrid",
    ),
    "detaches_S_at_eviction": (
        fault_in_evict(
            lambda honest, state, *rest: replace(
                honest(state, *rest), fast_weights=detached(state.fast_weights)
            )
        ),
        "check_gradient_flows_only_through_S",
    ),
    "keys_leak_a_gradient": (
        fault_in_evict(lambda honest, state, *rest: replace(honest(state, *rest), kv=state.kv)),
        "check_gradient_flows_only_through_S",
    ),
    "slides_one_key_too_few": (
        fault_in_evict(keep_other_than_window(-1)),
        "check_sliding_n1_is_window_attention",
    ),
    "slides_one_key_too_many": (
        fault_in_evict(keep_other_than_window(1)),
        "check_carried_bytes_are_constant",
    ),
}

plant(
    "check_sliding_n1_is_window_attention",
    layers.Attention,
    "forward",
    lambda honest, self, x, memory, window=None, *rest: honest(self, x, memory, window and window + 1, *rest),
)("a_query_sees_one_key_too_many")

plant(
    "check_n1_is_the_plain_hybrid",
    algorithm,
    "sleep",
    lambda honest, model, tokens, state, passes, *rest: honest(model, tokens, state, passes + 1, *rest),
)("sleeps_one_pass_too_many")

plant(
    "check_sleep_is_algorithm_1",
    algorithm,
    "sleep",
    lambda honest, model, tokens, state, passes, *rest: honest(model, tokens, state, 1, *rest),
)("sleeps_only_once")

plant(
    "check_a_cut_at_a_boundary_changes_nothing",
    sl,
    "sleep_forward",
    lambda honest, *args, state=None, **options: honest(*args, **options),
)("starts_over_at_every_call")


def labels_a_token_late(honest, model, inputs, labels, *, window, **options):
    """In each chunk, so that none gains or loses its labels, which would be an error of its own."""
    late = torch.cat([chunk.roll(1, dims=1) for chunk in labels.split(window, dim=1)], dim=1)
    return honest(model, inputs, late, window=window, **options)


def question_before_sleep(honest, model, inputs, labels, *, window, state=None, **options):
    """The state at the start has read the last chunk."""
    start = model.initial_state(len(inputs)) if state is None else state
    _, read = model(inputs[:, -((inputs.shape[1] - 1) % window + 1) :], start)
    start = replace(start, fast_weights=read.fast_weights)
    return honest(model, inputs, labels, window=window, state=start, **options)


plant("check_sleep_is_algorithm_1", sl, "sleep_forward", labels_a_token_late)("labels_off_by_one")
plant("check_sleep_is_algorithm_1", sl, "sleep_forward", question_before_sleep)(
    "sees_the_question_before_it_sleeps"
)


@mutant("check_wake_cost_does_not_depend_on_N")
def sleeps_N_times_on_prediction():
    asked, honest, honest_blocks = [], sl.sleep_forward, sl.Sleepable.blocks

    def remember(model, inputs, labels, **options):
        asked.append(options["passes"])
        return honest(model, inputs, labels, **options)

    def blocks(self, h, state, passes=1, window=None, write_only=False):
        passes = passes if write_only or not asked else asked[-1]
        return honest_blocks(self, h, state, passes, window, write_only)

    with patch.object(sl, "sleep_forward", remember), patch.object(sl.Sleepable, "blocks", blocks):
        yield


TRUNCATION = "check_truncation_cuts_before_every_nth_nap"


def with_truncate(change):
    def fault(honest, *args, truncate=None, **options):
        return honest(*args, truncate=truncate if truncate is None else change(truncate), **options)

    return fault


plant(TRUNCATION, sl, "sleep_forward", with_truncate(lambda n: None))("never_truncates")
plant(TRUNCATION, sl, "sleep_forward", with_truncate(lambda n: n + 1))("truncates_a_nap_late")
plant(TRUNCATION, sl, "sleep_forward", with_truncate(lambda n: max(1, n - 1)))("truncates_a_nap_early")
plant(TRUNCATION, sl.LMState, "detach", lambda honest, self: honest(self)._map(torch.zeros_like))(
    "truncation_forgets_S"
)


# The stream


def wake_with_all_passes(honest, self, h, stream):
    for _ in range(self.passes - 1):
        self.model.run(h, stream.state.blocks(), range(len(self.model.layers)), self._key_window())
    return honest(self, h, stream)


def nap_with(passes=0, boundary=False, forget=False):
    def nap(honest, self, stream):
        if forget:
            state = replace(stream.state, kv=None, conv=None)
            return replace(stream, state=state, boundary=state, read=(), naps=stream.naps + 1)
        more = passes if stream.read else 0  # with one pass nothing is kept that another could start from
        self._passes += more
        stream = honest(self, replace(stream, boundary=stream.state) if boundary else stream)
        self._passes -= more
        return stream

    return nap


def hoard(honest, self, stream):
    self.hoard = [*getattr(self, "hoard", []), *stream.read]
    return honest(self, stream)


def wrong_window(honest, self, model, *, window, **options):
    honest(self, model, window=window + 1, **options)


def bytes_without_what_was_read(honest, self):
    stream, self._stream = self._stream, replace(self._stream, read=())
    try:
        return honest(self)
    finally:
        self._stream = stream


def feed_keeping_all_logits(honest, self, tokens):
    logits = honest(self, tokens)
    self._stream = replace(self._stream, last=logits[:, -1])  # a view keeps all of them alive
    return logits


STREAMING = "check_streaming_is_algorithm_1"
BYTES = "check_carried_bytes_are_constant"
plant("check_wake_cost_does_not_depend_on_N", sl.Sleeper, "_wake", wake_with_all_passes)("wakes_N_times")
plant(STREAMING, sl.Sleeper, "_nap", nap_with(passes=1))("a_nap_adds_N_passes")
plant(STREAMING, sl.Sleeper, "_nap", nap_with(boundary=True))("a_nap_sees_its_window_twice")
plant(STREAMING, sl.Sleeper, "_nap", nap_with(forget=True))("never_naps")
plant(STREAMING, sl.Sleeper, "__init__", wrong_window)("naps_a_token_late")
plant(BYTES, sl.Sleeper, "_nap", hoard)("hoards_what_it_read")
plant(BYTES, sl.Sleeper, "nbytes", bytes_without_what_was_read)("counts_bytes_without_the_open_window")
plant(BYTES, sl.Sleeper, "feed", feed_keeping_all_logits)("keeps_all_logits_alive")


# Kernels and layers

BACKENDS = "check_backends_agree"


def decay_a_little_more(honest, q, k, v, g, *rest, **options):
    return honest(q, k, v, g * 1.001, *rest, **options)


def read_before_the_decay(honest, q, k, v, g, beta, S, *rest):
    return honest(q, k, v, torch.cat((0 * g[:, :1], g[:, 1:]), dim=1), beta, S, *rest)


def decay_after_the_write(honest, q, k, v, g, beta, S, *rest):
    late = torch.cat((0 * g[:, :1], g[:, :-1]), dim=1)
    o, S = honest(q, k, v, late, beta, S, *rest)
    return o, S * g[:, -1].to(S.dtype).exp()[..., None, None]


def last_state_without_gradient(honest, *args):
    o, S = honest(*args)
    return o, S.detach().requires_grad_()


def wrong_gradient_of_g(honest, *args):
    honest(*args)
    args[-2][...] *= 1.001  # dg


def wrong_gradient_of_the_last_g(honest, *args):
    honest(*args)
    args[-1][...] *= 1.001  # dg


def round_a_float32_state(honest, *args):
    o, S = honest(*args)
    return o, S.bfloat16().float() if S.dtype == torch.float32 else S


plant(BACKENDS, chunked, "recurrence", decay_a_little_more)("chunked_decays_too_much")
plant(BACKENDS, reference, "recurrence", read_before_the_decay)("reference_forgets_the_first_decay")
plant(BACKENDS, reference, "recurrence", decay_after_the_write)("decays_after_the_write")
plant(BACKENDS, reference, "_backward", wrong_gradient_of_g)("reference_has_a_wrong_gradient")
plant(BACKENDS, chunked, "recurrence", last_state_without_gradient)("chunked_cuts_the_last_state")
plant(BACKENDS, wy, "_decay_backward", wrong_gradient_of_the_last_g)("wy_has_a_wrong_gradient")
plant("check_float32_stays_exact", reference, "recurrence", round_a_float32_state)("rounds_the_state")


@mutant("check_float32_stays_exact")
def counts_angles_from_the_first_token_in_float32():
    position, honest_blocks, honest_wake = [0], sl.Sleepable.blocks, sl.Sleeper._wake

    def blocks(self, h, state, *rest, **options):
        position[0] = state.position
        return honest_blocks(self, h, state, *rest, **options)

    def wake(self, h, stream):
        position[0] = stream.state.position
        return honest_wake(self, h, stream)

    def rotate(x, start, base):
        half = x.shape[3] // 2
        rates = base ** (-torch.arange(half, device=x.device) / half)
        angles = ((position[0] + start + torch.arange(x.shape[1])).to(x.dtype)[:, None] * rates)[:, None]
        cos, sin, (one, two) = angles.cos(), angles.sin(), x.chunk(2, dim=-1)
        return torch.cat((one * cos - two * sin, two * cos + one * sin), dim=-1).to(x.dtype)

    with (
        patch.object(sl.Sleepable, "blocks", blocks),
        patch.object(sl.Sleeper, "_wake", wake),
        patch.object(layers, "rotate", rotate),
    ):
        yield


def writes_nothing_where_nobody_reads(honest, self, h, memory, sliding_window=None, write_only=False):
    h, new = honest(self, h, memory, sliding_window, write_only)
    return h, new._replace(S=memory.S) if write_only else new


plant("check_sleep_is_algorithm_1", Block, "forward", writes_nothing_where_nobody_reads)(
    "skips_the_last_write"
)


# Data


def seed_with_passes(honest, self, experiment, passes, seed, *rest, **options):
    honest(self, experiment, passes, seed, *rest, **options)
    self.seed = seed + passes


def mirrored_rule(honest, rows, width, steps):
    """Rule 124: Rule 110 seen in a mirror."""

    def mirror(rows):
        bits = [(rows >> i & 1) << (width - 1 - i) for i in range(width)]
        return sum(b.astype("uint64") for b in bits)

    return mirror(honest(mirror(rows), width, steps))


plant("check_same_seed_same_data_for_every_N", training.Trainer, "__init__", seed_with_passes)(
    "the_data_depend_on_N"
)
plant("check_rule110_solver_agrees", rule110, "rule110_rollout", mirrored_rule)("rolls_rule_124")
plant(
    "check_rule110_solver_agrees",
    rule110,
    "rule110_rollout",
    lambda honest, rows, width, steps: honest(rows, width, max(steps - 1, 0)),
)("rolls_one_step_too_few")
plant(
    "check_rule110_golden",
    rule110.Rule110,
    "_rings",
    lambda honest, self, *args: honest(self, *args)[::-1].copy(),
)("draws_other_rings")


def turned_edges(honest, target, tokens, there, right=False):
    """Show each edge with its ends exchanged."""
    flip = slice(None, None, -1 if right else 1)
    honest(target, tokens[:, flip], there[:, flip], right)


plant("check_depo_solver_agrees", depo, "_place", turned_edges)("edges_run_backwards")
plant(
    "check_depo_golden",
    depo.Depo,
    "_names",
    lambda honest, self, *args: tuple(x[:, ::-1] for x in honest(self, *args)),
)("names_other_nodes")
