"""The run that the home page's moving picture shows; ``python book/record.py intro`` writes it down."""

import numpy as np
import torch

import sleeplib as sl
from sleeplib.records import kept_model_path

MODEL, PRESET, PASSES = "rule110-quick/N4-seed0", "rule110-quick", 4
LEVELS = 30  # S is kept in steps of CLIP / LEVELS, from "#" for -CLIP
CLIP, ZERO = 0.6, ord("#") + LEVELS


def letters(state):
    """The fast weights of a state as text, one character a number: all blocks in order (blocks, H, K, V)."""
    S = torch.cat([S.flatten() for S in state.fast_weights if S is not None])
    return "".join(chr(ZERO + n) for n in (S / CLIP).clamp(-1, 1).mul(LEVELS).round().int().tolist())


def change(before, after):
    """How much S has changed, as a share of what it is now."""
    pairs = [(a, b) for a, b in zip(before.fast_weights, after.fast_weights) if b is not None]
    squares = [((b - a).square().sum(), b.square().sum()) for a, b in pairs]
    return round(float((sum(d for d, _ in squares) / sum(s for _, s in squares)).sqrt()), 3)


def answer(model, tokens, state, strings):
    """Ask about every ring in turn, with each answer fed back; return the probability of a 1 for each."""
    shares = []
    for _ in range(strings):
        logits, _ = model(tokens, state)
        shares.append(round(float(logits[0, -1, :2].softmax(-1)[1]), 4))
        tokens = torch.cat([tokens, torch.tensor([[int(shares[-1] > 0.5)]])], dim=1)
    return shares


@torch.no_grad()
def record():
    """The first held-out sequence of seed 0: S after each token read and each pass, and the answers."""
    model = sl.HybridLM.from_checkpoint(kept_model_path(MODEL)).float()
    task = sl.experiments.get(PRESET).task
    many = task.batch(2000, np.random.default_rng(0), split="test")
    out = sl.sleep_forward(model, many.inputs, many.labels, window=task.window, passes=PASSES)
    right = (out.logits[:, task.context :].argmax(-1) == many.labels[:, task.context :]).all(1)

    sequence, state, moments = many.inputs[:1], model.initial_state(1), []
    question = sequence[:, task.context : task.context + 1]
    for window in sequence[:, : task.context].split(task.window, 1):
        last = state
        for t in range(1, task.window):  # awake: the first pass, token by token
            _, now = model(window[:, :t], state)
            moments.append(dict(kind="read", cache=t, S=letters(now), change=change(last, now)))
            last = now
        last = state  # the change in a pass is counted over the whole window
        for n in range(1, PASSES + 1):
            now = sl.sleep(model, window, state, passes=n)
            kind = "read" if n == 1 else "pass"
            moments.append(dict(kind=kind, cache=task.window, S=letters(now), change=change(last, now)))
            moments[-1] |= dict(number=n, woken=answer(model, question, now, task.strings))
            last = now
        state = now
    fast = next(S for S in state.fast_weights if S is not None)
    return dict(
        model=MODEL,
        passes=PASSES,
        exact=round(right.float().mean().item(), 3),
        guessing=round(task.chance()["exact"], 3),
        clip=CLIP,
        levels=LEVELS,
        shape=[model.config.pattern.count("g"), *fast.shape[1:]],  # blocks, H, K, V
        tokens=sequence[0, : task.context].tolist(),
        steps=task.steps,
        labels=many.labels[0, task.context :].tolist(),
        moments=moments,
    )
