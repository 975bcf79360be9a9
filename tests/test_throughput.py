"""What the measured steps compute; how long anything takes is never tested."""

import pytest
import torch
from tiny import close, labels_at, sequence, tiny_model
from torch.utils.flop_counter import FlopCounterMode

import sleeplib as sl
from sleeplib import throughput


@pytest.mark.parametrize("length", [9, 10, 12])  # the last window whole, one token, two tokens
def test_windows_at_once_are_windows_in_turn(length):
    model, tokens = tiny_model("agjha"), sequence(length)
    start = (length - 1) // 3 * 3
    labels = labels_at(tokens, list(range(start, length)))
    out = sl.sleep_forward(model, tokens, labels, window=3, passes=1, eviction="keys")
    close(throughput.windows_at_once(model, tokens, 3), out.logits[:, start:])


def test_the_predicted_cost_is_nearly_the_counted_one():
    config = sl.ModelConfig(vocab_size=32, d_model=64, pattern="aaj", num_heads=2, backend="chunked")
    with torch.device("meta"):
        model = config.build()
    tokens = torch.zeros(1, 4 * 32, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter:
        throughput._figure6_loss(model, tokens, tokens, 32, 3, False, False).backward()
    flops, kept, nap = throughput._predicted(config, 32, 3, 3)
    assert 0.9 < counter.get_total_flops() / flops < 1.02  # the last write of a nap is all that is read
    assert 2 < kept / nap < 4  # three naps, and a window that is read once


def test_step_cost_measures_every_kind_of_step():
    small = dict(batch=1, context=32, window=16, passes=2, width=16, repeats=1)
    for options in ({}, dict(at_once=True), dict(checkpoint=True, truncate=1, precision="bfloat16")):
        found = throughput.step_cost(**small, **options)
        assert found["tokens_per_second"] > 0 and found["peak_bytes"] >= 0
    with pytest.raises(RuntimeError, match="the step failed"):
        throughput.step_cost(**small, truncate=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run")
def test_figure_6_says_what_it_needs():
    with pytest.raises(ValueError, match="needs a CUDA device; --dry-run"):
        throughput.figure6()
