"""HybridLM: its configuration, its state, its loop, its files."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import VOCAB, close, sequence, tiny_model

import sleeplib as sl


@pytest.mark.parametrize(
    "error, names, fields",
    [
        (ValueError, "pattern must be letters of 'aghj'", dict(pattern="agx")),
        (ValueError, "pattern must be", dict(pattern="")),
        (ValueError, "pattern must be", dict(pattern=None)),
        (ValueError, "vocab_size must be an int of at least 1; got 0", dict(vocab_size=0)),
        (TypeError, "d_model must be an int of at least 1; got 64.0", dict(d_model=64.0)),
        (TypeError, "num_heads must be an int of at least 1; got True", dict(num_heads=True)),
        (ValueError, "key_size must be an int of at least 1", dict(key_size=0)),
        (ValueError, "d_model must be a multiple of 2 [*] num_heads", dict(d_model=20, num_heads=4)),
        (ValueError, "loop must be .first, last., 0 <= first <= last < 4", dict(loop=(2, 4))),
        (ValueError, "loop must be", dict(loop=(2, 1))),
        (ValueError, "loop must be", dict(loop=(1,))),
        (ValueError, "loop must be", dict(loop=(-1, 2))),
        (ValueError, "loop must be", dict(loop=2)),
        (ValueError, "loop must be", dict(loop=(0.0, 1.0))),
        (ValueError, "loop must be", dict(loop="01")),
        (ValueError, "rope_base must be a finite number of at least 1", dict(rope_base=0.0)),
        (ValueError, "backend must be one of", dict(backend="fast")),
    ],
)
def test_a_bad_config_is_refused(error, names, fields):
    with pytest.raises(error, match=names):
        sl.ModelConfig(**(dict(vocab_size=3) | fields))


def test_sizes_may_be_numpys_and_none_is_too_large():
    config = sl.ModelConfig(vocab_size=np.int64(3), d_model=16, num_heads=2, loop=np.array([1, 2]))
    assert config.loop == (1, 2) and {type(i) for i in (*config.loop, config.vocab_size)} == {int}
    with pytest.raises(ValueError, match=f"^vocab_size must be an int of at most {2**31 - 1}; got {2**31}"):
        sl.ModelConfig(vocab_size=2**31)


def test_config_and_state_are_frozen():
    model = tiny_model()
    for thing, name in ((model.config, "d_model"), (model.initial_state(1), "position")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(thing, name, 3)


def test_the_initial_state_is_empty():
    state = tiny_model("agja").initial_state(3)
    assert [s if s is None else (tuple(s.shape), float(s.abs().sum())) for s in state.fast_weights] == [
        None,
        ((3, 2, 4, 8), 0.0),
        ((3, 2, 4, 8), 0.0),
        None,
    ]
    assert state.kv is None and state.conv is None and state.position == 0
    half = tiny_model(dtype=torch.bfloat16).initial_state(1)
    assert half.fast_weights[1].dtype == torch.float32
    with pytest.raises(ValueError, match="batch_size must be"):
        tiny_model().initial_state(0)


def test_a_call_is_embed_blocks_readout():
    model, tokens = tiny_model(), sequence(7)
    logits, state = model(tokens, model.initial_state(2))
    h, after = model.blocks(model.embed(tokens), model.initial_state(2))
    assert torch.equal(model.readout(h), logits) and logits.shape == (2, 7, VOCAB)
    assert state.position == after.position == 7
    assert model.embed(tokens).shape == h.shape == (2, 7, 16)


def test_the_past_state_is_left_alone():
    model = tiny_model("agja", dtype=torch.float32)
    _, state = model(sequence(5), model.initial_state(2))
    before = [s.clone() for s in state.fast_weights if s is not None] + [state.kv[0][0].clone()]
    model.blocks(model.embed(sequence(5, seed=2)), state, passes=3)
    for a, b in zip([s for s in state.fast_weights if s is not None] + [state.kv[0][0]], before):
        assert torch.equal(a, b)


def test_a_new_model_is_the_identity_for_any_number_of_passes():
    torch.manual_seed(0)
    model = sl.HybridLM(sl.ModelConfig(vocab_size=3, d_model=16, pattern="ahgj", num_heads=2))
    h = model.embed(sequence(5, vocab=3))
    assert torch.equal(model.blocks(h, model.initial_state(2), passes=3)[0], h)


def test_a_loop_over_all_is_no_loop():
    model, looped = tiny_model("agag"), tiny_model("agag", loop=(0, 3))
    h = model.embed(sequence(5))
    a, b = (m.blocks(h, m.initial_state(2), passes=3)[0] for m in (model, looped))
    assert torch.equal(a, b)
    assert model.has_fast_weights and not tiny_model("aa").has_fast_weights


@pytest.mark.parametrize(
    "error, names, call",
    [
        (TypeError, "tokens must be an int64 tensor; got list", lambda m: m.embed([[1]])),
        (TypeError, "tokens must .* got torch.int32", lambda m: m.embed(sequence(3).int())),
        (ValueError, "tokens must have shape .B, T.", lambda m: m.embed(sequence(3)[0])),
        (ValueError, "tokens must have shape", lambda m: m.embed(sequence(3)[:, :0])),
        (ValueError, "tokens must lie in 0 .. 5; got 0 .. 6", lambda m: m.embed(torch.tensor([[0, 6]]))),
        (ValueError, "tokens must lie in", lambda m: m.embed(torch.tensor([[-1, 0]]))),
        (
            ValueError,
            "passes must be",
            lambda m: m.blocks(m.embed(sequence(3)), m.initial_state(2), passes=0),
        ),
        (
            ValueError,
            "passes must be",
            lambda m: m.blocks(m.embed(sequence(3)), m.initial_state(2), passes=1.0),
        ),
        (
            ValueError,
            "window must be",
            lambda m: m.blocks(m.embed(sequence(3)), m.initial_state(2), window=0),
        ),
        (
            ValueError,
            "state has 1 blocks, the model 4",
            lambda m: m(sequence(3), tiny_model("g").initial_state(2)),
        ),
        (ValueError, "state is not of 2 rows", lambda m: m(sequence(3), m.initial_state(1))),
        (
            ValueError,
            "state is not of 1 rows",
            lambda m: m(sequence(3)[:1], m(sequence(3), m.initial_state(2))[1]),
        ),
        (
            ValueError,
            "h must have shape .B, T, 16.",
            lambda m: m.blocks(torch.zeros(2, 3, 8), m.initial_state(2)),
        ),
    ],
)
def test_a_bad_call_is_refused(error, names, call):
    with pytest.raises(error, match=names):
        call(tiny_model())


# Files


def test_a_saved_model_comes_back_to_the_bit(tmp_path):
    for dtype in (torch.float32, torch.float64):
        model = tiny_model("ahja", (1, 2), dtype=dtype)
        model.save(tmp_path / "model")
        again = sl.HybridLM.from_checkpoint(tmp_path / "model")
        assert again.config == model.config
        for (name, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items()):
            assert a.dtype == b.dtype and torch.equal(a, b), name
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]


DAMAGE = ["not JSON", "a list", "binary config", "unknown field", "wrong field"]
DAMAGE += ["another model", "foreign", "integers", "truncated", "empty"]


def damage(folder, how):
    config, weights = folder / "config.json", folder / "model.safetensors"
    if how == "no config":
        config.unlink()
    elif how == "no weights":
        weights.unlink()
    elif how == "not JSON":
        config.write_text("{")
    elif how == "a list":
        config.write_text("[1]")
    elif how == "binary config":
        config.write_bytes(b"\xff\xfe\x00")
    elif how == "unknown field":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_size": 3}))
    elif how == "wrong field":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"num_heads": "2"}))
    elif how == "another model":
        tiny_model("aa").save(folder / "other")
        weights.write_bytes((folder / "other" / "model.safetensors").read_bytes())
    elif how == "foreign":
        save_file({"gpt.wte": torch.zeros(2, 2)}, weights)
    elif how == "integers":
        save_file({"embedding.weight": torch.zeros(2, 2, dtype=torch.int64)}, weights)
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-5])
    elif how == "empty":
        weights.write_bytes(b"")


def test_a_mistyped_folder_is_named_as_such():
    with pytest.raises(FileNotFoundError, match="^folder: 'nowhere/x' is no folder, and no model"):
        sl.HybridLM.from_checkpoint("nowhere/x")


@pytest.mark.parametrize("how", ["no config", "no weights"])
def test_a_missing_file_is_named(tmp_path, how):
    tiny_model().save(tmp_path)
    damage(tmp_path, how)
    with pytest.raises(FileNotFoundError, match=f"^folder: {tmp_path}.* is missing"):
        sl.HybridLM.from_checkpoint(tmp_path)


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_or_foreign_checkpoint_is_refused(tmp_path, how):
    tiny_model().save(tmp_path)
    damage(tmp_path, how)
    with pytest.raises(ValueError, match=f"^folder: {tmp_path}"):
        sl.HybridLM.from_checkpoint(tmp_path)


def test_models_of_one_seed_are_equal():
    config = sl.ModelConfig(vocab_size=4, d_model=16, num_heads=2)
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(sl.HybridLM(config))
    for a, b in zip(*(m.parameters() for m in models)):
        close(a, b, 1e-30)
