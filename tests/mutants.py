"""Planted faults, each with the truth that must catch it.

A mutant is a context in which sleeplib is wrong in one way.  ``MUTANTS`` maps its name to the context and to
the name of a check in test_truths.py; a test shows that the check passes outside and fails inside.
"""

import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import torch

import sleeplib as sl
from sleeplib import layers, training
from sleeplib.kernels import chunked, reference
from sleeplib.model import Block, collect, spread
from sleeplib.tasks import depo, rule110

asleep = sys.modules["sleeplib.sleep"]  # the name sleeplib.sleep is the function
MUTANTS = {}


def mutant(check):
    def register(f):
        MUTANTS[f.__name__] = (contextmanager(f), check)
        return f

    return register


def plant(check, target, name, fault):
    """Register fault(honest, *args) in the place of the attribute `name` of `target`."""

    def register(label):
        @contextmanager
        def context():
            honest = getattr(target, name)

            def faulty(*args, **kwargs):
                return fault(honest, *args, **kwargs)

            with patch.object(target, name, faulty):
                yield

        MUTANTS[label] = (context, check)

    return register


def detached(tensors):
    return tuple(None if x is None else x.detach() for x in tensors)


# What goes wrong between the passes of one sleep


def rewritten_blocks(between, spans=None, caches="last"):
    """`HybridLM.blocks`, written again, with `between(h, fast, seen, ...)` before each repeated pass."""

    def blocks(self, h, state, passes=1, window=None, wanted=True):
        first, last = self.loop
        depth = len(self.layers)
        looped = range(first, last + 1)
        order = [range(first), *[looped] * passes, range(last + 1, depth)]
        if spans == "all":
            order = [range(0), *[range(depth)] * passes, range(0)]
        fast, seen, memories, embedded = list(state.fast_weights), state, {}, h
        for n, span in enumerate(order):
            if n == 1:
                embedded = h
            if 1 < n <= passes:
                old = spread(state) | memories
                h, fast, seen = between(h, list(fast), state, embedded, collect(old, depth, state.position))
            h, new = self.run(h, seen if 1 < n <= passes else state, fast, span, window)
            memories = memories | new if caches == "last" else new | memories
            for i in span:
                fast[i] = new[i].S
        done = collect(memories, depth, state.position + h.shape[1])
        return h, replace(done, fast_weights=tuple(fast))

    return blocks


BETWEEN = {
    "re_embeds_every_pass": lambda h, fast, state, embedded, now: (embedded, fast, state),
    "adds_the_embedding_every_pass": lambda h, fast, state, embedded, now: (h + embedded, fast, state),
    "resets_S_between_passes": lambda h, fast, state, embedded, now: (h, list(state.fast_weights), state),
    "detaches_S_between_passes": lambda h, fast, state, embedded, now: (h, list(detached(fast)), state),
    "detaches_h_between_passes": lambda h, fast, state, embedded, now: (h.detach(), fast, state),
    "a_pass_sees_the_keys_of_the_pass_before": lambda h, fast, state, embedded, now: (h, fast, now),
}


def no_fault(h, fast, state, embedded, now):
    return h, fast, state


def honest_rewrite():
    """The rewritten blocks without a fault: a check that fails here catches mutants for nothing."""
    return patch.object(sl.HybridLM, "blocks", rewritten_blocks(no_fault))


for label, between in BETWEEN.items():
    MUTANTS[label] = (
        partial(patch.object, sl.HybridLM, "blocks", rewritten_blocks(between)),
        "check_sleep_is_algorithm_1",
    )
for label, options in {
    "an_unlooped_block_runs_N_times": dict(spans="all"),
    "keeps_the_caches_of_the_first_pass": dict(caches="first"),
}.items():
    MUTANTS[label] = (
        partial(patch.object, sl.HybridLM, "blocks", rewritten_blocks(no_fault, **options)),
        "check_sleep_is_algorithm_1",
    )


# Sleep and eviction


def fault_in_evict(fault):
    """`evict` is a name of sleeplib and a name that sleep_forward and Sleeper use."""

    @contextmanager
    def context():
        honest = asleep.evict

        def evict(state, eviction="hard", window=None):
            return fault(honest, state, eviction, window)

        with patch.object(asleep, "evict", evict), patch.object(sl, "evict", evict):
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
    asleep,
    "sleep",
    lambda honest, model, tokens, state, passes, *rest: honest(model, tokens, state, passes + 1, *rest),
)("sleeps_one_pass_too_many")

