"""Experiments as frozen values: a task, a model and a way to train; presets by name."""

import dataclasses
import hashlib
import json
import math
import numbers
import re
import types
import typing
from dataclasses import dataclass, field
from difflib import get_close_matches

import numpy as np

from .model import ModelConfig
from .tasks import TASKS, Rule110

PRESETS, PRETRAINED = {}, {}  # name -> Experiment; presets.py fills them, the second with models to download
EVICTIONS = ("hard", "keys", "sliding", "hard-then-sliding")
TRAINED = ("all", "fast-then-all")
# Settings that were added later: a configuration that leaves them alone reads and hashes as it did before.
LATER = {"truncate": None, "start": None, "trains": "all", "shard": False}


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained.

    Parameters
    ----------
    steps, batch : int
        Optimizer steps, and sequences a step.
    muon_lr, adamw_lr : float
        Learning rates of the hidden matrices, and of everything else.
    warmup, decay : int
        Steps over which Muon's rate rises from 0 at the start, and falls to 0 at the end; it is constant
        in between.
    weight_decay : float
        For both optimizers, on matrices only.
    clip : float
        Largest norm of the gradient.
    eviction : {"hard", "keys", "sliding", "hard-then-sliding"}
        What happens to the cache at a window's end.  "hard-then-sliding" is hard for the first third of the
        steps: our reading of section 6.4.
    checkpoint : bool
        Recompute windows in the backward pass, see :func:`sleep_forward`.
    truncate : int or None
        How many naps a gradient goes back through, see :func:`sleep_forward`; all of them if None.
    start : str or None
        The trained model whose weights this one starts from, as :func:`start_from` takes it; ``{seed}`` in
        it stands for the run's own seed.
    trains : {"all", "fast-then-all"}
        What is trained; "fast-then-all" trains the fast-weight layers alone for the first third of the steps.
    precision : {"float32", "bfloat16"}
        bfloat16 runs matrix products under autocast where the device is faster at them, and float32
        elsewhere; a record says which ran.  Sums and the fast weight are in float32 in both cases.
    shard : bool
        If several processes train, each keeps only a part of the weights and the optimizer state (FSDP2), for
        models that one GPU has no room for.
    graph : bool
        On CUDA, compile the blocks, and capture forward and backward as one CUDA graph.
    eval_every, save_every : int
        Steps between evaluations on held-out data, and between checkpoints.
    eval_batch : int
        Held-out sequences, the same every time; the final score uses 8 times as many.

    Raises
    ------
    TypeError, ValueError
        If a setting has the wrong type, or makes no sense; the message names it.

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
    truncate: int | None = None
    start: str | None = None
    trains: str = "all"
    shard: bool = False
    precision: str = "float32"
    graph: bool = False
    eval_every: int = 50
    eval_batch: int = 512
    save_every: int = 200

    def __post_init__(self):
        for entry in dataclasses.fields(self):
            name, value, kind = entry.name, getattr(self, entry.name), entry.type
            if kind in (int | None, str | None):
                if value is None:
                    continue
                kind = typing.get_args(kind)[0]
            wanted = {int: numbers.Integral, float: numbers.Real}.get(kind, kind)
            if not isinstance(value, wanted) or isinstance(value, bool) != (kind is bool):
                raise TypeError(f"train.{name} must be of type {kind.__name__}; got {value!r}")
            object.__setattr__(self, name, kind(value))
            low = 0 if name in ("warmup", "decay") or kind is not int else 1
            if kind is not str and not low <= value < math.inf:
                raise ValueError(f"train.{name} must be at least {low} and finite; got {value}")
            # The default warm-up may be longer than a short trial, which then ends before it does.
            if name in ("warmup", "decay") and self.steps < value != entry.default:
                raise ValueError(f"train.{name} must be at most train.steps = {self.steps}; got {value}")
        if not self.clip:
            raise ValueError("train.clip must be above 0, or nothing is learned; got 0")
        choices = dict(eviction=EVICTIONS, trains=TRAINED, precision=("float32", "bfloat16"))
        for name, known in choices.items():
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"train.{name} must be one of {', '.join(known)}; got {value!r}")

    def eviction_at(self, step):
        """What a step does to the cache: "hard", "keys" or "sliding"; at step `steps`, what a score sees."""
        return self._at(step, self.eviction)

    def trains_at(self, step):
        """What a step trains: "all" or "fast"."""
        return self._at(step, self.trains)

    def _at(self, step, setting):
        first, _, last = setting.partition("-then-")
        return last if last and 3 * step >= self.steps else first


