"""The presets: plain values, most of them made from another by changing a few settings."""

import dataclasses

from .baselines import PassesConfig, PruneConfig, UntiedConfig
from .experiments import PRESETS, PRETRAINED, Experiment, TrainConfig
from .model import ModelConfig
from .pretrained import LoRA, PretrainedConfig, TokenizedGSM
from .pretrained.published import PUBLISHED, SIX_JET
from .tasks import Depo, GSMInfinite, Recall, Rule110, Text
from .ttt import TTTConfig


def _add(name, task, train, about, *, passes=(1, 2, 4), seeds=(0, 1, 2), **model):
    """Enter a preset; if no sizes are given, its model is the small one."""
    sizes = dict(vocab_size=task.vocab_size, num_heads=4) | (model or dict(d_model=64, mlp_size=128))
    PRESETS[name] = Experiment(name, task, ModelConfig(**sizes), train, passes, seeds, about)


def _vary(base, name, settings, about, **parts):
    """Enter preset `base` under another name, with dotted settings and whole parts changed."""
    PRESETS[name] = dataclasses.replace(PRESETS[base].replace(settings), name=name, about=about, **parts)


task, train = Rule110(width=12, strings=2, steps=6), TrainConfig(steps=800, batch=128, adamw_lr=1e-3)
about = "2 rings of 12 cells, t = 6, width 64; minutes on two CPU cores; smaller than the paper's"
_add("rule110-quick", task, train, about)
about = "rule110-quick without sleep, run on until it learns too"
_vary("rule110-quick", "rule110-quick-long", {"train.steps": 2500}, about, passes=(1,), seeds=(0,))
for t in (2, 4, 8, 10):
    about = f"rule110-quick at t = {t}: a small Figure 2a, with and without sleep"
    _vary("rule110-quick", f"rule110-ablation-t{t}", {"task.steps": t}, about, passes=(1, 4))
for name, settings, about in (
    ("hebbian", {"model.pattern": "ahah"}, ", fast weights written by the Hebbian rule"),
    ("context", {"train.eviction": "keys"}, ", the convolution's context carried over the boundary"),
    ("state", {"model.key_size": 8, "model.value_size": 16}, " with fast weights of a quarter of the size"),
):
    _vary("rule110-quick", f"rule110-ablation-{name}", settings, f"rule110-quick{about}", passes=(1, 4))
about = "rule110-quick without sleep, four times as deep: the training FLOPs of N = 4 and 6 % more"
_vary("rule110-quick", "rule110-ablation-deep", {"model.pattern": "ag" * 8}, about, passes=(1,))

# 97,656 steps of 512 sequences of 100 tokens: 5 billion tokens
low = dict(precision="bfloat16", graph=True)
task, train = Rule110(24, 4, 32), TrainConfig(97_656, 512, eval_every=250, save_every=1000, **low)
about = "Figure 2b: t = 32, 5 billion tokens a run"
_add("rule110-paper", task, train, about, passes=(1, 2, 3, 4), seeds=(0,), d_model=256)
for t in (4, 8, 10, 12, 14, 16):
    about = f"Figure 2a: t = {t}, no sleep, 40 million tokens"
    settings = {"task.steps": t, "train.steps": 782, "train.eval_every": 20, "train.save_every": 200}
    _vary("rule110-paper", f"rule110-paper-2a-t{t}", settings, about, passes=(1,))
about = "the paper's model and rings at t = 12, 80 M tokens; one GPU; smaller than the paper's"
settings |= {"task.steps": 12, "train.steps": 1600, "train.decay": 320, "train.eval_every": 50}
_vary("rule110-paper", "rule110-small", settings, about, passes=(1, 2, 4), seeds=(0, 1, 2))

