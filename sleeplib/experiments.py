"""Experiments as frozen values: a task, a model, a way to train; and the presets by name."""

import dataclasses
import hashlib
import json
import typing
from dataclasses import dataclass, field

from .model import ModelConfig
from .tasks import TASKS, Depo, GSMInfinite, Rule110


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
            name, value = entry.name, getattr(self, entry.name)
            wanted = (int, float) if entry.type is float else entry.type
            if not isinstance(value, wanted) or isinstance(value, bool) != (wanted is bool):
                raise TypeError(f"train.{name} must be of type {entry.type.__name__}; got {value!r}")
            low = 1 if name in ("steps", "batch", "eval_every", "eval_batch", "save_every") else 0
            if wanted is not str and not value >= low:
                raise ValueError(f"train.{name} must be at least {low}; got {value}")
        known = ("hard", "keys", "sliding", "hard-then-sliding")
        if self.eviction not in known:
            raise ValueError(f"train.eviction must be one of {', '.join(known)}; got {self.eviction!r}")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"train.precision must be 'float32' or 'bfloat16'; got {self.precision!r}")

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
    task : Rule110
        Any task of :mod:`sleeplib.tasks`.
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

    def config(self):
        """The experiment as plain data, as a run record keeps it."""
        kind = next(name for name, cls in TASKS.items() if isinstance(self.task, cls))
        parts = {name: dataclasses.asdict(getattr(self, name)) for name in ("task", "model", "train")}
        parts["task"] = {"kind": kind} | parts["task"]
        return json.loads(json.dumps(parts))  # tuples become lists, as in a file

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
            if value != old[part][key]
        ]

    def replace(self, settings):
        """Return a copy with dotted settings changed, such as ``{"train.steps": "300"}``.

        Parameters
        ----------
        settings : dict of str to (str or value)
            Strings are read as the field's type.

        Raises
        ------
        ValueError
            On an unknown key or a value of the wrong type; the message names it.
        """
        experiment = self
        for key, value in settings.items():
            part, _, name = key.partition(".")
            if part not in ("task", "model", "train"):
                raise ValueError(f"{key}: settings begin with task., model. or train.")
            old = getattr(experiment, part)
            hints = typing.get_type_hints(type(old))
            if name not in hints:
                raise ValueError(f"{key}: unknown; {part} has {', '.join(hints)}")
            new = dataclasses.replace(old, **{name: _read(key, value, hints[name])})
            experiment = dataclasses.replace(experiment, **{part: new})
        return experiment


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
    if isinstance(value, list):
        value = tuple(value)
    if float in allowed and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    plain = tuple(typing.get_origin(t) or t for t in allowed)
    if isinstance(value, bool) and bool not in plain or not isinstance(value, plain):
        raise ValueError(f"{key}: wants {getattr(hint, '__name__', hint)}; got {value!r}")
    return value


