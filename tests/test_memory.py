"""The predicted memory of a training step, and what is chosen by it."""

import dataclasses
from unittest.mock import patch

import numpy as np
import pytest
import torch

import sleeplib as sl
from sleeplib import device, flops, records
from sleeplib.kernels import jit

GIB = 2**30
T4 = 14.5 * GIB  # what is free on a card that is sold as 16 GB
SMALL = [name for name in sl.experiments.PRESETS if name.endswith("-small")]


def tracked(experiment, passes):
    """Peak bytes of a step on the CPU, with numbers, and without the compiled loops, which no GPU runs."""
    task, train = experiment.task, experiment.train
    model = dataclasses.replace(experiment.model, backend="chunked").build()
    inputs, labels, *_ = task.batch(train.batch, np.random.default_rng(0))
    options = dict(window=task.window, passes=passes, eviction=train.eviction, checkpoint=train.checkpoint)
    with patch.object(jit, "plain", lambda *tensors: False), flops.LiveBytes() as live:
        sl.sleep_forward(model, inputs, labels, return_logits=False, **options).loss.backward()
    return live.peak + 16 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["rule110-quick", "gsm_infinite-quick"])
@pytest.mark.parametrize(
    "settings", [{}, {"train.checkpoint": "true", "model.pattern": "ajha"}], ids=["plain", "checkpoint"]
)
def test_the_prediction_is_the_peak_of_a_real_step(name, settings):
    experiment = sl.experiments.get(name).replace({"train.batch": 8} | settings)
    assert flops.training_bytes(experiment, 2) == pytest.approx(tracked(experiment, 2), rel=0.04)


def test_it_grows_with_the_batch_in_a_line_and_with_the_passes_too():
    """What the batch does not change, such as the weights side by side for one product, is the rest."""
    experiment = sl.experiments.get("rule110-quick").replace({"model.pattern": "ag"})
    sizes = [flops.training_bytes(experiment, 2, batch) for batch in (64, 128, 256)]
    assert (sizes[2] - sizes[1]) / (sizes[1] - sizes[0]) == pytest.approx(2, rel=0.02)
    assert 1.7 < sizes[1] / sizes[0] < 2
    one, two, four = (flops.training_bytes(experiment, n) for n in (1, 2, 4))
    assert two == sizes[1] and (four - two) / (two - one) == pytest.approx(2, rel=0.02)


def test_less_is_kept_in_bfloat16_and_with_recomputation():
    experiment = sl.experiments.get("rule110-quick").replace({"model.pattern": "ag"})
    plain = flops.training_bytes(experiment, 2)
    assert 0.5 < flops.training_bytes(experiment, 2, precision="bfloat16") / plain < 0.9
    assert flops.training_bytes(experiment.replace({"train.checkpoint": "true"}), 2) < 0.7 * plain


def test_a_tensor_counts_while_it_lives_and_once():
    given = torch.zeros(1000)
    with flops.LiveBytes() as live:
        given.add_(1)
        assert (live.now, live.peak) == (0, 0)
        made = given + 1
        views = made.view(10, 100), made[3:]
        assert (live.now, live.peak) == (4000, 4000)
        made = (made + 1) * 2  # three are alive for a moment: the views hold the first
        assert (live.now, live.peak) == (8000, 12000)
        del views
        assert live.now == 4000


@pytest.mark.parametrize("passes", [1, 4])
def test_a_captured_step_on_an_h200_took_a_known_part_of_the_prediction(passes):
    """The compiler fuses what the prediction holds apart."""
    name = "rule110-paper-2b-t8"
    (measured,) = {round(r["peak_bytes"] / GIB, 1) for r in records.load_records(name, passes)}
    assert 0.55 < measured * GIB / flops.training_bytes(name, passes) < 0.7


def test_a_prediction_is_refused_by_name():
    for wrong, options in (("batch", dict(batch=0)), ("precision", dict(precision="float16"))):
        with pytest.raises(ValueError, match=f"^{wrong} must be"):
            flops.training_bytes("rule110-quick", 1, **options)


@pytest.mark.parametrize("name", SMALL)
def test_every_small_preset_fits_a_t4_in_float32(name):
    """At the N that takes the most, in four parts or fewer."""
    experiment = sl.experiments.get(name)
    part = experiment.train.batch // 4
    assert flops.EAGER * flops.training_bytes(experiment, max(experiment.passes), part, "float32") < T4