name, parts = "rule110-paper-2b-t8", dict(passes=(1, 2, 4), seeds=(0, 1, 2))
about = "Figure 2b's question at the first t that N = 1 does not learn in 40 M tokens: 80 million tokens"
settings = {"task.steps": 8, "train.steps": 1600, "train.eval_every": 20, "train.save_every": 200}
_vary("rule110-paper", name, settings, about, **parts)
about = f"{name} without sleep, run on for the training FLOPs of N = 4"
_vary(name, f"{name}-long", {"train.steps": 7102}, about, passes=(1,), seeds=(0,))
for rate in ("4e-3", "8e-3"):
    about = f"{name} with Muon's rate {rate}: one point of the sweep at the paper's size"
    _vary(name, f"{name}-rate-{rate}", {"train.muon_lr": rate}, about, passes=(1, 4))

task = Depo(nodes=5, hops=4, letters=8, word=(1, 1), queries=3, windows=2, fewest=5)
about = "5 nodes, 4 hops, 2 windows, width 64; minutes on two CPU cores; smaller than the paper's"
_add("depo-quick", task, TrainConfig(steps=1500, batch=128, adamw_lr=1e-3), about)
task = Depo(nodes=8, hops=4, letters=10, word=(1, 1), queries=8, windows=2, fewest=8)
train = TrainConfig(steps=4000, batch=64, muon_lr=4e-3, adamw_lr=1e-3, decay=800, eval_batch=256)
about = "8 nodes, where 4 hops are 4 lookups either way; width 64; smaller than the paper's"
_add("depo-ablation-ring8", task, train, about)
for name, settings, about in (
    ("long", {"train.steps": 8200, "train.decay": 1640}, "for the training FLOPs of N = 4"),
    ("deep", {"model.pattern": "ag" * 4}, "twice as deep: the training FLOPs of N = 4"),
):
    about = f"depo-ablation-ring8 without sleep, {about}"
    _vary("depo-ablation-ring8", f"depo-ablation-{name}", settings, about, passes=(1,), seeds=(0,))
task = Depo(nodes=16, hops=8, letters=20, word=(1, 1), queries=8, windows=4, fewest=16)
for rate in ("2e-3", "4e-3", "8e-3"):
    train = TrainConfig(steps=5000, batch=64, muon_lr=float(rate), adamw_lr=1e-3, eval_batch=256)
    about = f"16 nodes, 8 hops, 4 windows, width 64: Muon's rate {rate}, one point of the sweep"
    _add(f"depo-ring16-rate-{rate}", task, train, about, seeds=(10,))
about = "25 nodes, 8 hops, 4 Jet/attention layers, width 256; one GPU; smaller than the paper's"
train = TrainConfig(steps=6000, batch=128, save_every=500, **low)
_add("depo-small", Depo(nodes=25, hops=8, queries=8, windows=2), train, about, d_model=256, pattern="ajaj")
about = "Figure 3: 75 nodes, 16 hops, 10 Jet/attention layers, width 512, 100,000 steps"
train = TrainConfig(steps=100_000, batch=128, eval_every=500, save_every=1000, **low)
_add("depo-paper", Depo(), train, about, seeds=(0,), d_model=512, pattern="aj" * 5, num_heads=8)

story = dict(theme="harbor", level="medium", places=(2, 2), kinds=(3, 3), noise=(3, 3), max_value=20)
task = GSMInfinite(ops=(1, 4), tokens=(64, 96), window=96, **story)
train = TrainConfig(steps=400, batch=64, muon_lr=3e-3, adamw_lr=1e-3, decay=150)
about = "1 to 4 operations, 96 tokens, width 64; minutes on one CPU core; smaller than the paper's"
_add("gsm_infinite-quick", task, train, about)
about = "gsm_infinite-quick without sleep, four times as long: nearly the training FLOPs of N = 4"
settings = {"train.steps": 1600, "train.decay": 600}
_vary("gsm_infinite-quick", "gsm_infinite-quick-long", settings, about, passes=(1,), seeds=(0,))
for name, eviction, about in (
    ("windows", "hard", "hard eviction"),
    ("sliding", "sliding", "sliding eviction from the first step on"),
    ("warmup", "hard-then-sliding", "hard eviction for a third of the steps, then sliding"),
):
    about = f"gsm_infinite-quick in windows of 24 tokens, {about}"
    settings, parts = {"task.window": 24, "train.eviction": eviction}, dict(passes=(1, 4), seeds=(0,))
    _vary("gsm_infinite-quick", f"gsm_infinite-quick-{name}", settings, about, **parts)
