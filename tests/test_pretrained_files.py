"""Loading and saving pretrained models: what comes back is what was, and what is wrong is said in words."""

import json
import os
import shutil
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from tiny_pretrained import byte_tokenizer, padded_batch, tiny_config, tiny_original

import sleeplib as sl
from sleeplib.tasks.check import check_task
from sleeplib.tasks.gsm_infinite import solve_text

pytest.importorskip("transformers")
pytest.importorskip("peft")

from sleeplib import pretrained
from sleeplib.pretrained import Insert, LoRA, PretrainedLM, TokenizedGSM, load, save
from sleeplib.pretrained.loading import load_tokenizer

INSERT = Insert(after=(1, 3), num_heads=2, key_size=8, value_size=16)
VOCAB = 260


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each of a hybrid and a plain transformer, as their authors would upload them."""
    root, found = tmp_path_factory.mktemp("checkpoints"), {}
    for name in ("qwen3_5", "llama-tied"):
        found[name] = root / name
        tiny_original(name, vocab_size=VOCAB, pad_token_id=257, eos_token_id=256).save_pretrained(found[name])
        byte_tokenizer().save_pretrained(found[name])
    return found


@torch.no_grad()
def logits(model):
    tokens = padded_batch()[0]
    return model(tokens, model.initial_state(len(tokens)))[0]


@torch.no_grad()
def disturb(model, names):
    """Change the parameters whose names contain one of `names`."""
    generator = torch.Generator().manual_seed(7)
    for name, p in model.named_parameters():
        if any(part in name for part in names):
            p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p.dtype))


def test_a_folder_becomes_a_model_with_its_tokenizer(folders):
    model = load(folders["qwen3_5"])
    assert isinstance(model, PretrainedLM) and model.padding == 257 and model.loop == (0, 3)
    assert model.tokenizer.decode(model.tokenizer("sleep").input_ids) == "sleep"
    theirs = tiny_original("qwen3_5", vocab_size=VOCAB, pad_token_id=257, eos_token_id=256)
    with torch.no_grad():
        assert (logits(model) - theirs(padded_batch()[0]).logits).abs().max() < 1e-4


def test_a_checkpoint_with_pictures_is_read_as_text(tmp_path):
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    vision = dict(depth=1, hidden_size=16, num_heads=2, intermediate_size=16, out_hidden_size=32)
    text = tiny_config("qwen3_5").to_dict()
    whole = Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config=vision)).eval()
    whole.save_pretrained(tmp_path)
    model, tokens = load(tmp_path), padded_batch()[0]
    with torch.no_grad():
        assert (logits(model) - whole(tokens).logits).abs().max() < 1e-5


@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize(
    "name, lora",
    [("qwen3_5", None), ("qwen3_5", LoRA(2, 4)), ("llama-tied", None), ("llama-tied", LoRA(2, 4))],
)
def test_what_was_saved_comes_back(folders, tmp_path, name, lora, base):
    insert = INSERT if name == "llama-tied" else None
    model = load(folders[name], loop=(1, 2), insert=insert, lora=lora)
    before = logits(model)
    if lora is None and not base:
        with pytest.raises(ValueError, match="base: the original's weights may have been trained"):
            save(model, tmp_path / "out", base=False)
        model.learn("fast") if insert else model.requires_grad_(False)
    disturb(model, [".mixer.", ".lora_"] if lora or not base else ["."])
    after = logits(model)
    assert base is False and insert is lora is None or (after - before).abs().max() > 1e-3
    save(model, tmp_path / "out", base=base)
    again = load(tmp_path / "out")
    assert torch.equal(logits(again), after)
    assert (again.loop, again.padding, again.insert, again.lora) == (
        model.loop, model.padding, insert, lora,
    )  # fmt: skip
    assert (tmp_path / "out" / "model.safetensors").exists() == base
    assert not [file for file in tmp_path.iterdir() if file.name != "out"]  # no temporary folder stays
    with pytest.raises(ValueError, match="loop: .* was saved with settings of its own"):
        load(tmp_path / "out", loop=(0, 1))


def test_a_save_that_was_stopped_is_not_taken_for_a_model(folders, tmp_path):
    save(load(folders["llama-tied"], insert=INSERT), tmp_path / "out")
    other, moves, honest = load(folders["llama-tied"], insert=INSERT), [], os.replace

    def replace(source, target):
        if Path(target).parent == tmp_path / "out":
            moves.append(target)
            if len(moves) == 2:
                raise OSError(28, "No space left on device")
        honest(source, target)

    with patch("os.replace", replace), pytest.raises(OSError, match="No space left"):
        save(other, tmp_path / "out")
    with pytest.raises(ValueError, match="source: .* was not written to its end; save the model again"):
        load(tmp_path / "out")
    save(other, tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "out")), logits(other))


def test_a_tokenizer_with_several_templates_is_saved_twice(folders, tmp_path):
    model = load(folders["qwen3_5"])
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    model.tokenizer = load_tokenizer(tmp_path / "tokenizer")
    model.tokenizer.chat_template = {"default": "a", "tool_use": "b"}
    for _ in range(2):
        save(model, tmp_path / "out")
    assert load(tmp_path / "out").tokenizer.chat_template == {"default": "a", "tool_use": "b"}


def test_what_a_saved_model_names_is_not_what_the_user_has_trusted(folders, tmp_path):
    """True trusts the folder; the original, which lies elsewhere, is trusted by its own name."""
    model = load(folders["llama-tied"], insert=INSERT)
    model.learn("fast")
    save(model, tmp_path / "out", base=False)
    (name, _), asked = json.loads((tmp_path / "out" / "sleep.json").read_text())["base"], []
    with patch("sleeplib.pretrained.loading.load_original", lambda *given: asked.append(given[2:]) or 1 / 0):
        for trust in (False, True, name):
            with pytest.raises(ZeroDivisionError):
                load(tmp_path / "out", trust_remote_code=trust)
        edit(tmp_path / "out" / "sleep.json", base=["good/original", "refs/pr/1"])
        with patch("huggingface_hub.snapshot_download", lambda *given, **options: str(folders["llama-tied"])):
            for trust in ("good/original", "good/original@refs/pr/1"):
                with pytest.raises(ZeroDivisionError):
                    load(tmp_path / "out", trust_remote_code=trust)
    wanted = "good/original@refs/pr/1"
    assert asked == [(False, name), (False, name), (True, name), (False, wanted), (True, wanted)]


def test_a_saved_model_names_the_commit_that_it_was_made_from(folders, tmp_path):
    commit = shutil.copytree(folders["llama-tied"], tmp_path / "snapshots" / ("0123456789" * 4))
    with patch("huggingface_hub.snapshot_download", lambda *given, **options: str(commit)):
        assert load("owner/name", insert=INSERT).source == ("owner/name", "0123456789" * 4)


def test_a_folder_that_was_named_from_here_is_found_from_elsewhere(folders, tmp_path, monkeypatch):
    folder = Path(folders["llama-tied"])
    monkeypatch.chdir(folder.parent)
    model = load(folder.name, insert=INSERT)
    model.learn("fast")
    save(model, tmp_path / "out", base=False)
    monkeypatch.chdir(tmp_path)
    assert torch.equal(logits(load("out")), logits(model))


def test_transformers_reads_what_was_saved(folders, tmp_path):
    from transformers import AutoModelForCausalLM

    model = load(folders["qwen3_5"], lora=LoRA(2, 4))
    save(model, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert (theirs(padded_batch()[0]).logits - logits(model)).abs().max() < 1e-4


def test_the_originals_weights_may_be_bfloat16_and_what_is_added_is_not(folders):
    model = load(folders["llama-tied"], insert=INSERT, lora=LoRA(2, 4), dtype="bfloat16")
    kinds = {model.is_added(name): p.dtype for name, p in model.named_parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    state = sl.sleep(model, padded_batch()[0], model.initial_state(3), passes=2)
    assert all(S is None or S.dtype == torch.float32 for S in state.fast_weights)
    assert model(padded_batch()[0], state)[0].dtype == torch.bfloat16


def test_text_is_read_asleep_and_written_on(folders):
    model, text = load(folders["qwen3_5"]), "One, two, three, four."
    written = pretrained.write(model, text, 6, window=8, passes=3)
    sleeper = sl.Sleeper(model, window=8, passes=3)
    sleeper.feed(model.tokenizer(text, return_tensors="pt").input_ids)
    tokens = sleeper.generate(6)[0].tolist()
    assert sleeper.naps == 3 and written == model.tokenizer.decode(tokens)
    model.tokenizer.eos_token_id = tokens[3]  # where it would have ended
    assert pretrained.write(model, text, 6, window=8, passes=3) == model.tokenizer.decode(
        tokens[: tokens.index(tokens[3])]
    )
    with pytest.raises(ValueError, match="text: there is nothing to read"):
        pretrained.write(model, "", 6, window=8)
    model.tokenizer = None
    with pytest.raises(ValueError, match="model: it came without a tokenizer"):
        pretrained.write(model, text, 6, window=8)


# What goes wrong


def copy(folders, tmp_path, name="qwen3_5"):
    return shutil.copytree(folders[name], tmp_path / "copy")


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def breakages():
    def no_places(folder):
        (folder / "model.safetensors.index.json").write_text("{}")

    def base(value):
        found = dict(loop=[0, 3], insert=None, padding=None, lora=None, base=value)
        return lambda folder: (folder / "sleep.json").write_text(json.dumps(found))

    def odd_settings(folder):
        found = dict(loop=[0, 3], insert={"foo": 1}, padding=None, lora=None, base=None)
        (folder / "sleep.json").write_text(json.dumps(found))

    def drop_config(folder):
        (folder / "config.json").unlink()

    def drop_weights(folder):
        (folder / "model.safetensors").unlink()

    def pickle_weights(folder):
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")

    def cut_weights(folder):
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])

    def lose_shard(folder):
        index = {"weight_map": {"x": "model-00001-of-00002.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    def lose_a_weight(folder):
        from safetensors.torch import load_file, save_file

        weights = load_file(folder / "model.safetensors")
        del weights["model.layers.0.linear_attn.A_log"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    def damage_config(folder):
        (folder / "config.json").write_text("{")

    def foreign(folder):
        edit(folder / "config.json", model_type="dreamer")

    def own_code(folder):
        edit(folder / "config.json", model_type="dreamer", auto_map={"AutoConfig": "x.Y"})

    def other_tokenizer(folder):
        byte_tokenizer().save_pretrained(folder)
        edit(folder / "tokenizer.json", added_tokens=[])
        found = json.loads((folder / "tokenizer.json").read_text())
        found["model"]["vocab"]["much"] = 1000
        (folder / "tokenizer.json").write_text(json.dumps(found))

    def damaged_tokenizer(folder):
        (folder / "tokenizer.json").write_text("{}")

    return [
        (drop_config, FileNotFoundError, "config.json is missing"),
        (drop_weights, FileNotFoundError, "model.safetensors is missing; the download is not whole"),
        (pickle_weights, FileNotFoundError, "convert them to safetensors"),
        (cut_weights, ValueError, "model.safetensors is damaged"),
        (lose_shard, FileNotFoundError, "00001-of-00002.safetensors is missing"),
        (lose_a_weight, ValueError, "lacks 1 weights .*A_log"),
        (damage_config, ValueError, "config.json is damaged"),
        (foreign, ValueError, "'dreamer' is no model of this version of transformers$"),
        (own_code, ValueError, "read that, then give trust_remote_code=True"),
        (no_places, ValueError, "index.json is damaged: it does not say in which file a weight is"),
        (odd_settings, ValueError, "sleep.json is damaged: .*unexpected keyword"),
        *((base(x), ValueError, "sleep.json is damaged") for x in ([1, None], "ab", 5, ["a/b", ["x"]])),
        (other_tokenizer, ValueError, "tokenizer: its tokens go up to 1000, the model's to 259"),
        (damaged_tokenizer, ValueError, "the tokenizer of .* cannot be read"),
    ]


@pytest.mark.parametrize("breakage, kind, message", breakages(), ids=lambda x: getattr(x, "__name__", ""))
def test_a_folder_that_is_not_right_is_refused_in_words(folders, tmp_path, breakage, kind, message):
    folder = copy(folders, tmp_path)
    breakage(folder)
    with pytest.raises(kind, match=message):
        load(folder)


@pytest.mark.parametrize(
    "source, kind, message",
    [
        ("no/such/folder", FileNotFoundError, "source: there is no folder 'no/such/folder'"),
        ("gpt2", FileNotFoundError, "'owner/name', or a folder that exists"),
        ("../somewhere", FileNotFoundError, "there is no folder"),
    ],
)
def test_no_such_folder(source, kind, message):
    with pytest.raises(kind, match=message):
        load(source)


def hub_errors():
    from httpx import Request, Response
    from huggingface_hub import errors

    response = Response(404, request=Request("GET", "https://huggingface.co"))
    return [
        (errors.RepositoryNotFoundError("x", response=response), FileNotFoundError, "huggingface.co has no"),
        (errors.GatedRepoError("x", response=response), PermissionError, "hf auth login"),
        (
            errors.RevisionNotFoundError("x", response=response),
            FileNotFoundError,
            "revision: owner/name has no",
        ),
        (errors.LocalEntryNotFoundError("x"), ConnectionError, "hf download owner/name"),
        (ConnectionError("x"), ConnectionError, "cannot be reached"),
    ]


@pytest.mark.parametrize("number", range(5))
def test_what_the_hub_refuses_is_said_in_words(number):
    raised, kind, message = hub_errors()[number]
    with patch("huggingface_hub.snapshot_download", side_effect=raised), pytest.raises(kind, match=message):
        load("owner/name", revision="main")


def test_without_a_network_it_says_what_to_download():
    """The hub's own code runs here, on a machine that is told that it is offline."""
    with patch("huggingface_hub.constants.HF_HUB_OFFLINE", True):
        with pytest.raises(ConnectionError, match="hf download owner/no-such-name --local-dir FOLDER"):
            load("owner/no-such-name")