@dataclass(frozen=True)
class Experiment:
    """One preset: everything a run depends on but N and the seed.

    Parameters
    ----------
    name : str
        Also the folder of its records: letters, digits, spaces and ``.,+=-_``.
    task : Rule110
        Any task of :mod:`sleeplib.tasks`, or a frozen dataclass of your own that passes ``check_task``.
    model : ModelConfig
        Or the settings of a rival of sleep, see :mod:`sleeplib.baselines`.
    train : TrainConfig
    passes, seeds : tuple of int
        The values of N that are compared, and the seeds of the recorded runs.
    about : str
        One line for the command line.

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
        """The experiment as plain data, as a record keeps it; an error if the task cannot be written so."""
        own = _own_name(self.task)
        if not dataclasses.is_dataclass(self.task):
            raise TypeError(f"task: a record keeps its fields, so {own} must be a dataclass")
        parts = {"task": _task_fields(self.task)}
        parts |= {name: dataclasses.asdict(getattr(self, name)) for name in ("model", "train")}
        for name, default in LATER.items():
            if parts["train"][name] == default:
                del parts["train"][name]
        if type(self.model) is not ModelConfig:  # a rival of sleeplib.baselines
            parts["model"] = {"kind": type(self.model).__name__} | parts["model"]
        try:
            return json.loads(json.dumps(parts, allow_nan=False))  # tuples become lists, as in a file
        except (TypeError, ValueError) as error:
            raise type(error)(f"task: the fields of {own} must be plain data: {error}") from error

    def config_hash(self):
        """Twelve hex digits that change with anything in :meth:`config`."""
        return hashlib.sha256(json.dumps(self.config(), sort_keys=True).encode()).hexdigest()[:12]

    def changes(self):
        """Settings that differ from the preset of this name, as ``--set`` takes them."""
        new = self.config()
        known = PRESETS | PRETRAINED
        old = known[self.name].config() if self.name in known else new
        pairs = [(part, key, (LATER | new[part]).get(key)) for part in new for key in old[part] | new[part]]
        changed = [(part, key, value) for part, key, value in pairs if value != old[part].get(key)]
        return [f"{p}.{k}={v if isinstance(v, str) else json.dumps(v)}" for p, k, v in changed]

    def replace(self, settings=None, **fields):
        """Return a copy with settings changed: ``replace({"train.steps": "9"})`` or ``replace(clip=2)``.

        `settings` go by part and field, `fields` by the field alone: that of train where it has one of this
        name (``steps`` is how long to train, not a task's t), else that of whichever part has it.  Strings
        are read as the field's type.  An unknown or ambiguous key, or a value of another type, is a
        ValueError.
        """
        parts = {name: getattr(self, name) for name in ("task", "model", "train")}
        hints = {name: typing.get_type_hints(type(part)) for name, part in parts.items()}
        settings = dict(settings or {})
        for name, value in fields.items():
            found = ["train"] if name in hints["train"] else [part for part in parts if name in hints[part]]
            if len(found) != 1:
                keys = [f"{part}.{key}" for part in parts for key in hints[part] if not found or key == name]
                what = "ambiguous; write one of" if found else "unknown; there are"
                raise ValueError(f'{name}: {what} {", ".join(keys)}, as in replace({{"{keys[0]}": ...}})')
            settings[f"{found[0]}.{name}"] = value
        changed = {}
        for key, value in settings.items():
            part, _, name = key.partition(".")
            if name not in hints.get(part, ()):
                known = f"unknown; {part} has {', '.join(hints[part])}" if part in hints else None
                raise ValueError(f"{key}: {known or 'settings begin with task., model. or train.'}")
            changed.setdefault(part, {})[name] = _read(key, value, hints[part][name])
        new = {part: dataclasses.replace(parts[part], **values) for part, values in changed.items()}
        return dataclasses.replace(self, **new)


def _own_name(task):
    return f"{type(task).__module__}.{type(task).__qualname__}"


def _task_fields(task):
    """A task as plain data: its kind and its fields; the same for a task within a task."""
    kind = next((name for name, cls in TASKS.items() if cls is type(task)), _own_name(task))
    inner = {f.name: getattr(task, f.name) for f in dataclasses.fields(task)}
    inner = {name: _task_fields(x) for name, x in inner.items() if dataclasses.is_dataclass(x)}
    return {"kind": kind} | dataclasses.asdict(task) | inner


def _read(key, value, hint):
    """Read a setting, a text or plain data as a record keeps it, as its field's type."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    allowed, kind = typing.get_args(hint) if union else (hint,), getattr(hint, "__name__", hint)
    plain = tuple(typing.get_origin(t) or t for t in allowed)
    if isinstance(value, str) and hint is not str:
        text = {"True": "true", "False": "false", "None": "null"}.get(value, value)
        try:
            found = json.loads(text if text[:1] == "{" else text.translate(str.maketrans("()", "[]")))
        except ValueError:
            if str not in allowed:
                raise ValueError(f"{key}: cannot read {value!r} as {kind}") from None
            found = value
        if str not in allowed or isinstance(found, (*plain, list, dict)):  # "123" may be a word
            value = found
    value = _made(key, value, kind, allowed) if isinstance(value, dict) else value
    value = value.item() if isinstance(value, np.generic) else value
    value = tuple(value) if isinstance(value, list) else value
    if float in allowed and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(value, bool) and bool not in plain or not isinstance(value, plain):
        raise ValueError(f"{key}: wants {kind}; got {value!r}")
    return value


def _made(key, fields, hint, kinds):
    """Make a value that is itself a dataclass, such as a task within a task, from its fields."""
    name = fields.get("kind")
    if name is not None and name not in TASKS:
        raise ValueError(f"{key}: {name} is no task of sleeplib; there are {', '.join(TASKS)}")
    kind = TASKS[name] if name else next(filter(dataclasses.is_dataclass, kinds), None)
    if kind is None:
        raise ValueError(f"{key}: wants {hint}; got {fields!r}")
    fields, hints = {k: v for k, v in fields.items() if k != "kind"}, typing.get_type_hints(kind)
    if odd := sorted(fields.keys() - hints.keys()):
        raise ValueError(f"{key}.{odd[0]}: unknown; {kind.__name__} has {', '.join(hints)}")
    try:
        return kind(**{k: _read(f"{key}.{k}", v, hints[k]) for k, v in fields.items()})
    except TypeError as error:
        raise ValueError(f"{key}: {error}") from error


def get(name):
    """Look up an Experiment by name; an Experiment comes back as it is, an unknown name is a ValueError.

    Names are ``<task>-quick`` (CPU, minutes), ``<task>-small`` (one GPU, minutes), ``<task>-paper``; see
    ``sleeplib list``.

    Chapter: 11_rule110
    """
    if isinstance(name, Experiment):
        return name
    known = PRESETS | PRETRAINED
    if not isinstance(name, str) or name not in known:
        near = get_close_matches(str(name), known, n=5)
        like = f"; {', '.join(near)} sound alike" * bool(near)
        raise ValueError(f"preset {name!r} is unknown{like}; `sleeplib list` shows all {len(known)}")
    return known[name]