def _rule110_presets():
    quick = Experiment(
        name="rule110-quick",
        task=Rule110(width=12, strings=2, steps=6),
        model=ModelConfig(vocab_size=4, d_model=64, pattern="agag", num_heads=4, mlp_size=128),
        train=TrainConfig(steps=800, batch=128, adamw_lr=1e-3),
        about="2 rings of 12 cells, t = 6, width 64; minutes on two CPU cores; smaller than the paper's",
    )
    yield quick
    yield dataclasses.replace(
        quick,
        name="rule110-quick-long",
        train=dataclasses.replace(quick.train, steps=2500),
        passes=(1,),
        seeds=(0,),
        about="rule110-quick without sleep, run on until it learns too",
    )
    for t in (2, 4, 8, 10):
        yield dataclasses.replace(
            quick,
            name=f"rule110-ablation-t{t}",
            task=dataclasses.replace(quick.task, steps=t),
            passes=(1, 4),
            about=f"rule110-quick at t = {t}: a small Figure 2a, with and without sleep",
        )
    yield dataclasses.replace(
        quick,
        name="rule110-ablation-hebbian",
        model=dataclasses.replace(quick.model, pattern="ahah"),
        passes=(1, 4),
        about="rule110-quick, fast weights written by the Hebbian rule",
    )
    yield dataclasses.replace(
        quick,
        name="rule110-ablation-context",
        train=dataclasses.replace(quick.train, eviction="keys"),
        passes=(1, 4),
        about="rule110-quick, the convolution's context carried over the boundary",
    )
    yield dataclasses.replace(
        quick,
        name="rule110-ablation-state",
        model=dataclasses.replace(quick.model, key_size=8, value_size=16),
        passes=(1, 4),
        about="rule110-quick with fast weights of a quarter of the size",
    )
    yield dataclasses.replace(
        quick,
        name="rule110-ablation-deep",
        model=dataclasses.replace(quick.model, pattern="ag" * 8),
        passes=(1,),
        about="rule110-quick without sleep, four times as deep: the training FLOPs of N = 4 and 6 % more",
    )
    paper = Experiment(
        name="rule110-paper",
        task=Rule110(width=24, strings=4, steps=32),
        model=ModelConfig(vocab_size=4, d_model=256, pattern="agag", num_heads=4),
        # 97,656 steps of 512 sequences of 100 tokens: 5 billion tokens
        train=TrainConfig(steps=97_656, batch=512, eval_every=250, save_every=1000, graph=True),
        passes=(1, 2, 3, 4),
        seeds=(0,),
        about="Figure 2b: t = 32, 5 billion tokens a run",
    )
    yield paper
    for t in (4, 8, 10, 12, 14, 16):
        yield dataclasses.replace(
            paper,
            name=f"rule110-paper-2a-t{t}",
            task=dataclasses.replace(paper.task, steps=t),
            train=dataclasses.replace(paper.train, steps=782, eval_every=20, save_every=200),
            passes=(1,),
            about=f"Figure 2a: t = {t}, no sleep, 40 million tokens",
        )
    yield dataclasses.replace(
        paper,
        name="rule110-small",
        task=dataclasses.replace(paper.task, steps=12),
        train=dataclasses.replace(paper.train, steps=1600, decay=320, eval_every=50, save_every=200),
        passes=(1, 2, 4),
        seeds=(0, 1, 2),
        about="the paper's model and rings at t = 12, 80 M tokens; one GPU; smaller than the paper's",
    )


def _depo_presets():
    task = Depo(nodes=5, hops=4, letters=8, word=(1, 1), queries=3, windows=2, fewest=5)
    yield Experiment(
        name="depo-quick",
        task=task,
        model=ModelConfig(vocab_size=task.vocab_size, d_model=64, pattern="agag", num_heads=4, mlp_size=128),
        train=TrainConfig(steps=1500, batch=128, adamw_lr=1e-3),
        about="5 nodes, 4 hops, 2 windows, width 64; minutes on two CPU cores; smaller than the paper's",
    )
    task = Depo(nodes=8, hops=4, letters=10, word=(1, 1), queries=8, windows=2, fewest=8)
    ring = Experiment(
        name="depo-ablation-ring8",
        task=task,
        model=ModelConfig(vocab_size=task.vocab_size, d_model=64, pattern="agag", num_heads=4, mlp_size=128),
        train=TrainConfig(steps=4000, batch=64, muon_lr=4e-3, adamw_lr=1e-3, decay=800, eval_batch=256),
        about="8 nodes, where 4 hops are 4 lookups either way; width 64; smaller than the paper's",
    )
    yield ring
    yield dataclasses.replace(
        ring,
        name="depo-ablation-long",
        train=dataclasses.replace(ring.train, steps=8200, decay=1640),
        passes=(1,),
        seeds=(0,),
        about="depo-ablation-ring8 without sleep, for the training FLOPs of N = 4",
    )
    yield dataclasses.replace(
        ring,
        name="depo-ablation-deep",
        model=dataclasses.replace(ring.model, pattern="ag" * 4),
        passes=(1,),
        seeds=(0,),
        about="depo-ablation-ring8 without sleep, twice as deep: the training FLOPs of N = 4",
    )
    task = Depo(nodes=25, hops=8, queries=8, windows=2)
    yield Experiment(
        name="depo-small",
        task=task,
        model=ModelConfig(vocab_size=task.vocab_size, d_model=256, pattern="ajaj", num_heads=4),
        train=TrainConfig(steps=6000, batch=128, eval_every=50, save_every=500, graph=True),
        about="25 nodes, 8 hops, 4 Jet/attention layers, width 256; one GPU; smaller than the paper's",
    )
    task = Depo()
    yield Experiment(
        name="depo-paper",
        task=task,
        model=ModelConfig(vocab_size=task.vocab_size, d_model=512, pattern="ajajajajaj", num_heads=8),
        train=TrainConfig(steps=100_000, batch=128, eval_every=500, save_every=1000, graph=True),
        seeds=(0,),
        about="Figure 3: 75 nodes, 16 hops, 10 Jet/attention layers, width 512, 100,000 steps",
    )


