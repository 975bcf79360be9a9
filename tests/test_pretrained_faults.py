"""Planted faults in the adapters, each with the test that must catch it."""

from contextlib import contextmanager
from unittest.mock import patch

import pytest
import test_pretrained as checks
import torch
import torch.nn.functional as F

import sleeplib as sl
from sleeplib.pretrained import adapter, blocks, hybrids

FAULTS = {}


def fault(check, *names):
    """Register a context in which something is wrong; `check` must fail for each of the families."""

    def register(f):
        FAULTS.update({f"{f.__name__}-{name}": (contextmanager(f), check, name) for name in names})
        return f

    return register


def logits(name):
    assert max(checks.differences(name)) < 1e-5


@fault(logits, "qwen3_5")
def the_rest_of_a_partial_rotary_turns_too():
    honest = blocks.rotate

    def rotate(q, k, rotary):
        q, k = honest(q, k, rotary)
        return tuple(x.roll(x.shape[-1] // 2, dims=-1) * 1.01 for x in (q, k))

    with patch.object(blocks, "rotate", rotate):
        yield


@fault(logits, "llama", "qwen3_next")
def positions_start_anew_in_each_call():
    honest = blocks.rotate

    def rotate(q, k, rotary):
        return honest(q, k[:, -q.shape[1] :], rotary)[0], honest(k, k, rotary)[1]

    with patch.object(blocks, "rotate", rotate):
        yield


@fault(logits, "qwen3_5", "olmo_hybrid")
def the_convolution_forgets_between_calls():
    with patch.object(blocks, "newest", lambda x, context, count: 0 * x[:, :1].expand(-1, count, -1)):
        yield


@fault(logits, "qwen3_5", "qwen3_next", "olmo_hybrid")
def value_heads_take_the_key_heads_in_turn():
    def repeat(x, count, dim):
        return torch.cat([x] * count, dim=dim)

    with patch.object(torch.Tensor, "repeat_interleave", repeat):
        yield


@fault(logits, "olmo_hybrid")
def beta_ends_at_one():
    honest = blocks.DeltaBlock.__init__

    def init(self, layer, *, strongest=1.0, **options):
        honest(self, layer, **options)

    with patch.object(blocks.DeltaBlock, "__init__", init):
        yield


@fault(logits, "qwen3_5")
def the_output_gate_is_forgotten():
    honest = blocks.AttentionBlock.read

    with patch.object(blocks.AttentionBlock, "read", lambda self, x: (*honest(self, x)[:3], None)):
        yield


@fault(logits, "qwen3", "olmo3")
def queries_are_not_normed():
    honest = blocks.AttentionBlock._heads

    def heads(self, name, x):
        return honest(self, "" if name == "q_norm" else name, x)

    with patch.object(blocks.AttentionBlock, "_heads", heads):
        yield


@fault(logits, "mistral")
def the_models_own_window_is_ignored():
    honest = blocks.AttentionBlock.__init__

    def init(self, *args, own_window=None, **options):
        honest(self, *args, **options)

    with patch.object(blocks.AttentionBlock, "__init__", init):
        yield


@fault(logits, "llama", "qwen3_5")
def padding_is_seen():
    with patch.object(blocks, "HIDDEN", 1):
        yield


@fault(logits, "llama", "qwen3_5")
def padding_is_a_word_like_others():
    with patch.object(adapter.PretrainedLM, "embed", lambda self, tokens: self.embedding(tokens)):
        yield


@fault(logits, "olmo_hybrid")
def norms_stand_before_the_mixer_everywhere():
    norms = "post_attention_layernorm", None, *hybrids.POST_NORM[2:]
    with patch.object(hybrids.OlmoHybrid, "attention_norms", norms):
        yield


@fault(logits, "llama")
def an_inserted_layer_does_something_at_once():
    honest = adapter.InsertedBlock.__init__

    def init(self, *args, **options):
        honest(self, *args, **options)
        torch.nn.init.normal_(self.mixer.o.weight, std=0.1)

    with patch.object(adapter.InsertedBlock, "__init__", init):
        yield


@fault(checks.test_gradients_flow_through_the_fast_weight, "qwen3_5")
def the_fast_weight_is_detached():
    honest = blocks.kernels.gated_delta_rule

    def rule(*args, initial_state=None, **options):
        return honest(*args, initial_state=initial_state.detach(), **options)

    with patch.object(blocks.kernels, "gated_delta_rule", rule):
        yield


@fault(checks.test_only_fast_weights_survive_hard_eviction, "qwen3_5", "llama")
def a_cache_survives():
    honest = sl.LMState.evict
    with patch.object(
        sl.LMState, "evict", lambda state, how="hard", window=None: honest(state, "sliding", 3)
    ):
        yield


@fault(lambda name: checks.test_streaming_is_batched(name, "hard"), "qwen3_5")
def a_looped_pass_begins_with_the_cache_of_the_one_before():
    honest = sl.Sleepable.run

    def run(self, h, memories, order, window=None, write_only=False):
        order, done = list(order), list(memories)
        half = len(order) // 2
        if len(order) < 4 or len(set(order)) == len(order):
            return honest(self, h, memories, order, window, write_only)
        h, done = honest(self, h, done, order[:half], window)
        return honest(self, h, done, order[half:], window, write_only)

    with patch.object(sl.Sleepable, "run", run):
        yield


@fault(checks.test_low_rank_differences_on_every_projection_get_a_gradient, "qwen3_5")
def a_projection_is_read_by_its_weight():
    def read(self, x):
        m = self.layer.linear_attn
        return F.linear(x, m.in_proj_qkv.weight), m.in_proj_z(x), m.in_proj_b(x), m.in_proj_a(x)

    with patch.object(hybrids.Qwen35Delta, "read", read):
        yield


@fault(checks.test_low_rank_differences_on_every_projection_get_a_gradient, "llama")
def the_originals_weights_go_on_learning():
    with patch.object(adapter.PretrainedLM, "learn", lambda self, part: self.requires_grad_(True)):
        yield


@pytest.mark.parametrize("label", FAULTS)
def test_a_planted_fault_is_caught(label):
    context, check, name = FAULTS[label]
    with context(), pytest.raises((AssertionError, IndexError, RuntimeError, ValueError)) as caught:
        check(name)
    # A family that is not known by name is tried out before anybody uses it.
    assert caught.type is not ValueError or "gives other logits than its own" in str(caught.value)


def test_the_checks_hold_without_a_fault():
    for name in ("qwen3_5", "llama"):
        logits(name)