def test_a_batch_is_read_in_as_few_parts_as_fit():
    sizes = {8: 800, 4: 420, 2: 230, 1: 135}  # bytes of so many sequences

    def predicted(experiment, passes, batch, precision, world):
        return sizes[batch] // world

    eager, graph = (
        sl.experiments.get("rule110-quick").replace(batch=8, graph=graph) for graph in (False, True)
    )
    with patch.object(flops, "training_bytes", predicted), patch.object(flops, "EAGER", 1.0):
        for free, parts in ((800, 1), (799, 2), (420, 2), (419, 4), (200, 8), (134, None)):
            assert flops.fitting_parts(eager, 1, free, "float32") == parts, free
        assert flops.fitting_parts(eager, 1, 400, "float32", world=2) == 2  # its share are 4 sequences
        shared = eager.replace(shard=True)  # and half of what they need
        assert flops.fitting_parts(shared, 1, 210, "float32", world=2) == 1
        for fuses, free, parts in ((True, 600, 1), (True, 599, 2), (False, 799, 2)):
            with patch.object(flops, "find_spec", lambda name, fuses=fuses: fuses or None):
                assert flops.fitting_parts(graph, 1, free, "float32") == parts
        odd = eager.replace(batch=3)
        sizes[3] = 500
        assert flops.fitting_parts(odd, 1, 140, "float32") == 3


def test_processes_that_share_weights_hold_a_part_and_what_is_put_together():
    experiment = sl.experiments.get("rule110-quick").replace(batch=2)
    model = experiment.model.build()
    numbers, block = (sum(p.numel() for p in m.parameters()) for m in (model, model.layers[1]))
    outer = numbers - sum(p.numel() for p in model.layers.parameters())
    one, two, four = (flops.training_bytes(experiment, 1, world=n) for n in (1, 2, 4))
    assert two - four == 4 * numbers and block > sum(p.numel() for p in model.layers[0].parameters())
    assert one - two == 8 * numbers - 8 * outer - 16 * block


@pytest.mark.parametrize("name", ["rule110-quick", "recall-ablation-recent8", "rule110-rival-ttt-2e-3"])
def test_a_model_without_numbers_has_every_shape(name):
    config = sl.experiments.get(name).model
    made, bare = (model.state_dict() for model in (config.build(), config.on_meta()))
    assert {x.device.type for x in bare.values()} == {"meta"}
    assert {k: (x.shape, x.dtype) for k, x in bare.items()} == {
        k: (x.shape, x.dtype) for k, x in made.items()
    }


def test_a_gpu_is_asked_what_is_free_and_a_cpu_is_not():
    trainer = sl.Trainer("rule110-quick", 1, 0, "cpu")
    assert trainer.micro_batches == 1
    trainer.device = torch.device("cuda")
    for free, parts in ((2**40, 1), (90 * 2**20, 2), (0, 128)):
        with patch.object(device, "free_bytes", lambda device, free=free: free):
            assert trainer.fitting_parts() == parts, free
    for error, parts in ((NotImplementedError, 1), (RuntimeError, 1)):
        with patch.object(device, "free_bytes", lambda device: 0):
            with patch.object(flops, "training_bytes", side_effect=error):
                assert trainer.fitting_parts() == parts
    known = dict(mem_get_info=(1000, 9999), memory_reserved=300, memory_allocated=100)
    with patch.multiple(torch.cuda, **{k: lambda device, v=v: v for k, v in known.items()}):
        assert device.free_bytes(torch.device("cuda")) == 1200


def test_parts_that_were_chosen_stay_when_a_run_goes_on():
    """Else the sum of a batch would be rounded in another order."""
    trainers = [sl.Trainer("rule110-quick", 1, 0, "cpu", parts) for parts in (4, None, 2)]
    for trainer in trainers[1:]:
        trainer.restore(*trainers[0].snapshot())
    assert [trainer.micro_batches for trainer in trainers] == [4, 4, 2]


def test_a_t4_has_no_bfloat16(monkeypatch):
    for capability, has in (((7, 5), False), ((8, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert device.multiplies_bfloat16.__wrapped__(torch.device("cuda")) == has


def test_an_x86_processor_needs_amx_for_bfloat16(monkeypatch):
    monkeypatch.setattr(device.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    for amx in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda found=amx: found)
        assert device.multiplies_bfloat16.__wrapped__(torch.device("cpu")) == amx