story = dict(places=(2, 3), kinds=(2, 4), noise=(8, 8), max_value=100)
task = GSMInfinite(ops=(1, 6), tokens=(200, 320), window=160, **story)
train = TrainConfig(3000, 128, muon_lr=1e-3, adamw_lr=3e-4, decay=600, save_every=500, **low)
about = "1 to 6 operations, 320 tokens, all themes, width 256; one GPU; smaller than the paper's"
_add("gsm_infinite-small", task, train, about, d_model=256)
# 6,000 steps of 256 sequences of 3,301 tokens: 5 billion tokens
train = TrainConfig(steps=6000, batch=256, muon_lr=1e-3, decay=1200, eval_batch=200, save_every=100)
train = dataclasses.replace(train, checkpoint=True, precision="bfloat16")
about = "the lengths, operations and rates of Figure 4, but from scratch: not its pretrained models"
_add("gsm_infinite-paper", GSMInfinite(), train, about, seeds=(0,), d_model=256, pattern="ajaj")

about = "pairs to remember over 8 naps, width 64; minutes on one CPU core; not a task of the paper"
train = TrainConfig(steps=1500, batch=64, muon_lr=4e-3, adamw_lr=3e-3)
_add("recall-quick", Recall(), train, about, passes=(1, 4))
for name, settings, about in (
    ("hebbian", {"model.pattern": "ahah"}, ", fast weights written by the Hebbian rule"),
    ("state", {"model.key_size": 8, "model.value_size": 16}, " with fast weights of a quarter of the size"),
):
    _vary("recall-quick", f"recall-ablation-{name}", settings, f"recall-quick{about}", passes=(1,))
model = PruneConfig(pattern="aaaa", keep=8, vocab_size=Recall().vocab_size, mlp_size=128)
about = "recall-quick, the newest 8 tokens kept word for word: the bytes of its fast weights"
_vary("recall-quick", "recall-ablation-recent8", {}, about, model=model, passes=(1,))

# Truncated backpropagation through sleep (chapter 10): the same settings, but a gradient that enters one nap.
for base, name, parts in (
    ("recall-quick", "recall", dict(passes=(1,))),
    ("rule110-quick", "rule110", dict(passes=(4,))),
):
    about = f"{base}, backpropagation truncated to the last nap"
    _vary(base, f"{name}-truncate-1", {"train.truncate": 1}, about, **parts)

# The sweep of Muon's rate.  For rule110 and depo its point at 2e-3 is the -quick preset itself.  Where a
# comparison is made too, on seeds from 3 on, there are more passes and seeds, and at 8e-3 also a run for
# equal operations.
rates = ("1e-3", "2e-3", "4e-3", "8e-3", "1.6e-2")
compared = {"rule110-rate-8e-3": (0, *range(3, 9))}
compared |= dict.fromkeys(("depo-rate-4e-3", "depo-rate-8e-3", "gsm_infinite-rate-8e-3"), tuple(range(6)))
equal = {"rule110": (3387, 0), "depo": (3497, 0), "gsm_infinite": (1791, 672)}  # steps, decay
for base in equal:
    for rate in rates:
        name, about = f"{base}-rate-{rate}", f"{base}-quick with Muon's rate {rate}: one point of the sweep"
        if PRESETS[f"{base}-quick"].train.muon_lr == float(rate):
            continue
        parts = dict(passes=(1, 4), seeds=(0,))
        if name in compared:
            parts, about = dict(passes=(1, 2, 4), seeds=compared[name]), f"{about}, and a comparison"
        _vary(f"{base}-quick", name, {"train.muon_lr": rate}, about, **parts)
    settings = dict(zip(("train.steps", "train.decay"), equal[base]))
    about = f"{base}-rate-8e-3 without sleep, run on for the training FLOPs of N = 4"
    name, parts = f"{base}-rate-8e-3-long", dict(passes=(1,), seeds=(3, 4, 5))
    _vary(f"{base}-rate-8e-3", name, settings, about, **parts)
