"""Ouro and Jet-Nemotron: their checkpoints, read and run by our own code, against a plain reference."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny import close
from tiny_families import JET, OURO, VOCAB, jet_logits, jet_shapes, ouro_logits, ouro_shapes, write_checkpoint

import sleeplib as sl
from sleeplib.pretrained import FAMILIES, Insert, jet, load, ouro, save  # noqa: F401  transformers hears of jet
from sleeplib.pretrained.published import PUBLISHED, SIX_JET, on_meta

FAMILY = {"ouro": (OURO, ouro_shapes, ouro_logits), "jet_nemotron": (JET, jet_shapes, jet_logits)}
INSERT = Insert(after=(0, 2), num_heads=2, key_size=4, value_size=8)
WINDOW = 6


def original(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module", params=FAMILY)
def family(request, tmp_path_factory):
    """Name, folder, tensors and config of a tiny checkpoint."""
    config, shapes, _ = FAMILY[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, write_checkpoint(folder, config, shapes(config)), config


def model_of(family, **options):
    """The adapter on a new copy of the checkpoint; inserted layers are stirred, so that they matter."""
    name, folder, _, _ = family
    model = FAMILIES[name](original(folder), **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for block in model.inserted:
            for p in block.parameters():
                p += 0.2 * torch.randn(p.shape, generator=generator)
    return model.eval()


def sleepy(family):
    """An adapter with fast weights."""
    return model_of(family, insert=INSERT if family[0] == "ouro" else None)


def some_tokens(length, batch=2, seed=0):
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_the_checkpoint_is_read_under_its_own_names_without_its_code(family):
    _, folder, tensors, config = family
    model = original(folder)
    assert type(model).__module__.startswith("sleeplib.pretrained")
    found = model.state_dict()
    found.pop("lm_head.weight") if config["tie_word_embeddings"] else None
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], x) for name, x in tensors.items())


@torch.no_grad()
def test_one_pass_is_the_original(family):
    name, _, tensors, config = family
    model, tokens = model_of(family), some_tokens(9)
    logits, _ = model(tokens, model.initial_state(2))
    wanted = torch.stack([FAMILY[name][2](tensors, config, row) for row in tokens]).float()
    close(logits, wanted, 1e-5)


def flipped_taps(model):
    w2 = model.layers[0].layer.self_attn.dynamic_conv1d.kernel_generator.w2
    w2.weight.copy_(w2.weight.unflatten(0, (-1, 4)).flip(1).flatten(0, 1))


FAULTS = {
    "one norm is missing": ("ouro", lambda m: setattr(m.layers[1], "norms", (*ouro.NORMS[:3], None))),
    "no final norm": ("ouro", lambda m: setattr(m.layers[-1], "final", (None,))),
    "a window without an end": ("jet_nemotron", lambda m: setattr(m.layers[4], "own_window", None)),
    "taps the wrong way": ("jet_nemotron", flipped_taps),
}


@torch.no_grad()
@pytest.mark.parametrize("fault", FAULTS)
def test_the_reference_tells_what_is_wrong(tmp_path, fault):
    name, plant = FAULTS[fault]
    config, shapes, reference = FAMILY[name]
    tensors, tokens = write_checkpoint(tmp_path, config, shapes(config)), some_tokens(9, batch=1)
    model = FAMILIES[name](original(tmp_path))
    plant(model)
    with pytest.raises(AssertionError, match="off by"):
        logits, _ = model(tokens, model.initial_state(1))
        close(logits[0], reference(tensors, config, tokens[0]).float(), 1e-5)


@torch.no_grad()
def test_padding_is_not_read(family):
    name, _, tensors, config = family
    model, tokens = model_of(family, padding=0), some_tokens(9)
    for row, pads in enumerate((0, 3)):
        tokens[row, :pads] = 0
    logits, _ = model(tokens, model.initial_state(2))
    for row, pads in enumerate((0, 3)):
        close(logits[row, pads:], FAMILY[name][2](tensors, config, tokens[row, pads:]).float(), 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("loops", [2, 4])
def test_passes_over_ouro_are_its_own_loops(tmp_path, loops):
    tensors, tokens = write_checkpoint(tmp_path, OURO, ouro_shapes(OURO)), some_tokens(7)
    wanted = torch.stack([ouro_logits(tensors, OURO, row, loops) for row in tokens]).float()
    for insert in (None, INSERT):  # a layer that is inserted changes nothing before it is trained
        model = FAMILIES["ouro"](original(tmp_path), insert=insert)
        h, _ = model.blocks(model.embed(tokens), model.initial_state(2), passes=loops)
        close(model.readout(h), wanted, 1e-5)


@torch.no_grad()
def test_ouro_norms_once_a_pass_and_jet_loops_its_middle(family):
    model, tokens, calls = sleepy(family), some_tokens(WINDOW), []
    for i, block in enumerate(model.layers):
        block.register_forward_hook(lambda *_, i=i: calls.append(i))
    norms = []
    model.norm.register_forward_hook(lambda *_: norms.append(1))
    sl.sleep(model, tokens, model.initial_state(2), passes=3)
    if family[0] == "ouro":
        assert calls == [*range(6)] * 3  # four layers and two inserted ones
        assert len(norms) == 2  # the last pass ends with the last write
    else:
        assert calls == [0, 1, *[2, 3, 4, 5] * 3, 6, 7] and not norms


@torch.no_grad()
@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_streaming_is_algorithm_1(family, eviction):
    model, tokens = sleepy(family), some_tokens(2 * WINDOW + 4)
    sleeper = sl.Sleeper(model, window=WINDOW, passes=2, eviction=eviction)
    streamed = torch.cat([sleeper.feed(piece) for piece in tokens.split((1, 4, 6, 2, 3), dim=1)], dim=1)
    labels = torch.full_like(tokens, -100)
    labels[:, 2 * WINDOW :] = 1
    out = sl.sleep_forward(model, tokens, labels, window=WINDOW, passes=2, eviction=eviction)
    close(streamed[:, 2 * WINDOW :], out.logits[:, 2 * WINDOW :])


@torch.no_grad()
def test_cached_generation_is_uncached_generation(family):
    model, tokens = sleepy(family), some_tokens(5)
    sleeper = sl.Sleeper(model, window=64, passes=2)
    sleeper.feed(tokens)
    generated = sleeper.generate(6)
    for _ in range(6):
        logits, _ = model(tokens, model.initial_state(2))
        tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(generated, tokens[:, 5:])


@torch.no_grad()
def test_only_fast_weights_survive(family):
    model = sleepy(family)
    states = [sl.sleep(model, some_tokens(WINDOW, seed=s), model.initial_state(2), 2) for s in (0, 1)]
    for state in states:
        assert state.kv is None and state.conv is None and state.position == WINDOW
    ask = some_tokens(3, seed=2)
    one, two = (model(ask, state)[0] for state in states)
    assert (one - two).abs().max() > 1e-4  # something of the window is left
    swapped = sl.LMState(states[1].fast_weights, position=states[0].position)
    close(model(ask, swapped)[0], two)


def test_a_step_lowers_the_loss_and_all_that_sleep_uses_learns(family):
    model, tokens = sleepy(family), some_tokens(2 * WINDOW)
    labels = torch.full_like(tokens, -100)
    labels[:, WINDOW:] = some_tokens(WINDOW, seed=4)

    def loss():
        return sl.sleep_forward(model, tokens, labels, window=WINDOW, passes=2).loss

    before = loss()
    before.backward()
    unused = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert not unused
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.01 * p.grad
    assert loss() < before


def test_lora_on_every_projection_gets_a_gradient(family):
    peft = pytest.importorskip("peft")
    name, folder, _, _ = family
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    names += ["g_proj", "a_proj", "b_proj", "w1", "w2"] if name == "jet_nemotron" else []
    base = original(folder)
    wrapped = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False))
    model = FAMILIES[name](wrapped.base_model.model, insert=INSERT if name == "ouro" else None)
    for block in model.inserted:
        torch.nn.init.normal_(block.mixer.o.weight, std=0.1)
    tokens = some_tokens(2 * WINDOW)
    labels = torch.full_like(tokens, -100)
    labels[:, WINDOW:] = 1
    sl.sleep_forward(model, tokens, labels, window=WINDOW, passes=2).loss.backward()
    lora = {n: p for n, p in model.named_parameters() if "lora_" in n}
    assert len(lora) > 2 * len(names)
    silent = [n for n, p in lora.items() if p.grad is None or not p.grad.any()]
    # a last write needs neither the query nor what follows it, but the awake window does
    assert not silent


def test_weights_are_saved_under_the_family_s_own_names(family, tmp_path):
    _, folder, tensors, config = family
    original(folder).save_pretrained(tmp_path)
    again = load_file(tmp_path / "model.safetensors")
    assert again.keys() == tensors.keys() and all(torch.equal(again[k], x) for k, x in tensors.items())
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == config["model_type"] and saved["layer_types"] == config["layer_types"]
    original(tmp_path)


@torch.no_grad()
def test_what_was_added_is_saved_and_read_again(family, tmp_path):
    model, (name, folder, _, _) = sleepy(family), family
    model.source = (str(folder), None)
    save(model, tmp_path / "slept")
    again = load(tmp_path / "slept")
    assert type(again) is FAMILIES[name] and again.loop == model.loop
    states = [sl.sleep(m, some_tokens(WINDOW), m.initial_state(2), 3) for m in (model, again)]
    ask = some_tokens(3, seed=2)
    close(*(m(ask, state)[0] for m, state in zip((model, again), states)))


@torch.no_grad()
def test_half_precision_is_near_the_original(family):
    _, folder, _, _ = family
    insert = INSERT if family[0] == "ouro" else None
    wide, low = (load(folder, insert=insert, dtype=dtype) for dtype in ("float32", "bfloat16"))
    states = [sl.sleep(m, some_tokens(WINDOW), m.initial_state(2), 2) for m in (wide, low)]
    ask = some_tokens(3, seed=2)
    one, two = (m(ask, state)[0].float() for m, state in zip((wide, low), states))
    assert (one - two).abs().max() < 0.1 * one.abs().max()
    assert {S.dtype for S in states[1].fast_weights if S is not None} == {torch.float32}


def test_what_does_not_fit_is_refused(family, tmp_path):
    name, folder, _, config = family
    if name == "ouro":
        with pytest.raises(ValueError, match="^insert.after must be at most 2: .*final norm"):
            model_of(family, insert=Insert((3,), 2, 4, 8))
        return
    for change, words in (
        (dict(layer_types=["jet"] * 7 + ["mamba"]), "layer_types must be 8 of attn, swa, jet"),
        (dict(efficient_attention_config=dict(jet={})), "efficient_attention_config must have swa"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(Exception, match=words):
            transformers.AutoConfig.from_pretrained(tmp_path)


# The real configurations, without numbers


def count(modules):
    return sum(p.numel() for p in {id(p): p for m in modules for p in m.parameters()}.values())


def test_six_jet_layers_add_less_than_a_tenth_to_ouro():
    model = on_meta("ByteDance/Ouro-1.4B", insert=SIX_JET)
    new = count(model.inserted)
    old = sum(torch.Size(shape).numel() for shape in ouro_shapes(PUBLISHED["ByteDance/Ouro-1.4B"]).values())
    assert old == count([model.original]) and round(old / 1e9, 2) == 1.43
    # a Jet layer by hand: q, k, v, gate, o, a and b; the filters' two matrices and bias; norms, decay
    D, H, K, V = 2048, 8, 128, 256
    C = H * V
    layer = D * (2 * H * K + 3 * C + 2 * H) + D * C // 8 + C // 8 * 4 * C + 4 * C + D + V + 2 * H
    assert new == 6 * layer and 0.08 < new / old < 0.082
    assert model.loop == (0, 29)


def test_jet_nemotron_is_as_large_as_published():
    model = on_meta("jet-ai/Jet-Nemotron-2B")
    shapes = jet_shapes(PUBLISHED["jet-ai/Jet-Nemotron-2B"])
    assert count([model.original]) == sum(torch.Size(shape).numel() for shape in shapes.values())
    assert 1.9e9 < count([model.original]) < 2.1e9
    assert model.loop == (7, 20) and model.layers[0].fast_shape == (12, 96, 256)
