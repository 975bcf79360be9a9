"""What teaching a pretrained model to sleep costs: formulas against counts, at the published sizes."""

import json
from unittest.mock import patch

import numpy as np
import pytest
import torch
import transformers
from tiny_families import JET, OURO, jet_shapes, ouro_shapes, write_checkpoint
from tiny_pretrained import tiny_original
from torch.utils.flop_counter import FlopCounterMode

import sleeplib as sl
from sleeplib import budget, flops
from sleeplib.algorithm import awake_chunks
from sleeplib.experiments import PRETRAINED, TrainConfig
from sleeplib.kernels import jit
from sleeplib.pretrained import FAMILIES, Insert, LoRA, adapt, add_lora, jet, ouro  # noqa: F401  transformers hears of two
from sleeplib.pretrained.published import PUBLISHED, SIX_JET, on_meta

T = 48  # tokens of the count; more than a chunk of the delta rule would only take longer
OPTIONS = {"ByteDance/Ouro-1.4B": dict(insert=SIX_JET)}


def small_jet(window=None):
    """A configuration of four layers, the last with a window of its own."""
    small = {k: v for k, v in JET.items() if k not in ("auto_map", "torch_dtype")}
    parts = JET["efficient_attention_config"]
    parts = parts if window is None else parts | dict(swa=dict(window_size=window))
    small |= dict(num_hidden_layers=4, layer_types=["jet", "attn", "jet", "swa"])
    return small | dict(efficient_attention_config=parts)


@pytest.fixture(scope="module", params=PUBLISHED)
def real(request):
    return on_meta(request.param, **OPTIONS.get(request.param, {}))


def test_operations_are_those_that_pytorch_counts(real):
    tokens = torch.zeros(1, T, dtype=torch.int64, device="meta")
    state = real.initial_state(1)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        h, state = real.blocks(real.embed(tokens), state, passes=2)
        real.readout(h)
    counts = {str(op).split(".")[-1]: n for op, n in counter.get_flop_counts()["Global"].items()}
    visited = sum(budget.entries(real.layers[i]) for i in real.order(2))
    matrices = 2 * T * (visited + budget.entries(real.head))
    assert counts["mm"] + counts.get("addmm", 0) == matrices
    reading = budget.Reading((T,), (False,))
    once = budget.forward_flops(real, reading, 1)
    memory = once - 2 * T * (sum(map(budget.entries, real.layers)) + budget.entries(real.head))
    assert 0 < memory < 0.1 * once  # what lies between the matrices is small at this length


def test_what_stays_and_what_goes_has_the_bytes_of_the_formula(real):
    tokens = torch.zeros(1, T, dtype=torch.int64, device="meta")
    with torch.no_grad():
        _, state = real.blocks(real.embed(tokens), real.initial_state(1))
    assert budget.carried_bytes(real) == sum(S.nbytes for S in state.fast_weights if S is not None)
    kept = [x for kv in state.kv if kv is not None for x in kv]
    assert budget.cached_bytes(real, T) == sum(x.nbytes for x in kept)


@pytest.mark.parametrize("dtype, wide", [("bfloat16", 4), ("float32", 4), ("float64", 8)])
def test_a_window_of_its_own_keeps_fewer_keys_and_fast_weights_have_their_own_precision(dtype, wide):
    model = on_meta(small_jet(window=8), dtype=dtype)
    for tokens in (5, 8, 20):  # fewer than its window, as many, more
        with torch.no_grad():
            h = model.embed(torch.zeros(1, tokens, dtype=torch.int64, device="meta"))
            _, state = model.blocks(h, model.initial_state(1))
        assert [state.kv[i][0].shape[1] for i in (1, 3)] == [tokens, min(tokens, 7)]
        kept = [x for kv in state.kv if kv is not None for x in kv]
        assert budget.cached_bytes(model, tokens) == sum(x.nbytes for x in kept)
    carried = [S for S in state.fast_weights if S is not None]
    assert (
        budget.carried_bytes(model)
        == sum(S.nbytes for S in carried)
        == wide * sum(S.numel() for S in carried)
    )


@pytest.mark.parametrize(
    "name", ["rule110-quick", "depo-quick", "recall-quick", "gsm_infinite-quick-windows"]
)
def test_what_is_slept_on_is_what_has_no_label(name):
    task = sl.experiments.get(name).task
    reading = budget.Reading.of(task)
    labels = task.batch(8, np.random.default_rng(0)).labels
    assert reading.asleep == tuple(not awake for awake in awake_chunks(labels, task.window))
    assert reading.tokens == tuple(x.shape[1] for x in labels.split(task.window, dim=1))


def test_a_block_s_memory_costs_what_its_equations_say():
    """By hand: a token reads, writes and asks H matrices of K x V; or it looks at every key before it."""
    model = on_meta("ByteDance/Ouro-1.4B", insert=SIX_JET)
    fast, attention = model.layers[2], model.layers[0]
    assert fast.fast_shape == (8, 128, 256)
    assert budget.block_flops(fast, 10) == 20 * budget.entries(fast) + 10 * 6 * 8 * 128 * 256
    # 10 tokens behind 5 keys see 6 + 7 + ... + 15 = 105 keys; 16 heads of 128, q k and p v
    assert budget.block_flops(attention, 10, 5) == 20 * budget.entries(attention) + 105 * 4 * 16 * 128
    swa = on_meta("jet-ai/Jet-Nemotron-2B").layers[20]
    seen = sum(min(n, 1152) for n in range(1, 2001))
    assert budget.block_flops(swa, 2000) == 4000 * budget.entries(swa) + seen * 4 * 12 * 128


