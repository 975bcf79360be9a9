"""Experiments as frozen values: a task, a model, a way to train; presets by name."""

import dataclasses
import hashlib
import json
import math
import numbers
import re
import typing
from dataclasses import dataclass, field

import numpy as np
import torch

from .model import ModelConfig
from .sleep import awake_chunks
from .tasks import TASKS, Rule110
from .tasks.base import IGNORE, SPLITS

PRESETS = {}  # name -> Experiment; presets.py fills it


def check_int(name, value, low, high=None):
    """Return `value` as an int; ValueError, naming it, unless it is whole (NumPy's too) and in range."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < low or high is not None and value > high:
        bounds = f"of at least {low}" if high is None else f"in {low} .. {high}"
        raise ValueError(f"{name} must be an int {bounds}; got {value!r}")
    return int(value)


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained.

    Parameters
    ----------
    steps : int
        Optimizer steps.
    batch : int
        Sequences a step.
    muon_lr, adamw_lr : float
        Learning rates of the hidden matrices and of everything else.
    warmup, decay : int
        Steps over which Muon's rate rises from 0 at the start and falls to 0 at the end; constant between.
    weight_decay : float
        For both optimizers, on matrices only.
    clip : float
        Largest norm of the gradient.
    eviction : {"hard", "keys", "sliding", "hard-then-sliding"}
        The last is hard for the first third of the steps: our reading of section 6.4, where one epoch in
        three does so.
    checkpoint : bool
        Recompute windows in the backward pass, see :func:`sleep_forward`.
    precision : {"float32", "bfloat16"}
        bfloat16 runs matrix products under autocast where the GPU has them; the state stays float32.
    graph : bool
        On CUDA, capture forward and backward as one CUDA graph.
    eval_every : int
        Steps between evaluations on held-out data.
    eval_batch : int
        Held-out sequences, the same every time; the final score uses 8 times as many.
    save_every : int
        Steps between checkpoints of a run.

    Raises
    ------
    TypeError, ValueError
        If a setting has another type, or makes no sense; the message names it.

    Notes
    -----
    Section 6 of the paper fixes the optimizers: Muon on hidden matrices, AdamW on the rest.

    Chapter: 11_rule110
    """

    steps: int
    batch: int
    muon_lr: float = 2e-3
    adamw_lr: float = 5e-5
    warmup: int = 50
    decay: int = 0
    weight_decay: float = 1e-4
    clip: float = 1.0
    eviction: str = "hard"
    checkpoint: bool = False
    precision: str = "float32"
    graph: bool = False
    eval_every: int = 50
    eval_batch: int = 512
    save_every: int = 200

    def __post_init__(self):
        for entry in dataclasses.fields(self):
            name, value, kind = entry.name, getattr(self, entry.name), entry.type
            wanted = {int: numbers.Integral, float: numbers.Real}.get(kind, kind)
            if not isinstance(value, wanted) or isinstance(value, bool) != (kind is bool):
                raise TypeError(f"train.{name} must be of type {kind.__name__}; got {value!r}")
            object.__setattr__(self, name, kind(value))
            low = 1 if name in ("steps", "batch", "eval_every", "eval_batch", "save_every") else 0
            if kind is not str and not low <= value < math.inf:
                raise ValueError(f"train.{name} must be at least {low} and finite; got {value}")
            # The default warm-up serves short trials too: they end before it does.
            if name in ("warmup", "decay") and self.steps < value != entry.default:
                raise ValueError(f"train.{name} must be at most train.steps = {self.steps}; got {value}")
        if not self.clip:
            raise ValueError("train.clip must be above 0, or nothing is learned; got 0")
        for name, known in (
            ("eviction", ("hard", "keys", "sliding", "hard-then-sliding")),
            ("precision", ("float32", "bfloat16")),
        ):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"train.{name} must be one of {', '.join(known)}; got {value!r}")

    def eviction_at(self, step):
        """What happens to the cache at a step: "hard" or "sliding"; at step `steps`, what a score sees."""
        first, _, last = self.eviction.partition("-then-")
        return last if last and 3 * step >= self.steps else first


