"""Load and save: from a repository or folder to a model that can sleep, and from that to a folder."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .. import device as machine
from ..records import write_atomically
from ..tasks.gsm_infinite.tokens import padding as padding_of
from .adapter import FAMILIES, Insert
from .files import check_memory, fetch, read_json
from .hybrids import Plain
from .lora import LoRA, add_lora, without_lora

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
OWN, OWN_WEIGHTS = "sleep.json", "sleep.safetensors"  # beside the files of transformers
UNFINISHED = "sleep.unfinished"  # there while files are replaced


def load(source, *, loop=None, insert=None, lora=None, padding=None, dtype="float32", device="cpu",
         revision=None, trust_remote_code=False, backend="auto"):  # fmt: skip
    """Load a pretrained model so that it can be put to sleep.

    Parameters
    ----------
    source : str or path_like
        ``"owner/name"`` of a repository, or a folder: one with transformers' own files, or one that
        :func:`save` has written.
    loop : tuple of (int, int), optional
        First and last layer of the original, from 0, that repeated passes run through.
    insert : Insert, optional
        Layers of fast weights to add; a model without any needs some.
    lora : LoRA, optional
        Learn low-rank differences, besides whatever is inserted; the original's own weights stay as they are.
    padding : int, optional
        The token that is padding; if absent, the tokenizer's, unless that is also its end of text.
    dtype : {"float32", "bfloat16", "float64"}
        Precision of the original's weights.  What is added is float32 (beside float64 that), to learn in.
    device : str
        "auto", "cpu", "cuda", or one CUDA device.
    revision : str, optional
        Branch, tag or commit of a repository.
    trust_remote_code : bool or str
        Whether Python files that come with the model may run.  They can do whatever you can: read them first.
        True is said of `source`.  If that is a saved model whose original lies elsewhere, say which, as the
        error does: its source or, if a revision was saved, ``source@revision``.
    backend : str
        Backend of the recurrences, see :func:`gated_delta_rule`.

    Returns
    -------
    PretrainedLM
        With its ``tokenizer``, or None if there is none.  It is in evaluation mode: dropout is off.

    Raises
    ------
    ValueError, OSError, MemoryError, ImportError
        If there is no such model, a file is missing or damaged, the network cannot be reached, the family is
        unknown or has no fast weights, the tokenizer does not fit, there is too little memory, or a package
        is not installed; the message says what to do.

    Notes
    -----
    Only weights in safetensors are read: other formats can run code.

    Chapter: 16_pretrained
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    target = machine.find_device(device)
    given = dict(loop=loop, insert=insert, lora=lora, padding=padding)
    found = resolve(source, revision, trust_remote_code, **given)
    check_memory(found.base, DTYPES[dtype], target)
    original = load_original(found.base, DTYPES[dtype], *found.trust)
    tokenizer = load_tokenizer(found.base, found.trust[0])
    if tokenizer is not None:
        check_tokenizer(tokenizer, original.config.get_text_config().vocab_size)
    lora, options = found.settings.pop("lora"), found.settings
    if options["padding"] is None and not found.saved and tokenizer is not None:
        options["padding"] = padding_of(tokenizer, alone=True)
    model = adapt(original.to(target), backend=backend, **options)
    if lora is not None:
        add_lora(model, lora)
    if found.saved:
        load_own(model, found.folder)
    model.tokenizer, model.source = tokenizer, found.origin
    return model.eval()


class Found(NamedTuple):
    """What a source turns out to be.

    Attributes
    ----------
    folder, base : Path
        Where the files of the source are, and where the original's, in transformers' format, are.
    settings : dict
        ``loop``, ``insert``, ``lora`` and ``padding``: those given or, if `saved`, those saved with it.
    saved : bool
        Whether :func:`save` has written the folder.
    origin : (str, str or None) or None
        Source and revision of the original, if it is known.
    trust : (bool, bool or str)
        Whether code that comes with the original may run, and what `trust_remote_code` says so.
    """

    folder: Path
    base: Path
    settings: dict
    saved: bool
    origin: tuple | None
    trust: tuple


