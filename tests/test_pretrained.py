"""Pretrained models behind the interface of sleep: one pass is the original, and sleep is Algorithm 1."""

import subprocess
import sys
from functools import cache
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from tiny import close
from tiny_pretrained import CONFIGS, HYBRIDS, padded_batch, tiny_original

import sleeplib as sl
from sleeplib.tasks.gsm_infinite.tokens import padding

pytest.importorskip("transformers")
pytest.importorskip("peft")

from sleeplib.pretrained import FAMILIES, Insert, LoRA, PretrainedLM, adapt, add_lora

INSERT = Insert(after=(1, 3), num_heads=2, key_size=8, value_size=16)
L = 5


@cache
def original(name):
    return tiny_original(name)


def needs_insert(name):
    return name.split("-")[0] not in FAMILIES


def sleepy(name, awake=True, **options):
    """A model that can sleep; unless it is `awake`, what was inserted does something."""
    insert = INSERT if needs_insert(name) else None
    model = adapt(tiny_original(name), **dict(insert=insert) | options)
    if not awake:
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for block in model.inserted:
                block.mixer.o.weight.copy_(0.3 * torch.randn(block.mixer.o.weight.shape, generator=generator))
    return model


def error(ours, theirs, mask=None):
    """The largest difference, of the largest value."""
    gap = (ours - theirs).abs()
    gap = gap if mask is None else gap * mask.unsqueeze(-1)
    return float(gap.max() / theirs.abs().max())