about = "gsm_infinite-rate-8e-3, the question after the context"
settings, parts = {"task.question_first": False}, dict(passes=(1, 4), seeds=(3, 4, 5))
_vary("gsm_infinite-rate-8e-3", "gsm_infinite-ablation-last", settings, about, **parts)
about = "rule110-rate-8e-3 in bfloat16, where the processor has it: does it train alike?"
settings, parts = {"train.precision": "bfloat16"}, dict(passes=(1, 4), seeds=(3, 4, 5))
_vary("rule110-rate-8e-3", "rule110-rate-8e-3-bfloat16", settings, about, **parts)

# The rivals of sleep (chapter 15), each with the settings that differ and the N that it is run with.  Muon's
# rate is swept on seed 0; the comparison is made on seeds from 3 on, at the best rate of each.
keys, looped = dict(pattern="aaaa"), (4,)
rivals = {
    "recent2": (PruneConfig, keys | dict(keep=2), (1,), "the newest 2 tokens kept word for word"),
    "recent4": (PruneConfig, keys | dict(keep=4), (1,), "the newest 4 tokens kept word for word"),
    "recent8": (PruneConfig, keys | dict(keep=8), (1,), "the newest 8 tokens kept word for word"),
    "recent16": (PruneConfig, keys | dict(keep=16), (1,), "the newest 16 tokens kept word for word"),
    "sinks8": (PruneConfig, keys | dict(keep=8, sinks=4), (1,), "4 sinks and the newest 4 tokens kept"),
    "heavy8": (PruneConfig, keys | dict(keep=8, how="heavy"), (1,), "the newest 4 and 4 heavy hitters kept"),
    "full": (PruneConfig, keys, (1,), "full attention over everything: the ceiling"),
    "hybrid8": (PruneConfig, dict(keep=8), (1, 4), "fast weights and the newest 8 tokens"),
    "ttt": (TTTConfig, keys, (1, 8), "an MLP that learns each window in N gradient steps"),
    "ttt-small": (TTTConfig, keys | dict(fast_size=21), (8,), "such an MLP of as many bytes as S"),
    "rewrite": (PassesConfig, dict(how="rewrite"), looped, "one pass, each block writes N times"),
    "replay": (PassesConfig, dict(how="replay"), looped, "N passes, h not fed back"),
    "frozen": (PassesConfig, dict(how="frozen"), looped, "N passes, S kept from the last alone"),
    "awake": (PassesConfig, dict(how="awake"), looped, "N passes over the question, none asleep"),
    "awake-cache": (PassesConfig, keys | dict(how="awake-cache"), looped, "N passes awake, whole cache kept"),
    "untied": (UntiedConfig, {}, looped, "passes with weights of their own"),
    "deep": (ModelConfig, dict(pattern="ag" * 8), (1,), "no sleep, four times as deep"),
    "wide": (
        ModelConfig,
        dict(d_model=152, mlp_size=304, key_size=16, value_size=32),
        (1,),
        "no sleep, wide",
    ),
    "state": (ModelConfig, dict(key_size=8, value_size=16), (1, 4), "fast weights of a quarter of the size"),
}
both = ("recent8", "heavy8", "full", "ttt", "rewrite", "replay", "frozen", "awake-cache")
against = {"rule110": ("rule110-quick", tuple(rivals)), "depo": ("depo-ablation-ring8", ("sleep", *both))}
rivals["sleep"] = (ModelConfig, {}, (1, 4), "unchanged")
known = {"rule110-deep-2e-3": "rule110-ablation-deep", "rule110-state-2e-3": "rule110-ablation-state"}
known["depo-sleep-4e-3"] = "depo-ablation-ring8"  # points of a sweep that exist already
chosen = {  # "<task>-<arm>": the rates for the comparison, the best on seed 0, entered once a sweep is done
    "rule110-recent8": "8e-3",
    "rule110-heavy8": "4e-3",
    "rule110-full": "8e-3",
    "rule110-ttt": "8e-3",
    "rule110-rewrite": "4e-3",
    "rule110-replay": "8e-3",
    "rule110-frozen": "4e-3",
    "rule110-awake": "8e-3",
    "rule110-awake-cache": "8e-3",
    "rule110-recent16": "8e-3",
    "rule110-deep": "8e-3",
    "rule110-untied": "2e-3",
    "rule110-wide": "4e-3",
    "rule110-state": "4e-3 8e-3",  # the best of N = 4 and the best of N = 1
    "rule110-hybrid8": "4e-3 8e-3",
    "depo-sleep": "4e-3 8e-3",
    "depo-recent8": "2e-3",
    "depo-replay": "4e-3",
    "depo-rewrite": "4e-3",
    "depo-frozen": "8e-3",
    "depo-heavy8": "2e-3",
    "depo-full": "2e-3",
    "depo-awake-cache": "4e-3",
}
# Where the best rate was the highest or the lowest tried, one beyond it was tried too, with these N.
further = dict(recent8=(1,), recent16=(1,), full=(1,), hybrid8=(1,), ttt=(1, 8), deep=(1,), state=(1,))
further |= dict.fromkeys(("replay", "awake", "awake-cache"), looped)
further = {f"rule110-{arm}": {"1.6e-2": passes} for arm, passes in further.items()}
further["depo-frozen"] = {"1.6e-2": looped}
further |= {f"depo-{arm}": {"1e-3": (1,)} for arm in ("recent8", "heavy8", "full")}
further["depo-ttt"] = {"1e-3": (8,)}
SWEEPS = {}  # "<task>-<arm>": {rate: preset}
for task, (base, arms) in against.items():
    plain = PRESETS[base].model
    plain = {name: getattr(plain, name) for name in ("vocab_size", "d_model", "num_heads", "mlp_size")}
    for arm in arms:
        kind, settings, passes, about = rivals[arm]
        sweep = SWEEPS[f"{task}-{arm}"] = {}
        tried = dict.fromkeys(("2e-3", "4e-3", "8e-3"), passes) | further.get(f"{task}-{arm}", {})
        for rate, passes in tried.items():
            name = known.get(f"{task}-{arm}-{rate}", f"{task}-rival-{arm}-{rate}")
            sweep[rate] = name
            seeds = (0, 3, 4, 5) if rate in chosen.get(f"{task}-{arm}", "").split() else (0,)
            if name in PRESETS:
                PRESETS[name] = dataclasses.replace(PRESETS[name], seeds=(0, 1, 2, *seeds[1:]))
                continue
            parts = dict(model=kind(**plain | settings), passes=passes, seeds=seeds)
            _vary(base, name, {"train.muon_lr": rate}, f"{base}, {about}; Muon's rate {rate}", **parts)