plant(
    "check_sleep_is_algorithm_1",
    asleep,
    "sleep",
    lambda honest, model, tokens, state, passes, *rest: honest(model, tokens, state, 1, *rest),
)("sleeps_only_once")

plant(
    "check_a_cut_at_a_boundary_changes_nothing",
    sl,
    "sleep_forward",
    lambda honest, *args, state=None, **options: honest(*args, **options),
)("starts_over_at_every_call")


@mutant("check_wake_cost_does_not_depend_on_N")
def sleeps_N_times_on_prediction():
    passes = []

    def remember(honest, model, inputs, labels, **options):
        passes.append(options["passes"])
        return honest(model, inputs, labels, **options)

    def forward(self, tokens, state, window=None):
        h, state = self.blocks(self.embed(tokens), state, passes=passes[-1] if passes else 1, window=window)
        return self.readout(h), state

    honest = sl.sleep_forward
    with (
        patch.object(sl, "sleep_forward", partial(remember, honest)),
        patch.object(sl.HybridLM, "forward", forward),
    ):
        yield


# The stream


def wake_with_all_passes(honest, self, h):
    before = self.state
    for _ in range(self.passes - 1):
        self.model.run(h, before, before.fast_weights, range(len(self.model.layers)), self._key_window())
    return honest(self, h)


def nap_with(passes=0, boundary=False, forget=False):
    def nap(honest, self):
        self.passes += passes
        if boundary:
            self._boundary = self.state
        if forget:
            self._boundary = self.state = replace(self.state, kv=None, conv=None)
            self._read, self.naps = [], self.naps + 1
        else:
            honest(self)
        self.passes -= passes

    return nap


def hoard(honest, self):
    kept = list(self._read)
    honest(self)
    self._read = [x * 0 for x in kept][:0] or self._read
    self.hoard = [*getattr(self, "hoard", []), *kept]


def wrong_window(honest, self, model, *, window, **options):
    honest(self, model, window=window + 1, **options)


def bytes_without_what_was_read(honest, self):
    read, self._read = self._read, []
    try:
        return honest(self)
    finally:
        self._read = read


def feed_keeping_all_logits(honest, self, tokens):
    logits = honest(self, tokens)
    self._last = logits[:, -1]  # a view keeps all of them alive
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


def last_state_without_gradient(honest, *args):
    o, S = honest(*args)
    return o, S.detach().requires_grad_()


def wrong_gradient_of_g(honest, *args):
    honest(*args)
    args[-2][...] *= 1.001  # dg


def round_a_float32_state(honest, *args):
    o, S = honest(*args)
    return o, S.bfloat16().float() if S.dtype == torch.float32 else S


plant(BACKENDS, chunked, "recurrence", decay_a_little_more)("chunked_decays_too_much")
plant(BACKENDS, reference, "recurrence", read_before_the_decay)("reference_forgets_the_first_decay")
plant(BACKENDS, reference, "_backward", wrong_gradient_of_g)("reference_has_a_wrong_gradient")
plant(BACKENDS, chunked, "recurrence", last_state_without_gradient)("chunked_cuts_the_last_state")
plant("check_float32_stays_exact", reference, "recurrence", round_a_float32_state)("rounds_the_state")


@mutant("check_float32_stays_exact")
def counts_angles_from_the_first_token_in_float32():
    honest, position = sl.HybridLM.run, [0]

    def run(self, h, state, *rest):
        position[0] = state.position
        return honest(self, h, state, *rest)

    def rotate(x, start, base):
        half = x.shape[3] // 2
        rates = base ** (-torch.arange(half, device=x.device) / half)
        angles = ((position[0] + start + torch.arange(x.shape[1])).to(x.dtype)[:, None] * rates)[:, None]
        cos, sin, (one, two) = angles.cos(), angles.sin(), x.chunk(2, dim=-1)
        return torch.cat((one * cos - two * sin, two * cos + one * sin), dim=-1).to(x.dtype)

    with patch.object(sl.HybridLM, "run", run), patch.object(layers, "rotate", rotate):
        yield


def writes_nothing_where_nobody_reads(honest, self, h, memory, window=None, wanted=True):
    h, new = honest(self, h, memory, window, wanted)
    return h, new if wanted else new._replace(S=memory.S)


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
    lambda honest, rows, width, steps: honest(rows, width, steps - 1),
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