@dataclass(frozen=True)
class Experiment:
    """One preset: everything a run depends on but N and the seed.

    Parameters
    ----------
    name : str
        Also the folder of its records: letters, digits, spaces and ``.,+=-_``.
    task : Rule110
        Any task of :mod:`sleeplib.tasks`, or a frozen dataclass of your own that passes :func:`check_task`.
    model : ModelConfig
    train : TrainConfig
    passes : tuple of int
        The N that are compared.
    seeds : tuple of int
        The seeds of the recorded runs.
    about : str
        One line for the command line.

    Notes
    -----
    Chapter: 11_rule110
    """

    name: str
    task: Rule110
    model: ModelConfig
    train: TrainConfig
    passes: tuple[int, ...] = (1, 2, 4)
    seeds: tuple[int, ...] = (0, 1, 2)
    about: str = field(default="", compare=False)

    def __post_init__(self):
        if not isinstance(self.name, str) or not re.fullmatch(r"\w([\w .,+=-]*[\w+=-])?", self.name):
            raise ValueError(f"name must be letters, digits, spaces and .,+=-_; got {self.name!r}")

    def config(self):
        """The experiment as plain data, as a run record keeps it.

        Raises
        ------
        TypeError, ValueError
            If the task is no dataclass, or holds what JSON has no word for.
        """
        task = type(self.task)
        own = f"{task.__module__}.{task.__qualname__}"
        if not dataclasses.is_dataclass(task):
            raise TypeError(f"task: a record keeps its fields, so {own} must be a dataclass")
        parts = {name: dataclasses.asdict(getattr(self, name)) for name in ("task", "model", "train")}
        kind = next((name for name, cls in TASKS.items() if cls is task), own)
        parts["task"] = {"kind": kind} | parts["task"]
        try:
            return json.loads(json.dumps(parts, allow_nan=False))  # tuples become lists, as in a file
        except (TypeError, ValueError) as error:
            raise type(error)(f"task: the fields of {own} must be plain data: {error}") from error

    def config_hash(self):
        """Twelve hex digits that change with anything in :meth:`config`."""
        text = json.dumps(self.config(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def changes(self):
        """Settings that differ from the preset of this name, as ``--set`` takes them."""
        if self.name not in PRESETS:
            return []
        old, new = PRESETS[self.name].config(), self.config()
        return [
            f"{part}.{key}={json.dumps(value) if not isinstance(value, str) else value}"
            for part, values in new.items()
            for key, value in values.items()
            if value != old[part].get(key)
        ]

    def replace(self, settings=None, **fields):
        """Return a copy with settings changed, as in ``replace({"train.steps": "300"})`` or ``replace(clip=2)``.

        Parameters
        ----------
        settings : dict of str to (str or value), optional
            By part and field.  Strings are read as the field's type.
        **fields
            By field alone, where only one of task, model and train has it.

        Raises
        ------
        ValueError
            On an unknown or ambiguous key or a value of the wrong type; the message names it.
        """
        parts = {name: getattr(self, name) for name in ("task", "model", "train")}
        hints = {name: typing.get_type_hints(type(part)) for name, part in parts.items()}
        settings = dict(settings or {})
        for name, value in fields.items():
            found = [part for part in parts if name in hints[part]]
            if len(found) != 1:
                keys = [f"{part}.{key}" for part in parts for key in hints[part] if not found or key == name]
                what = "ambiguous; write one of" if found else "unknown; there are"
                raise ValueError(f'{name}: {what} {", ".join(keys)}, as in replace({{"{keys[0]}": ...}})')
            settings[f"{found[0]}.{name}"] = value
        changed = {}
        for key, value in settings.items():
            part, _, name = key.partition(".")
            if part not in parts:
                raise ValueError(f"{key}: settings begin with task., model. or train.")
            if name not in hints[part]:
                raise ValueError(f"{key}: unknown; {part} has {', '.join(hints[part])}")
            changed.setdefault(part, {})[name] = _read(key, value, hints[part][name])
        new = {part: dataclasses.replace(parts[part], **values) for part, values in changed.items()}
        return dataclasses.replace(self, **new)


def _read(key, value, hint):
    """Read a setting's text as its field's type."""
    allowed = typing.get_args(hint) or (hint,)
    if isinstance(value, str) and hint is not str:
        text = {"True": "true", "False": "false", "None": "null"}.get(value, value)
        try:
            value = json.loads(text.translate(str.maketrans("()", "[]")))
        except ValueError:
            if str not in allowed:
                kind = getattr(hint, "__name__", hint)
                raise ValueError(f"{key}: cannot read {value!r} as {kind}") from None
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, list):
        value = tuple(value)
    if float in allowed and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    plain = tuple(typing.get_origin(t) or t for t in allowed)
    if isinstance(value, bool) and bool not in plain or not isinstance(value, plain):
        raise ValueError(f"{key}: wants {getattr(hint, '__name__', hint)}; got {value!r}")
    return value


def get(name):
    """Look up a preset.

    Parameters
    ----------
    name : str
        ``<task>-quick`` (CPU, minutes), ``<task>-small`` (one GPU, minutes) or ``<task>-paper``; see
        ``sleeplib list``.  An Experiment comes back as it is.

    Returns
    -------
    Experiment

    Raises
    ------
    ValueError
        If there is no such preset.

    Notes
    -----
    Chapter: 11_rule110
    """
    if isinstance(name, Experiment):
        return name
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"preset {name!r} is unknown; there are {', '.join(PRESETS)}")
    return PRESETS[name]