# Sleep for a pretrained model (chapter 16): small models learn to read, then to sleep.  All that are compared
# read equally many tokens in all: 300 steps of text and 150 of sleep, or 450 of sleep.
story = dict(places=(2, 2), kinds=(3, 3), noise=(3, 3), max_value=20)
story |= dict(theme="harbor", level="medium", mode="forward")
task = GSMInfinite(ops=(1, 3), tokens=(40, 56), window=56, **story)
train = TrainConfig(300, 32, muon_lr=8e-3, adamw_lr=1e-3, decay=100, eval_every=25, eval_batch=256)
small = dict(d_model=64, mlp_size=128)
about = "pretraining: the next token of short stories, everything in the cache; minutes on one CPU core"
_add("gsm_infinite-text", Text(task), train, about, passes=(1,), seeds=(0, 1, 2, 3), **small)
about = "the same for a transformer of two blocks"
parts = dict(passes=(1,), seeds=(0, 1, 2, 3), pattern="aa")
_add("gsm_infinite-text-attention", Text(task), train, about, **parts, **small)
read, last = "gsm_infinite-text/N1-seed{seed}", dict(steps=150, decay=50)
inserted = dict(start="gsm_infinite-text-attention/N1-seed{seed}")
taught = {
    "scratch": (dict(steps=450, decay=150), "from scratch"),
    "all": (last | dict(start=read), "the pretrained hybrid, everything at once"),
    "warmup": (last | dict(start=read, trains="fast-then-all"), "the pretrained hybrid, fast weights first"),
    "insert-all": (last | inserted, "fast-weight blocks inserted into the transformer, everything at once"),
    "insert-warmup": (last | inserted | dict(trains="fast-then-all"), "the same, fast-weight blocks first"),
}
best = {  # arm: the rates for the comparison, the best on seed 0 for N = 1 and for N = 4
    "scratch": "1.6e-2 4e-3",
    "all": "8e-3 4e-3",
    "warmup": "1.6e-2 4e-3",
    "insert-all": "8e-3 1.6e-2",
    "insert-warmup": "1.6e-2",
}
still = dict.fromkeys(("scratch", "warmup"), {"3.2e-2": (1,)})  # N = 1 was best at the highest rate
for arm, (settings, about) in taught.items():
    tried = dict.fromkeys(("2e-3", "4e-3", "8e-3", "1.6e-2"), (1, 4)) | still.get(arm, {})
    for rate, passes in tried.items():
        name = f"gsm_infinite-taught-{arm}-{rate}"
        changed = dataclasses.replace(train, muon_lr=float(rate), **settings)
        parts = dict(passes=passes, seeds=(0, 1, 2, 3) if rate in best[arm].split() else (0,))
        _add(name, task, changed, f"learning to sleep: {about}; Muon's rate {rate}", **parts, **small)
