"""The presets: plain values, most of them another one with a few settings changed."""

import dataclasses

from .experiments import PRESETS, Experiment, TrainConfig
from .model import ModelConfig
from .tasks import Depo, GSMInfinite, Rule110


def _add(name, about, base=None, settings=None, **parts):
    """Enter a preset: `base` with dotted settings and whole parts changed, or all parts given."""
    parts |= dict(name=name, about=about)
    PRESETS[name] = dataclasses.replace(base.replace(settings), **parts) if base else Experiment(**parts)
    return PRESETS[name]


def _model(task, **sizes):
    small = dict(d_model=64, pattern="agag", num_heads=4, mlp_size=128)
    return ModelConfig(vocab_size=task.vocab_size, **(sizes or small))


# Rule 110

task = Rule110(width=12, strings=2, steps=6)
quick = _add(
    "rule110-quick",
    "2 rings of 12 cells, t = 6, width 64; minutes on two CPU cores; smaller than the paper's",
    task=task,
    model=_model(task),
    train=TrainConfig(steps=800, batch=128, adamw_lr=1e-3),
)
about = "rule110-quick without sleep, run on until it learns too"
_add("rule110-quick-long", about, quick, {"train.steps": 2500}, passes=(1,), seeds=(0,))
for t in (2, 4, 8, 10):
    about = f"rule110-quick at t = {t}: a small Figure 2a, with and without sleep"
    _add(f"rule110-ablation-t{t}", about, quick, {"task.steps": t}, passes=(1, 4))
about = "rule110-quick, fast weights written by the Hebbian rule"
_add("rule110-ablation-hebbian", about, quick, {"model.pattern": "ahah"}, passes=(1, 4))
about = "rule110-quick, the convolution's context carried over the boundary"
_add("rule110-ablation-context", about, quick, {"train.eviction": "keys"}, passes=(1, 4))
about = "rule110-quick with fast weights of a quarter of the size"
_add("rule110-ablation-state", about, quick, {"model.key_size": 8, "model.value_size": 16}, passes=(1, 4))
about = "rule110-quick without sleep, four times as deep: the training FLOPs of N = 4 and 6 % more"
_add("rule110-ablation-deep", about, quick, {"model.pattern": "ag" * 8}, passes=(1,))

task = Rule110(width=24, strings=4, steps=32)
paper = _add(
    "rule110-paper",
    "Figure 2b: t = 32, 5 billion tokens a run",
    task=task,
    model=_model(task, d_model=256, pattern="agag", num_heads=4),
    # 97,656 steps of 512 sequences of 100 tokens: 5 billion tokens
    train=TrainConfig(steps=97_656, batch=512, eval_every=250, save_every=1000, graph=True),
    passes=(1, 2, 3, 4),
    seeds=(0,),
)
for t in (4, 8, 10, 12, 14, 16):
    about = f"Figure 2a: t = {t}, no sleep, 40 million tokens"
    settings = {"task.steps": t, "train.steps": 782, "train.eval_every": 20, "train.save_every": 200}
    _add(f"rule110-paper-2a-t{t}", about, paper, settings, passes=(1,))
about = "the paper's model and rings at t = 12, 80 M tokens; one GPU; smaller than the paper's"
settings = {"task.steps": 12, "train.steps": 1600, "train.decay": 320}
settings |= {"train.eval_every": 50, "train.save_every": 200}
_add("rule110-small", about, paper, settings, passes=(1, 2, 4), seeds=(0, 1, 2))

# Depo