def test_files_of_code_are_asked_for_only_if_trusted(folders):
    asked = []

    def download(name, revision, allow_patterns):
        asked.append(allow_patterns)
        return folders["qwen3_5"]

    with patch("huggingface_hub.snapshot_download", download):
        load("owner/name")
        load("owner/name", trust_remote_code=True)
    assert "*.py" not in asked[0] and "*.py" in asked[1]
    assert all("*.safetensors" in x and "*.bin" not in x for x in asked)


@pytest.mark.parametrize("revision", [None, "v1.0"])
def test_a_task_takes_its_tokenizer_from_the_revision_that_it_names(folders, revision):
    asked = []

    def download(name, revision, allow_patterns):
        asked.append((name, revision, "*.safetensors" in allow_patterns))
        return folders["qwen3_5"]

    with patch("huggingface_hub.snapshot_download", download):
        story = TokenizedGSM(**STORY, source="owner/other", vocab_size=VOCAB, revision=revision)
        assert story.tokenizer is not None
    assert asked == [("owner/other", revision, False)]


def test_too_little_memory_is_noticed_before_loading(folders):
    with patch("sleeplib.device.free_bytes", lambda device: 1000):
        with pytest.raises(MemoryError, match="dtype='bfloat16' takes half, or choose a smaller model"):
            load(folders["qwen3_5"])