name, parts = "gsm_infinite-taught-scratch-1.6e-2", dict(passes=(1,), seeds=(1, 2, 3))
about = f"{name} without sleep, run on for the training FLOPs of N = 4"
_vary(name, f"{name}-long", {"train.steps": 2007, "train.decay": 669}, about, **parts)

# The paper's third experiment, on the paper's models.  The paper does not say how long they are trained.
ouro, jet, qwen = "ByteDance/Ouro-1.4B", "jet-ai/Jet-Nemotron-2B", "Qwen/Qwen3.5-0.8B"
low = dict(precision="bfloat16", checkpoint=True, save_every=50)
full = TrainConfig(2000, 256, muon_lr=1e-3, decay=400, eval_every=100, eval_batch=200, **low)
some = TrainConfig(200, 8, muon_lr=1e-3, adamw_lr=2e-4, decay=50, eval_batch=64, checkpoint=True)
later = dataclasses.replace(full, eviction="hard-then-sliding", trains="fast-then-all")
story = dict(ops=(1, 4), places=(2, 2), kinds=(3, 3), noise=(3, 3), max_value=20)
story |= dict(tokens=(300, 512), window=256)
added, low_rank = dict(insert=SIX_JET), dict(lora=LoRA())
pretrained = {  # name: source, training, settings of the task and of the model, N, about
    "gsm-jet-paper": (jet, full, {}, {}, (1, 2, 4, 6), "Figure 4a: Jet-Nemotron 2B, middle 14 layers looped"),
    "gsm-ouro-paper": (ouro, full, {}, added, (1, 2, 4), "Figure 4b: Ouro 1.4B, six Jet layers added"),
    "gsm-ouro-sliding-paper": (ouro, later, dict(window=512), added, (1, 2, 4), "Figure 5: sliding eviction"),
    "gsm-qwen-small": (qwen, some, story, low_rank, (1, 4), "a small hybrid, short stories; one small GPU"),
}
for name, (source, train, task, model, passes, about) in pretrained.items():
    size = dict(source=source, vocab_size=PUBLISHED[source]["vocab_size"])
    parts = TokenizedGSM(**size | task), PretrainedConfig(**size | model), train
    PRETRAINED[name] = Experiment(name, *parts, passes, (0,), about)
