"""What it costs to teach a pretrained model to sleep: operations and bytes, before anything is downloaded."""

from contextlib import contextmanager
from dataclasses import dataclass

import torch

from .algorithm import IGNORE
from .checks import integer
from .flops import followed_bytes
from .optimizers import make_optimizers


@dataclass(frozen=True)
class Reading:
    """How one sequence is read: tokens in each window, and which of them are slept on.

    Parameters
    ----------
    tokens : tuple of int
    asleep : tuple of bool

    Chapter: 16_pretrained
    """

    tokens: tuple
    asleep: tuple

    @classmethod
    def of(cls, task):
        """The reading of a task whose question begins after its context."""
        starts = range(0, task.length, task.window)
        tokens = tuple(min(task.window, task.length - start) for start in starts)
        return cls(tokens, tuple(start + task.window <= task.context for start in starts))


def entries(module, learning=False):
    """Count the entries of a module's matrices, or of those that learn; a token costs two operations each.

    Of the experts of a mixture only as many count as a token goes through.
    """

    def count(parameters, ndim):
        return sum(p.numel() for p in parameters if p.ndim == ndim and (p.requires_grad or not learning))

    total = count(module.parameters(), 2)
    for part in module.modules():
        if hasattr(part, "num_experts") and hasattr(part, "config"):
            whole = count(part.parameters(recurse=False), 3)
            total += whole * part.config.num_experts_per_tok // part.num_experts
    return total


def block_flops(block, tokens, cached=0):
    """Operations of a block that reads some tokens after so many cached keys: its matrices, and its memory.

    Attention: two products of a query with each key that it sees.  A fast weight: its read, its write and
    its output.  Norms are left out, and filters of convolutions that are not matrices.
    """
    total = 2 * tokens * entries(block)
    if block.fast_shape:
        H, K, V = block.fast_shape
        return total + 6 * tokens * H * K * V
    m = block.layer.self_attn
    seen = range(cached + 1, cached + tokens + 1)
    seen = sum(min(n, block.own_window or n) for n in seen)
    return total + 4 * seen * block.num_heads * m.head_dim


def forward_flops(model, reading, passes):
    """Operations of reading one sequence under hard eviction: asleep in `passes` passes, awake in one.

    Chapter: 16_pretrained
    """
    passes, total = integer("passes", passes, 1), 0
    for tokens, asleep in zip(reading.tokens, reading.asleep, strict=True):
        total += sum(block_flops(model.layers[i], tokens) for i in model.order(passes if asleep else 1))
        total += 0 if asleep else 2 * tokens * entries(model.head)
    return total


def step_flops(model, reading, passes, batch, recompute=True):
    """Operations of one training step: forward, again if windows are recomputed, and backward.

    Backward takes as many as forward for the gradients of activations, and as many again for those of the
    matrices, as far as these learn.

    Chapter: 16_pretrained
    """
    learning = entries(model.layers, learning=True) / entries(model.layers)
    return batch * forward_flops(model, reading, passes) * (2 + bool(recompute) + learning)


def weight_bytes(model, train):
    """Bytes of all parameters, and of what learning adds: gradients, and what the optimizers keep.

    Muon keeps one number for each entry of a hidden matrix, AdamW two for every other; `train` is the
    :class:`TrainConfig` that makes them.

    Chapter: 16_pretrained
    """
    muon, adamw = make_optimizers(model, train)
    slots = {id(p): n for o, n in ((muon, 1), (adamw, 2)) for g in o.param_groups for p in g["params"]}
    own = {id(p): p for p in model.parameters()}.values()
    return sum(p.numel() * p.element_size() * (1 + (1 + slots.get(id(p), 0)) * p.requires_grad) for p in own)


def carried_bytes(model):
    """Bytes that survive eviction, for one sequence: its fast weights.

    Chapter: 16_pretrained
    """
    return sum(S.nbytes for S in model.initial_state(1).fast_weights if S is not None)


def cached_bytes(model, tokens):
    """Bytes of the keys and values of so many tokens of one sequence, which eviction drops.

    Chapter: 16_pretrained
    """
    total = 0
    for block in model.layers:
        if not block.fast_shape:
            m = block.layer.self_attn
            kept = min(tokens, (block.own_window or tokens + 1) - 1)
            heads = m.k_proj.weight.shape[0] // m.head_dim
            total += 2 * kept * heads * m.head_dim * model.embedding.weight.element_size()
    return total


def step_bytes(model, train, reading, passes, batch=1):
    """Predicted peak memory of one training step, `batch` sequences at a time.

    The step is followed on device "meta", as :func:`training_bytes` does it, each gradient dropped as soon as
    it is made: what is alive then grows linearly with the number of windows.  :func:`weight_bytes`, which
    includes all gradients, is added to that.

    This is for a table of costs: what each optimizer keeps is counted, and each gradient once.  How a batch
    is divided is decided by :func:`training_bytes`, which takes an experiment, counts 16 bytes for every
    number that learns, and counts gradients once more as they arise.  It is larger, to be on the safe side.

    Chapter: 16_pretrained
    """
    inputs = torch.zeros(batch, sum(reading.tokens), dtype=torch.int64, device="meta")
    labels = inputs + IGNORE
    options = dict(window=reading.tokens[0], passes=passes, checkpoint=train.checkpoint)
    awake = tuple(not asleep for asleep in reading.asleep)
    with without_gradients(model):
        peak = followed_bytes(model, inputs, labels, awake, train.precision, **options)
    return peak + weight_bytes(model, train)


@contextmanager
def without_gradients(model):
    """Within `with` no parameter keeps its gradient."""
    hooks = [
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        for p in model.parameters()
        if p.requires_grad
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