@torch.no_grad()
def differences(name, model=None):
    """How far one pass is from the original: with padding, without, and token by token."""
    tokens, mask = padded_batch()
    whole = tokens.clamp(min=1)
    theirs = original(name)(tokens, attention_mask=mask).logits
    plain = original(name)(whole).logits
    model = model or sleepy(name, padding=0)
    ours = model(tokens, model.initial_state(3))[0]
    sleeper = sl.Sleeper(model, window=1000, passes=1)
    pieces = torch.cat([sleeper.feed(x) for x in tokens.split([2, 1, 1, 4, 3], dim=1)], dim=1)
    return (
        error(ours, theirs, mask),
        error(model(whole, model.initial_state(3))[0], plain),
        error(pieces, theirs, mask),
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_one_pass_gives_the_originals_logits(name):
    assert max(differences(name)) < 1e-5


@pytest.mark.parametrize("name", ["qwen3_5", "olmo_hybrid", "mistral"])
def test_generation_is_the_originals(name):
    model, tokens = sleepy(name), padded_batch()[0].clamp(min=2)
    theirs = original(name).generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=7, do_sample=False, eos_token_id=None
    )
    sleeper = sl.Sleeper(model, window=1000, passes=1)
    sleeper.feed(tokens)
    cached, uncached = sleeper.generate(7), tokens
    for _ in range(7):
        with torch.no_grad():
            logits = model(uncached, model.initial_state(3))[0]
        uncached = torch.cat((uncached, logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(torch.cat((tokens, cached), dim=1), uncached) and torch.equal(uncached, theirs)


def tokens_and_labels(length=4 * L - 2, rows=2, seed=3):
    tokens = torch.randint(2, 40, (rows, length), generator=torch.Generator().manual_seed(seed))
    labels = torch.full_like(tokens, -100)
    labels[:, 3 * L :] = tokens.flip(1)[:, 3 * L :]
    return tokens, labels


SLEEPY = [*HYBRIDS, "llama", "mistral"]


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
@pytest.mark.parametrize("name", SLEEPY)
def test_streaming_is_batched(name, eviction):
    model = sleepy(name, awake=False, loop=(1, 2), padding=0)
    tokens, labels = tokens_and_labels()
    tokens[0, :7] = 0  # padding: all of the first window, and more
    with torch.no_grad():
        out = sl.sleep_forward(model, tokens, labels, window=L, passes=3, eviction=eviction)
    sleeper = sl.Sleeper(model, window=L, passes=3, eviction=eviction)
    logits = torch.cat([sleeper.feed(x) for x in tokens.split([3, 1, 7, 7], dim=1)], dim=1)
    assert sleeper.naps == 3
    assert error(logits[:, 3 * L :], out.logits[:, 3 * L :]) < 1e-4
    for a, b in zip(sleeper.state.fast_weights, out.state.fast_weights):
        assert a is b is None or error(a, b) < 1e-4


@pytest.mark.parametrize("name", SLEEPY)
def test_only_fast_weights_survive_hard_eviction(name):
    model = sleepy(name, awake=False)
    tokens, _ = tokens_and_labels()
    other = tokens.clone()
    other[:, 1] = (other[:, 1] + 1) % 40

    @torch.no_grad()
    def answer(tokens, forget=False, eviction="hard"):
        state = sl.sleep(model, tokens[:, :L], model.initial_state(2), passes=2, eviction=eviction)
        assert eviction != "hard" or state.kv is state.conv is state.key_ages is None
        if forget:
            empty = model.initial_state(2).fast_weights
            state = type(state)(empty, state.kv, state.conv, state.position, state.key_ages)
        return model(tokens[:, L : 2 * L], state)[0]

    assert torch.equal(answer(tokens, forget=True), answer(other, forget=True))
    assert error(answer(tokens), answer(other)) > 1e-4
    assert error(answer(tokens, forget=True, eviction="sliding"), answer(tokens, forget=True)) > 1e-4


@pytest.mark.parametrize("name", SLEEPY)
def test_gradients_flow_through_the_fast_weight(name):
    model = sleepy(name, awake=False)
    tokens, labels = tokens_and_labels()
    h = model.embed(tokens[:, :L]).detach().requires_grad_()
    _, state = model.blocks(h, model.initial_state(2), passes=2, write_only=True)
    logits, _ = model(tokens[:, L : 2 * L], state.evict("hard"))
    (found,) = torch.autograd.grad(logits.square().sum(), h)
    assert (found.flatten(2).norm(dim=-1) > 0).all()


@pytest.mark.parametrize("name", ["qwen3_5", "llama"])
def test_recomputation_changes_nothing(name):
    model = sleepy(name, awake=False)
    tokens, labels = tokens_and_labels()
    gradients = []
    for checkpoint in (False, True):
        model.zero_grad()
        sl.sleep_forward(model, tokens, labels, window=L, passes=2, checkpoint=checkpoint).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        close(a, b, 1e-6)


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_next", "llama"])
def test_low_rank_differences_on_every_projection_get_a_gradient(name):
    model = sleepy(name, awake=False)
    tokens, labels = tokens_and_labels()
    with torch.no_grad():
        before = model(tokens, model.initial_state(2))[0]
        projections = {
            k for k, m in model.named_modules() if isinstance(m, torch.nn.Linear) and k.startswith("layers.")
        }
    projections = {k for k in projections if not model.is_added(k)}
    add_lora(model, LoRA(rank=2, alpha=4))
    with torch.no_grad():
        assert torch.equal(model(tokens, model.initial_state(2))[0], before)
    sl.sleep_forward(model, tokens, labels, window=L, passes=2).loss.backward()
    low = {k: p for k, p in model.named_parameters() if ".lora_B." in k}
    assert {k.split(".lora_B.")[0] for k in low} == projections
    dead = {k for k, p in low.items() if p.grad is None or not p.grad.any()}
    assert not dead
    for k, p in model.named_parameters():
        assert p.requires_grad == model.is_added(k), k
        assert p.requires_grad or p.grad is None


def test_families_that_transformers_lacks_are_known_before_anything_is_loaded():
    code = """
import transformers
from sleeplib.pretrained import FAMILIES, adapt
config = transformers.GPT2Config(vocab_size=40, n_embd=8, n_layer=1, n_head=2)
assert "ouro" not in FAMILIES
try:
    adapt(transformers.AutoModelForCausalLM.from_config(config))
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "known families are jet_nemotron, olmo_hybrid, ouro, qwen3_5" in done.stdout, done.stderr


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [True, False])
def test_an_inserted_layer_does_not_read_padding_either(dynamic):
    insert = Insert((1,), 2, 8, 8, dynamic=dynamic)
    torch.manual_seed(0)
    model = adapt(tiny_original("llama"), insert=insert, padding=0)
    torch.nn.init.normal_(model.inserted[0].mixer.o.weight)
    real = torch.tensor([[5, 6, 7, 8]])
    padded = torch.tensor([[5, 6, 7, 8, 0, 0, 0]])
    (wanted, state), (found, behind) = (model(x, model.initial_state(1)) for x in (real, padded))
    close(found[:, :4], wanted, 1e-6)
    close(behind.fast_weights[2], state.fast_weights[2], 1e-6)
    assert (model.embed(padded)[:, 4:] == 0).all() and found[:, 4:].isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "qwen3_5"])
def test_a_model_in_double_precision_gets_layers_in_double_precision(name):
    model = adapt(tiny_original(name).double(), insert=Insert((1,), 2, 8, 8))
    tokens = padded_batch()[0]
    logits, _ = model(tokens, model.initial_state(len(tokens)))
    assert logits.dtype == torch.float64


def test_a_refused_model_is_left_as_it_was():
    original = tiny_original("llama").train()
    original.model.layers[1].eval()
    modes = [module.training for module in original.modules()]
    with (
        patch.object(PretrainedLM, "readout", lambda self, h: 2 * self.head(self.norm(h))),
        pytest.raises(ValueError, match="gives other logits than its own"),
    ):
        adapt(original, insert=Insert((1,), 2, 8, 8))
    assert [module.training for module in original.modules()] == modes


def test_padding_is_a_tokenizers_own_or_its_end_or_ours():
    for pad, end, wanted, alone in ((3, 4, 3, 3), (4, 4, 4, None), (None, 4, 4, None), (None, None, 0, None)):
        tokenizer = SimpleNamespace(pad_token_id=pad, eos_token_id=end)
        assert (padding(tokenizer), padding(tokenizer, alone=True)) == (wanted, alone)
