"""Algorithm 1: repeated offline passes over a window, just before its cache is dropped."""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recompute

from .checks import integer, token_tensor
from .interface import Sleepable
from .kernels import use_numba
from .state import LMState, check_eviction

IGNORE = -100  # the label of a position where nothing is asked
MEMBERS = ("initial_state", "embed", "blocks", "readout", "has_fast_weights", "vocab_size")


def evict(state, eviction="hard", window=None):
    """Drop cached tokens from a state; arguments, result and errors are those of :meth:`LMState.evict`.

    Chapter: 08_sleep
    """
    if not isinstance(state, LMState):
        raise TypeError(f"state must be an LMState; got {type(state).__name__}")
    return state.evict(eviction, window)


def sleep(model, tokens, state, passes=4, eviction="hard", window=None):
    r"""Sleep on one window: N passes from its boundary state, then eviction.

    .. math:: h^{(0)} = \mathrm{Embed}(c), \qquad h^{(n)}, S^{(n)} = \mathrm{Blocks}(h^{(n-1)}, S^{(n-1)})

    The last h is thrown away: after hard eviction all that sleep leaves behind is the fast weights.

    Parameters
    ----------
    model : Sleepable
        A :class:`HybridLM`, or any model with the members of :class:`Sleepable`.
    tokens : torch.Tensor of int64, shape (B, T)
        The window.
    state : LMState
        The state at the window's start.
    passes : int
        N, at least 1.
    eviction : {"hard", "keys", "sliding"}
    window : int, optional
        How many keys a query may see, its own included.  If absent, all; for sliding eviction T.

    Returns
    -------
    LMState
        Differentiable in the fast weights of `state` and in the parameters.  A model without fast weights has
        nowhere to write: it reads the window once and evicts.

    Raises
    ------
    ValueError, TypeError
        If an argument does not fit; the message names it.

    Examples
    --------
    Sleep on a window, then answer with an empty cache; `model` was trained to::

        state = sl.sleep(model, window, model.initial_state(len(window)), passes=4)
        logits, state = model(question, state)
        answer = logits[:, -1].argmax(-1)

    Notes
    -----
    Equation (6) of the paper.

    Chapter: 08_sleep
    """
    check_model(model)
    passes = check_passes(passes)
    check_eviction(eviction)
    window = None if window is None else integer("window", window, 1)
    if window is None and eviction == "sliding":
        token_tensor("tokens", tokens, model.vocab_size)
        window = tokens.shape[1]
    state = _act(model, "consolidate")(tokens, state, passes, window)
    return _act(model, "evict")(state, eviction, window)


def _act(model, name):
    """What a model does asleep, awake or at a window's end: its own method, or that of :class:`Sleepable`."""
    return getattr(model, name, None) or partial(getattr(Sleepable, name), model)


@dataclass(frozen=True)
class SleepOutput:
    """What :func:`sleep_forward` returns.

    Parameters
    ----------
    loss : torch.Tensor, shape ()
        Mean cross-entropy over all labels, in nats; NaN if there are none.
    logits : torch.Tensor, shape (B, T, vocab), or None
        Zeros in chunks without labels; None if not wanted.
    state : LMState
        After the last chunk.

    Chapter: 08_sleep
    """

    loss: torch.Tensor
    logits: torch.Tensor | None
    state: LMState


def awake_chunks(labels, window):
    """Whether labels (B, T) ask something in each chunk of `window` tokens: a tuple of bool.

    Raises
    ------
    ValueError
        If some rows have labels in a chunk and others have none, or `labels` are not (B, T) or
        hold no numbers.

    Chapter: 08_sleep
    """
    if labels.ndim != 2:
        raise ValueError(f"labels must have shape (B, T); got {tuple(labels.shape)}")
    if labels.is_meta:
        raise ValueError("labels on device meta hold no numbers, so say which chunks are awake")
    labelled = torch.stack([(c != IGNORE).any(dim=1) for c in labels.split(window, dim=1)], dim=1).cpu()
    awake = labelled.any(dim=0)
    if (labelled != awake).any():
        chunk = int((labelled != awake).any(dim=0).nonzero()[0])
        raise ValueError(
            f"labels: rows disagree in chunk {chunk} (tokens {chunk * window} ..): "
            "all rows of a batch must be asked something there, or none"
        )
    return tuple(awake.tolist())