def resolve(source, revision=None, trust_remote_code=False, weights=True, **given):
    """Find the files of a source, fetched with or without `weights`, and its settings: a :class:`Found`."""
    trusted = trust_remote_code in (True, str(source))
    folder = fetch(source, revision, trusted, weights)
    own = read_own(folder)
    if own is None:
        if Path(source).expanduser().is_dir():
            origin = str(folder.resolve()), revision
        else:  # the commit that was fetched: a branch moves on
            origin = str(source), folder.name if folder.parent.name == "snapshots" else revision
        return Found(folder, folder, given, False, origin, (trusted, True))
    if odd := [name for name, value in given.items() if value is not None]:
        raise ValueError(f"{odd[0]}: {folder} was saved with settings of its own; leave it out")
    try:
        settings = dict(loop=tuple(own["loop"]), padding=own["padding"])
        kinds = dict(insert=Insert, lora=LoRA)
        settings |= {name: own[name] and kind(**own[name]) for name, kind in kinds.items()}
        name, version = own["base"] or (None, None)
        known = isinstance(own["base"], list) and isinstance(name, str) and isinstance(version, str | None)
        if own["base"] and not known:
            raise ValueError(f"base must be a source and a revision; got {own['base']!r}")
    except (TypeError, ValueError) as error:
        raise ValueError(f"source: {folder / OWN} is damaged: {error}") from error
    if name is None:
        return Found(folder, folder, settings, True, None, (trusted, True))
    wanted = f"{name}@{version}" if version else name  # True is said of the folder, not of what that names
    trust = trust_remote_code == wanted, wanted
    return Found(folder, fetch(name, version, trust[0], weights), settings, True, (name, version), trust)


def adapt(original, **options):
    """Put a model of transformers, already in memory, behind the interface of sleep.

    Parameters
    ----------
    original : transformers.PreTrainedModel
        A causal language model.
    **options
        Those of :class:`PretrainedLM`.

    Returns
    -------
    PretrainedLM
        If its family is none of ``FAMILIES``, a trial has shown that one pass without eviction gives the
        original's logits (not on device "meta").

    Raises
    ------
    ValueError
        If the family cannot be run here, or the model has no fast weights.

    Chapter: 16_pretrained
    """
    enter_ours()
    kind = original.config.model_type
    known = FAMILIES.get(kind)
    try:
        model = (known or Plain)(original, **options)
        if known is None:
            check_alike(model, original)
    except (AttributeError, TypeError, NotImplementedError) as error:  # the last by transformers: no decoder
        raise ValueError(
            f"source: the layers of a {kind} are not built as Llama's ({error}); known families are "
            f"{', '.join(sorted(FAMILIES))}, others are entered with sleeplib.pretrained.family"
        ) from error
    if not model.has_fast_weights:
        raise ValueError(
            f"source: a {kind} has no fast weights, so sleep has nowhere to write; insert some, for example "
            f"insert=Insert(after=({len(model.layers) // 2 - 1}, {len(model.layers) - 1}), num_heads=8, "
            "key_size=128, value_size=256), and train them"
        )
    return model


@torch.no_grad()
def check_alike(model, original, length=12, tolerance=1e-3):
    """Raise ValueError unless our run of a model gives the original's logits on a few tokens."""
    if model.device.type == "meta":
        return
    training = [(module, module.training) for module in original.modules()]
    tokens = torch.arange(1, length + 1, device=model.device).unsqueeze(0) * 7 % model.vocab_size
    if model.padding is not None:  # the original would read it
        tokens[tokens == model.padding] = model.padding - 1 if model.padding else 1
    try:
        theirs = original.eval()(tokens).logits.float()
        ours = model(tokens, model.initial_state(1))[0].float()
    finally:
        for module, mode in training:
            module.training = mode
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    if not error <= (tolerance if model.dtype != torch.bfloat16 else 0.1):
        raise ValueError(
            f"source: run as Llama is, a {original.config.model_type} gives other logits than its own (by "
            f"{error:.2g} of the largest): its family needs an adapter, see sleeplib.pretrained.family"
        )


def read_own(folder):
    """The settings that :func:`save` has left in a folder, or None."""
    if (folder / UNFINISHED).exists():
        raise ValueError(f"source: {folder} was not written to its end; save the model again")
    if not (folder / OWN).exists():
        return None
    found = read_json(folder / OWN, "")
    if missing := {"loop", "insert", "padding", "lora", "base"} - found.keys():
        raise ValueError(f"source: {folder / OWN} is damaged: it has no {', '.join(sorted(missing))}")
    return found