def check_task(task, count=8):
    """Raise unless `task` can be trained on: draw small batches, look at them, and score them.

    Parameters
    ----------
    task : object
        With ``vocab_size``, ``window``, ``length``, ``batch(count, rng, split)``, ``score(logits, batch)`` and
        ``chance()``, as :class:`Rule110` has them.
    count : int
        Sequences to draw of each split.

    Raises
    ------
    TypeError, ValueError
        In words: what is missing, or does not fit.

    Notes
    -----
    Chapter: 11_rule110
    """

    def demand(right, what, error=ValueError):
        if not right:
            raise error(f"task: {what}")

    for name in ("vocab_size", "window", "length", "batch", "score", "chance"):
        demand(hasattr(task, name), f"{type(task).__name__} has no {name}", TypeError)
    vocab, window, length = (check_int(f"task.{n}", getattr(task, n), 1) for n in ("vocab_size", "window", "length"))
    chance = task.chance()
    for split in SPLITS:
        batch, again = (task.batch(count, np.random.default_rng(0), split=split) for _ in range(2))
        for name in ("inputs", "labels"):
            x = getattr(batch, name, None)
            found = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
            demand(
                isinstance(x, torch.Tensor) and x.dtype == torch.int64 and x.shape == (count, length),
                f"{name} must be an int64 tensor of shape (count, length) = {(count, length)}; got {found}",
            )
            demand(torch.equal(x, getattr(again, name)), f"{name} must follow from rng alone; two draws differ")
        inputs, labels = batch.inputs, batch.labels
        asked = labels != IGNORE
        inside = (inputs >= 0).all() and (inputs < vocab).all()
        demand(inside, f"inputs must lie in 0 .. {vocab - 1}; got {int(inputs.min())} .. {int(inputs.max())}")
        inside = (labels[asked] >= 0).all() and (labels < vocab).all()
        demand(inside, f"labels must be {IGNORE} or lie in 0 .. {vocab - 1}")
        demand(asked.any(), f"labels are {IGNORE} everywhere: nothing is asked")
        given = (inputs[asked] == labels[asked]).all()
        demand(not given, "labels repeat the token read at their place; they must say what follows it")
        groups = getattr(batch, "groups", None)
        demand(groups is None or groups.shape == labels.shape, "groups must have the shape of labels, or be None")
        try:
            awake_chunks(labels, window)
        except ValueError as error:
            raise ValueError(f"task: {error}") from None
        scores = task.score(torch.zeros(int(asked.sum()), vocab), batch)
        for name, found in (("score", scores), ("chance", chance)):
            missing = {"loss", "token", "exact"} - set(found)
            demand(not missing, f"{name} must give {', '.join(sorted(missing))}; got {', '.join(found)}")
        demand(set(scores) <= set(chance), f"chance must give what score gives: {', '.join(scores)}")