def test_a_model_without_fast_weights_is_told_to_insert_some(folders):
    with pytest.raises(ValueError, match=r"a llama has no fast weights.* insert=Insert\(after=\(1, 3\)"):
        load(folders["llama-tied"])


def test_a_family_that_is_not_like_llama_is_refused():
    from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config

    torch.manual_seed(0)
    settings = dict(vocab_size=40, n_embd=32, n_layer=4, n_head=4)
    with pytest.raises(ValueError, match="the layers of a gpt2 are not built as Llama's"):
        pretrained.adapt(AutoModelForCausalLM.from_config(GPT2Config(**settings)), insert=INSERT)
    settings = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=4, head_dim=8)
    gemma = AutoModelForCausalLM.from_config(
        Gemma2Config(**settings, num_attention_heads=4, num_key_value_heads=2)
    )
    with pytest.raises(ValueError, match="a gemma2 gives other logits than its own"):
        pretrained.adapt(gemma, insert=INSERT)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(loop=(2, 4)), "loop must be .first, last., 0 <= first <= last < 4"),
        (dict(loop=3), "loop must be"),
        (dict(padding=900), "padding must be"),
        (dict(backend="fast"), "backend must be one of"),
        (dict(dtype="float16"), "dtype must be one of"),
        (dict(insert=Insert((4,), 2, 8, 8)), "insert.after must lie in 0 .. 3"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(folders, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        load(folders["qwen3_5"], **options)


@pytest.mark.parametrize("after", [(), (2, 1), (1, 1), (-1,), ("x",)])
def test_layers_are_inserted_after_numbers(after):
    with pytest.raises((ValueError, TypeError), match="insert.after"):
        Insert(after, 2, 8, 8)


STORY = dict(ops=(1, 2), tokens=(150, 300), window=150, theme="harbor", level="medium", mode="forward")
STORY |= dict(places=(2, 2), kinds=(2, 2), noise=(2, 2), max_value=20)


def test_a_task_in_the_tokens_of_a_model(folders):
    source = str(folders["qwen3_5"])
    task = TokenizedGSM(**STORY, source=source, vocab_size=VOCAB)
    check_task(task, count=2)
    batch = task.batch(3, np.random.default_rng(0))
    plain = sl.tasks.GSMInfinite(**STORY).batch(3, np.random.default_rng(0), tokenizer=task.tokenizer)
    width = plain.inputs.shape[1]
    assert batch.inputs.shape == (3, task.length) and torch.equal(batch.inputs[:, :width], plain.inputs)
    assert (batch.inputs[:, width:] == 257).all() and (batch.labels[:, width:] == -100).all()
    text = task.tokenizer.decode(batch.inputs[0], skip_special_tokens=True)
    answer = task.tokenizer.decode(batch.labels[0][batch.labels[0] != -100])
    assert str(solve_text(text.partition(" Answer:")[0])) == answer.strip()
    assert torch.equal(task.solve(batch.inputs), batch.labels)
    with pytest.raises(ValueError, match=f"inputs must ask at position {task.tokens[1]}"):
        task.solve(batch.inputs.roll(1, dims=1))
    with pytest.raises(ValueError, match="room: question and answer take"):
        TokenizedGSM(**STORY, source=source, vocab_size=VOCAB, room=4).batch(3, np.random.default_rng(0))
    short = TokenizedGSM(**STORY | dict(tokens=(5, 6), window=6), source=source, vocab_size=VOCAB, room=5)
    with pytest.raises(ValueError, match="too short for a problem"):
        short.batch(1, np.random.default_rng(0))
    with pytest.raises(ValueError, match="tokenizer: its tokens go up to 257, the model's to 99"):
        TokenizedGSM(**STORY, source=source, vocab_size=100).batch(1, np.random.default_rng(0))