def enter_ours():
    """Tell transformers, and ``FAMILIES``, of the models that transformers does not have."""
    from . import jet, ouro  # noqa: F401


def load_original(folder, dtype, trust_remote_code, wanted=True):
    """Load the model of a folder with transformers; an error unless every weight is found."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    enter_ours()
    settings = read_json(folder / "config.json", "it is no folder of a model of transformers")
    native = settings.get("model_type") in CONFIG_MAPPING
    if not native and not trust_remote_code:
        code = f"; it brings code of its own: read that, then give trust_remote_code={wanted!r}"
        kind = settings.get("model_type")
        raise ValueError(
            f"source: {kind!r} is no model of this version of transformers{code * ('auto_map' in settings)}"
        )
    options = dict(local_files_only=True, trust_remote_code=trust_remote_code and not native)
    try:
        config = AutoConfig.from_pretrained(folder, **options)
        model, notes = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
    except (ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"source: {folder} cannot be read: {error}") from error
    if missing := sorted(notes["missing_keys"]):
        raise ValueError(
            f"source: {folder} lacks {len(missing)} weights of a {config.model_type}, such as {missing[0]}"
        )
    return model


def load_tokenizer(folder, trust_remote_code=False):
    """The tokenizer of a folder, or None if there is none."""
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    options = dict(local_files_only=True, trust_remote_code=trust_remote_code)
    try:
        return AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:  # what a damaged file raises depends on its format
        raise ValueError(f"source: the tokenizer of {folder} cannot be read: {error}") from error


def check_tokenizer(tokenizer, vocab_size):
    """Raise ValueError if a tokenizer has tokens for which a model has no embedding."""
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= vocab_size:
        raise ValueError(
            f"tokenizer: its tokens go up to {largest}, the model's to {vocab_size - 1}: it belongs to "
            "another model; take the one that came with the weights"
        )


def save(model, folder, *, base=True):
    """Write a model to a folder, from which :func:`load` can make it again.

    Parameters
    ----------
    model : PretrainedLM
    folder : path_like
    base : bool
        Whether to write the original's weights too, in transformers' own format, so that it can read them.
        If not, only what was added is written, and where the original came from: some megabytes.

    Raises
    ------
    ValueError
        If `base` is False and the original's weights may have changed, or nobody knows where they came from.

    Chapter: 16_pretrained
    """
    folder, lora = Path(folder), model.lora
    if not base and model.source is None:
        raise ValueError("base: nobody knows where the original came from; save it too, with base=True")
    if not base and any(p.requires_grad for p in model.original_parameters()):
        raise ValueError("base: the original's weights may have been trained; save them too, with base=True")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        if base:
            weights = without_lora(model.original.state_dict())
            model.original.save_pretrained(part, state_dict=weights)
            if model.tokenizer is not None:
                model.tokenizer.save_pretrained(part)
        added = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items() if model.is_added(k)}
        save_file(added, part / OWN_WEIGHTS)
        notes = model.settings() | dict(lora=lora and vars(lora), base=None if base else model.source)
        write_atomically(part / OWN, json.dumps(notes, indent=1).encode())
        folder.mkdir(exist_ok=True)
        (folder / UNFINISHED).touch()  # what is stopped from here on is a mixture, and is refused
        replaced = False
        try:
            for file in part.iterdir():
                target = folder / file.name
                if target.is_symlink():
                    target.unlink()
                elif target.is_dir():
                    shutil.rmtree(target)
                os.replace(file, target)
                replaced = True
        except BaseException:
            if not replaced:
                (folder / UNFINISHED).unlink()
            raise
        (folder / UNFINISHED).unlink()
    finally:
        shutil.rmtree(part, ignore_errors=True)


def load_own(model, folder):
    """Load what was added to a model from a folder that :func:`save` has written."""
    file = folder / OWN_WEIGHTS
    if not file.is_file():
        raise FileNotFoundError(f"source: {file} is missing")
    try:
        added = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"source: {file} is damaged: {error}") from error
    own = {k: v.shape for k, v in model.state_dict().items() if model.is_added(k)}
    if own != {k: v.shape for k, v in added.items()}:
        odd = sorted(own.keys() ^ added.keys()) or sorted(k for k in own if own[k] != added[k].shape)
        raise ValueError(f"source: {file} does not fit {folder / OWN}, for example in {odd[0]}")
    model.load_state_dict(added, strict=False)