def _gsm_infinite_presets():
    task = GSMInfinite(
        ops=(1, 4),
        tokens=(64, 96),
        theme="harbor",
        level="medium",
        window=96,
        places=(2, 2),
        kinds=(3, 3),
        noise=(3, 3),
        max_value=20,
    )
    quick = Experiment(
        name="gsm_infinite-quick",
        task=task,
        model=ModelConfig(vocab_size=task.vocab_size, d_model=64, pattern="agag", num_heads=4, mlp_size=128),
        train=TrainConfig(steps=400, batch=64, muon_lr=3e-3, adamw_lr=1e-3, decay=150),
        about="1 to 4 operations, 96 tokens, width 64; minutes on one CPU core; smaller than the paper's",
    )
    yield quick
    yield dataclasses.replace(
        quick,
        name="gsm_infinite-quick-long",
        train=dataclasses.replace(quick.train, steps=1600, decay=600),
        passes=(1,),
        seeds=(0,),
        about="gsm_infinite-quick without sleep, four times as long: nearly the training FLOPs of N = 4",
    )
    for name, eviction, about in (
        ("windows", "hard", "hard eviction"),
        ("sliding", "sliding", "sliding eviction from the first step on"),
        ("warmup", "hard-then-sliding", "hard eviction for a third of the steps, then sliding"),
    ):
        yield dataclasses.replace(
            quick,
            name=f"gsm_infinite-quick-{name}",
            task=dataclasses.replace(task, window=24),
            train=dataclasses.replace(quick.train, eviction=eviction),
            passes=(1, 4),
            seeds=(0,),
            about=f"gsm_infinite-quick in windows of 24 tokens, {about}",
        )
    task = GSMInfinite(
        ops=(1, 6), tokens=(200, 320), window=160, places=(2, 3), kinds=(2, 4), noise=(8, 8), max_value=100
    )
    yield Experiment(
        name="gsm_infinite-small",
        task=task,
        model=ModelConfig(vocab_size=task.vocab_size, d_model=256, pattern="agag", num_heads=4),
        train=TrainConfig(
            steps=3000, batch=128, muon_lr=1e-3, adamw_lr=3e-4, decay=600, save_every=500, graph=True
        ),
        about="1 to 6 operations, 320 tokens, all themes, width 256; one GPU; smaller than the paper's",
    )
    task = GSMInfinite()
    yield Experiment(
        name="gsm_infinite-paper",
        task=task,
        model=ModelConfig(vocab_size=task.vocab_size, d_model=256, pattern="ajaj", num_heads=4),
        # 6,000 steps of 256 sequences of 3,301 tokens: 5 billion tokens
        train=TrainConfig(
            steps=6000,
            batch=256,
            muon_lr=1e-3,
            decay=1200,
            checkpoint=True,
            precision="bfloat16",
            eval_batch=200,
            save_every=100,
        ),
        passes=(1, 2, 4),
        seeds=(0,),
        about="the lengths, operations and rates of Figure 4, but from scratch: not its pretrained models",
    )


PRESETS = {
    e.name: e for presets in (_rule110_presets, _depo_presets, _gsm_infinite_presets) for e in presets()
}


def get(name):
    """Look up a preset.

    Parameters
    ----------
    name : str
        ``<task>-quick`` (CPU, minutes), ``<task>-small`` (one GPU, minutes) or ``<task>-paper``; see
        ``sleeplib list``.

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
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is unknown; there are {', '.join(PRESETS)}")
    return PRESETS[name]