task = Depo(nodes=5, hops=4, letters=8, word=(1, 1), queries=3, windows=2, fewest=5)
_add(
    "depo-quick",
    "5 nodes, 4 hops, 2 windows, width 64; minutes on two CPU cores; smaller than the paper's",
    task=task,
    model=_model(task),
    train=TrainConfig(steps=1500, batch=128, adamw_lr=1e-3),
)
task = Depo(nodes=8, hops=4, letters=10, word=(1, 1), queries=8, windows=2, fewest=8)
ring = _add(
    "depo-ablation-ring8",
    "8 nodes, where 4 hops are 4 lookups either way; width 64; smaller than the paper's",
    task=task,
    model=_model(task),
    train=TrainConfig(steps=4000, batch=64, muon_lr=4e-3, adamw_lr=1e-3, decay=800, eval_batch=256),
)
about = "depo-ablation-ring8 without sleep, for the training FLOPs of N = 4"
_add("depo-ablation-long", about, ring, {"train.steps": 8200, "train.decay": 1640}, passes=(1,), seeds=(0,))
about = "depo-ablation-ring8 without sleep, twice as deep: the training FLOPs of N = 4"
_add("depo-ablation-deep", about, ring, {"model.pattern": "ag" * 4}, passes=(1,), seeds=(0,))
task = Depo(nodes=25, hops=8, queries=8, windows=2)
_add(
    "depo-small",
    "25 nodes, 8 hops, 4 Jet/attention layers, width 256; one GPU; smaller than the paper's",
    task=task,
    model=_model(task, d_model=256, pattern="ajaj", num_heads=4),
    train=TrainConfig(steps=6000, batch=128, eval_every=50, save_every=500, graph=True),
)
task = Depo()
_add(
    "depo-paper",
    "Figure 3: 75 nodes, 16 hops, 10 Jet/attention layers, width 512, 100,000 steps",
    task=task,
    model=_model(task, d_model=512, pattern="ajajajajaj", num_heads=8),
    train=TrainConfig(steps=100_000, batch=128, eval_every=500, save_every=1000, graph=True),
    seeds=(0,),
)

# GSM-Infinite

story = dict(theme="harbor", level="medium", places=(2, 2), kinds=(3, 3), noise=(3, 3), max_value=20)
task = GSMInfinite(ops=(1, 4), tokens=(64, 96), window=96, **story)
quick = _add(
    "gsm_infinite-quick",
    "1 to 4 operations, 96 tokens, width 64; minutes on one CPU core; smaller than the paper's",
    task=task,
    model=_model(task),
    train=TrainConfig(steps=400, batch=64, muon_lr=3e-3, adamw_lr=1e-3, decay=150),
)
about = "gsm_infinite-quick without sleep, four times as long: nearly the training FLOPs of N = 4"
_add("gsm_infinite-quick-long", about, quick, {"train.steps": 1600, "train.decay": 600}, passes=(1,), seeds=(0,))
for name, eviction, about in (
    ("windows", "hard", "hard eviction"),
    ("sliding", "sliding", "sliding eviction from the first step on"),
    ("warmup", "hard-then-sliding", "hard eviction for a third of the steps, then sliding"),
):
    about = f"gsm_infinite-quick in windows of 24 tokens, {about}"
    settings = {"task.window": 24, "train.eviction": eviction}
    _add(f"gsm_infinite-quick-{name}", about, quick, settings, passes=(1, 4), seeds=(0,))
story = dict(places=(2, 3), kinds=(2, 4), noise=(8, 8), max_value=100)
task = GSMInfinite(ops=(1, 6), tokens=(200, 320), window=160, **story)
_add(
    "gsm_infinite-small",
    "1 to 6 operations, 320 tokens, all themes, width 256; one GPU; smaller than the paper's",
    task=task,
    model=_model(task, d_model=256, pattern="agag", num_heads=4),
    train=TrainConfig(3000, 128, muon_lr=1e-3, adamw_lr=3e-4, decay=600, save_every=500, graph=True),
)
task = GSMInfinite()
# 6,000 steps of 256 sequences of 3,301 tokens: 5 billion tokens
train = TrainConfig(steps=6000, batch=256, muon_lr=1e-3, decay=1200, eval_batch=200, save_every=100)
_add(
    "gsm_infinite-paper",
    "the lengths, operations and rates of Figure 4, but from scratch: not its pretrained models",
    task=task,
    model=_model(task, d_model=256, pattern="ajaj", num_heads=4),
    train=dataclasses.replace(train, checkpoint=True, precision="bfloat16"),
    passes=(1, 2, 4),
    seeds=(0,),
)