def test_of_the_experts_those_count_that_a_token_goes_through():
    first, last = (
        budget.entries(adapt(tiny_original("qwen3_next", moe_intermediate_size=size)).layers[1])
        for size in (16, 512)
    )
    assert last - first == 2 * 3 * 32 * (512 - 16)  # two of four experts, three matrices each of 32 columns
    model = adapt(tiny_original("qwen3_next"))
    add_lora(model, LoRA(2, 4))
    low = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    assert budget.entries(model.layers, learning=True) == low  # they freeze


def test_a_refused_prediction_leaves_the_next_one_as_it_was():
    model, reading = on_meta(small_jet()), budget.Reading((16, 4), (True, False))
    low, full = (TrainConfig(1, 1, precision=precision) for precision in ("bfloat16", "float32"))
    before = budget.step_bytes(model, full, reading, 2)
    with pytest.raises(ValueError, match="passes"):
        budget.step_bytes(model, low, reading, 0)
    assert budget.step_bytes(model, full, reading, 2) == before != budget.step_bytes(model, low, reading, 2)


def test_passes_and_recomputation_multiply_what_they_repeat():
    model = on_meta("jet-ai/Jet-Nemotron-2B")
    reading = budget.Reading((20, 4), (True, False))
    one, two, four = (budget.forward_flops(model, reading, n) for n in (1, 2, 4))
    assert four - two == 2 * (two - one)
    assert two - one == sum(budget.block_flops(model.layers[i], 20) for i in range(7, 21))
    assert budget.step_flops(model, reading, 2, 8) == 8 * 4 * two
    assert budget.step_flops(model, reading, 2, 8, recompute=False) == 8 * 3 * two
    small = on_meta("Qwen/Qwen3.5-0.8B", lora=LoRA(8, 16))
    cost = budget.step_flops(small, reading, 2, 1) / budget.forward_flops(small, reading, 2)
    assert 3 < cost < 3.05  # frozen matrices need no gradient


def test_memory_is_a_line_in_the_windows_and_grows_with_the_passes():
    model = on_meta(small_jet())
    train, sizes = TrainConfig(1, 1, checkpoint=True), {}
    for tokens, passes in ((64, 2), (128, 2), (192, 2), (64, 3)):
        reading = budget.Reading((tokens, 4), (True, False))
        peak = budget.step_bytes(model, train, reading, passes)
        sizes[tokens, passes] = peak - budget.weight_bytes(model, train)
    assert sizes[192, 2] - sizes[128, 2] == pytest.approx(sizes[128, 2] - sizes[64, 2], rel=0.1)
    assert sizes[64, 3] > 1.1 * sizes[64, 2]


def test_low_rank_differences_need_little_beside_the_weights():
    train = TrainConfig(1, 1)
    whole, low = (on_meta("Qwen/Qwen3.5-0.8B", lora=lora) for lora in (None, LoRA()))
    numbers = sum(p.numel() for p in whole.parameters())
    assert 12 * numbers < budget.weight_bytes(whole, train) < 16 * numbers
    assert 4 * numbers < budget.weight_bytes(low, train) < 4.5 * numbers


@pytest.mark.parametrize("name", ["ouro", "jet_nemotron"])
def test_followed_memory_is_what_a_step_takes(tmp_path, name):
    config, shapes = {"ouro": (OURO, ouro_shapes), "jet_nemotron": (JET, jet_shapes)}[name]
    write_checkpoint(tmp_path, config, shapes(config))
    original = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    insert = Insert((1,), 2, 4, 8) if name == "ouro" else None
    model = FAMILIES[name](original, insert=insert, backend="chunked")
    train = TrainConfig(1, 2, checkpoint=True)
    inputs = torch.ones(2, 40, dtype=torch.int64)
    labels = torch.full_like(inputs, -100)
    labels[:, 32:] = 1
    # without the compiled loops, which no GPU runs
    unplain = patch.object(jit, "plain", lambda *tensors: False)
    with unplain, budget.without_gradients(model), flops.LiveBytes() as live:
        options = dict(window=16, passes=2, checkpoint=True, return_logits=False)
        sl.sleep_forward(model, inputs, labels, **options).loss.backward()
    assert all(p.grad is None for p in model.parameters())
    reading = budget.Reading((16, 16, 8), (True, True, False))
    followed = budget.step_bytes(model.to("meta"), train, reading, 2, 2) - budget.weight_bytes(model, train)
    assert followed == pytest.approx(live.peak, rel=0.04)


@pytest.mark.parametrize("name", PRETRAINED)
def test_a_preset_fits_together_before_anything_is_downloaded(name):
    e = sl.experiments.get(name)
    assert e.name == name and e.about and e.task.vocab_size == e.model.vocab_size
    assert json.loads(json.dumps(e.config())) == e.config() and e.changes() == []
    reading = budget.Reading.of(e.task)
    assert sum(reading.tokens) == e.task.length and reading.asleep[0] and not reading.asleep[-1]
    assert e.task.source == e.model.source


def test_the_paper_s_recipe_is_one_part_alone_and_two_together():
    train = sl.experiments.get("gsm-ouro-sliding-paper").train
    steps = [(train.trains_at(i), train.eviction_at(i)) for i in range(train.steps)]
    assert steps.count(("fast", "hard")) == 667 and steps.count(("all", "sliding")) == 1333


def test_an_unknown_repository_is_named():
    with pytest.raises(ValueError, match="^config: 'a/b' is not known here; there are Qwen"):
        on_meta("a/b")