def sleep_forward(
    model, inputs, labels, *, window, passes=4, eviction="hard", state=None,
    checkpoint=False, return_logits=True, awake=None, truncate=None,
):  # fmt: skip
    """Algorithm 1: read a sequence window by window, asleep where nothing is asked, awake where something is.

    Parameters
    ----------
    model : Sleepable
        A :class:`HybridLM`, or any model with the members of :class:`Sleepable`.
    inputs : torch.Tensor of int64, shape (B, T)
        Tokens.
    labels : torch.Tensor of int64, shape (B, T)
        The answer wanted at each position, -100 where nothing is asked.  May stay on the CPU: which chunks
        are awake is then known without waiting for a GPU.
    window : int
        L, tokens in a chunk.
    passes : int
        N, passes over a chunk that is slept on.  An awake chunk gets one.
    eviction : {"hard", "keys", "sliding"}
        What happens to the cache after a chunk.
    state : LMState, optional
        Where to start, at a chunk's boundary; the empty state if absent.
    checkpoint : bool
        Keep only the states between chunks and recompute the rest in the backward pass (where a window asks
        for a gradient of its own, as test-time training does, once more for each of its steps).
    return_logits : bool
        Whether to assemble the logits.
    awake : sequence of bool, optional
        The answer of :func:`awake_chunks`, where the caller knows it already.
    truncate : int, optional
        Naps that a gradient goes back through, at least 1; all of them if absent.  The naps are counted from
        the last one backwards, and the state is detached before every `truncate`-th: a loss after all
        naps reaches that many of them, and no loss reaches more.  Values stay the same.  Passes are never
        cut: a gradient that enters a nap goes through all N of them.

    Returns
    -------
    SleepOutput
        After a chunk that was slept on or has labels the cache is evicted.  A last chunk that has no labels
        and is shorter than the window is read in one pass and keeps its cache: its window is still open.

    Raises
    ------
    ValueError, TypeError
        On arguments that do not fit; the message names the argument.

    Notes
    -----
    Algorithm 1 of the paper.

    Chapter: 08_sleep
    """
    check_model(model)
    passes, window = check_passes(passes), integer("window", window, 1)
    truncate = truncate if truncate is None else integer("truncate", truncate, 1)
    check_eviction(eviction)
    token_tensor("inputs", inputs, model.vocab_size)
    token_tensor("labels", labels, model.vocab_size, IGNORE)
    if labels.shape != inputs.shape:
        raise ValueError(f"labels {tuple(labels.shape)} must have the shape of inputs {tuple(inputs.shape)}")
    if labels.device.type != "cpu" and labels.device != inputs.device:
        raise ValueError(f"labels are on {labels.device}, inputs on {inputs.device}; only the CPU may differ")
    awake = awake_chunks(labels, window) if awake is None else _check_awake(awake, labels, window)
    state = model.initial_state(inputs.shape[0]) if state is None else state
    if not isinstance(state, LMState):
        raise TypeError(f"state must be an LMState; got {type(state).__name__}")
    key_window = window if eviction == "sliding" else None
    naps = sum(not asked for asked in awake[: inputs.shape[1] // window])  # still to come

    def consolidate(tokens, state):
        return sleep(model, tokens, state, passes, eviction, key_window)

    def predict(tokens, state):
        return _act(model, "predict")(tokens, state, passes, key_window)

    def read(tokens, state):
        return model.blocks(model.embed(tokens), state, window=key_window, write_only=True)[1]

    def step(f, *args, on=use_numba.on):
        def same_kernels(*args):  # recomputed by those that ran, wherever a gradient is asked for
            with use_numba(on):
                return f(*args)

        if not checkpoint:
            return f(*args)
        return recompute(same_kernels, *args, use_reentrant=False, preserve_rng_state=False)

    total, count, pieces = 0.0, 0, []
    labels = labels.to(inputs.device, non_blocking=True)
    for tokens, targets, asked in zip(inputs.split(window, 1), labels.split(window, 1), awake, strict=True):
        logits = None
        if asked:
            logits, state = step(predict, tokens, state)
            state = _act(model, "evict")(state, eviction, window)
            wide = torch.promote_types(torch.float32, logits.dtype)
            flat = logits.flatten(0, 1).to(wide), targets.flatten()
            total = total + F.cross_entropy(*flat, ignore_index=IGNORE, reduction="sum")
            count = count + (targets != IGNORE).sum()
        elif tokens.shape[1] == window:
            if truncate is not None and naps % truncate == 0:
                state = state.detach()
            naps -= 1
            state = step(consolidate, tokens, state)
        else:
            state = step(read, tokens, state)
        pieces.append(logits if return_logits else None)
    known = next((x for x in pieces if x is not None), torch.empty(0, device=inputs.device))
    loss = total / count if any(awake) else known.new_full((), torch.nan)
    if not return_logits:
        return SleepOutput(loss, None, state)
    shapes = [(*tokens.shape, model.vocab_size) for tokens in inputs.split(window, 1)]
    pieces = [known.new_zeros(shape) if x is None else x for x, shape in zip(pieces, shapes)]
    return SleepOutput(loss, torch.cat(pieces, dim=1), state)


def check_model(model):
    """Raise TypeError unless sleep knows how to handle this model."""
    missing = [name for name in MEMBERS if not hasattr(model, name)]
    if missing:
        raise TypeError(f"model: {type(model).__name__} cannot sleep, it lacks {', '.join(missing)}")


def check_passes(passes):
    """Return N as an int; raise an error unless it is one, in 1 .. 100,000."""
    return integer("passes", passes, 1, 100_000, hint=" (to wake unslept, reset the state)")


def _check_awake(awake, labels, window):
    """Return `awake` as a tuple; raise if it does not fit, or labels that lie on the CPU say otherwise."""
    if not isinstance(awake, (tuple, list)):
        raise TypeError(f"awake must be a sequence of bool; got {awake!r}")
    awake = tuple(awake)
    chunks = -(-labels.shape[1] // window)
    if len(awake) != chunks:
        raise ValueError(f"awake must have one bool for each of {chunks} chunks; got {len(awake)}")
    if labels.device.type == "cpu" and awake != awake_chunks(labels, window):
        raise ValueError(f"awake {awake} is not where the labels are, {awake_chunks(labels, window)}")
    return awake
