"""Sleep: repeated offline passes over a window, just before its cache is dropped (Algorithm 1)."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recompute

from .model import collect, spread

EVICTIONS = ("hard", "keys", "sliding")
IGNORE = -100  # the label of a position where nothing is asked


def evict(state, eviction="hard", window=None):
    """Drop cached tokens from a state; the fast weights and the position stay.

    Parameters
    ----------
    state : LMState
    eviction : {"hard", "keys", "sliding"}
        Hard drops every cached key and the convolution context; "keys" drops the keys only; sliding keeps the
        newest ``window - 1`` keys, as many as the next token may see beside its own, and the context.
    window : int
        L, needed for sliding eviction.

    Returns
    -------
    LMState

    Notes
    -----
    Sections 3 and 6.4 of the paper.  That hard eviction clears the convolution context too is our reading:
    the context holds tokens, not fast weights.  "keys" is the other reading.

    Chapter: 08_sleep
    """
    _check(1, eviction, window, need_window=eviction == "sliding")
    if eviction != "sliding":
        return replace(state, kv=None, conv=None if eviction == "hard" else state.conv)
    if state.kv is None:
        return state
    keep = window - 1
    kv = tuple(pair and tuple(x[:, max(0, x.shape[1] - keep) :] for x in pair) for pair in state.kv)
    return replace(state, kv=kv)


def sleep(model, tokens, state, passes=4, eviction="hard", window=None):
    r"""Sleep on one window: N passes from its boundary state, then eviction.

    .. math:: h^{(0)} = \mathrm{Embed}(c), \qquad h^{(n)}, S^{(n)} = \mathrm{Blocks}(h^{(n-1)}, S^{(n-1)})

    The last h is thrown away: all that sleep leaves behind is the fast weight.

    Parameters
    ----------
    model : HybridLM
    tokens : torch.Tensor of int64, shape (B, T)
        The window.
    state : LMState
        The state at the window's start.
    passes : int
        N, at least 1.
    eviction : {"hard", "keys", "sliding"}
    window : int, optional
        How many keys a query may see, itself included.  For sliding eviction T if absent.

    Returns
    -------
    LMState
        Differentiable in the fast weights of `state` and in the parameters.  A model without fast weights has
        nowhere to write: it only evicts.

    Raises
    ------
    ValueError
        If `passes` or `window` is below 1, or `eviction` unknown.

    Notes
    -----
    Equation (6) of the paper.

    Chapter: 08_sleep
    """
    _check(passes, eviction, window)
    window = tokens.shape[1] if window is None and eviction == "sliding" else window
    passes = passes if model.has_fast_weights else 1
    _, state = model.blocks(model.embed(tokens), state, passes=passes, window=window, wanted=False)
    return evict(state, eviction, window)


@dataclass(frozen=True)
class SleepOutput:
    """What :func:`sleep_forward` returns.

    Parameters
    ----------
    loss : torch.Tensor, shape ()
        Mean cross-entropy over all labels, in nats; NaN if there are none.
    logits : torch.Tensor, shape (B, T, vocab), or None
        Zeros where the model slept.
    state : LMState
        After the last chunk.

    Notes
    -----
    Chapter: 08_sleep
    """

    loss: torch.Tensor
    logits: torch.Tensor | None
    state: object


def awake_chunks(labels, window):
    """For each chunk of `window` tokens, whether it has labels (B, T): a tuple of bool.

    Raises
    ------
    ValueError
        If some rows have labels in a chunk and others have none.

    Notes
    -----
    Chapter: 08_sleep
    """
    if labels.ndim != 2:
        raise ValueError(f"labels must have shape (B, T); got {tuple(labels.shape)}")
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
    model,
    inputs,
    labels,
    *,
    window,
    passes=4,
    eviction="hard",
    state=None,
    checkpoint=False,
    return_logits=True,
    awake=None,
):
    """Algorithm 1: read a sequence window by window, asleep where nothing is asked, awake where something is.

    Parameters
    ----------
    model : HybridLM
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
        Keep only the states between chunks and recompute the rest in the backward pass.
    return_logits : bool
        Whether to assemble the logits.
    awake : sequence of bool, optional
        The answer of :func:`awake_chunks`, where the caller knows it already.

    Returns
    -------
    SleepOutput
        After a chunk that was slept on or has labels the cache is evicted.  A trailing chunk without labels
        that is shorter than the window is read in one pass and keeps its cache: its window is still open.

    Raises
    ------
    ValueError, TypeError
        On arguments that do not fit; the message names the argument.

    Notes
    -----
    Algorithm 1 of the paper.

    Chapter: 08_sleep
    """
    _check(passes, eviction, window, need_window=True)
    if not isinstance(labels, torch.Tensor) or labels.dtype != torch.int64:
        raise TypeError("labels must be an int64 tensor")
    if not isinstance(inputs, torch.Tensor):
        raise TypeError(f"inputs must be an int64 tensor; got {type(inputs).__name__}")
    if labels.shape != inputs.shape:
        raise ValueError(f"labels {tuple(labels.shape)} must have the shape of inputs {tuple(inputs.shape)}")
    vocab = model.config.vocab_size
    if labels.device.type == "cpu" and not ((labels == IGNORE) | (labels >= 0) & (labels < vocab)).all():
        raise ValueError(f"labels must be {IGNORE} or lie in 0 .. {vocab - 1}")
    awake = awake_chunks(labels, window) if awake is None else awake
    state = model.initial_state(inputs.shape[0]) if state is None else state
    key_window = window if eviction == "sliding" else None

    def consolidate(tokens, state):
        return sleep(model, tokens, state, passes, eviction, key_window)

    def predict(tokens, state):
        return model(tokens, state, window=key_window)

    def step(f, *args):
        return recompute(f, *args, use_reentrant=False, preserve_rng_state=False) if checkpoint else f(*args)

    total, count, pieces = 0.0, 0, []
    labels = labels.to(inputs.device, non_blocking=True)
    for tokens, targets, asked in zip(inputs.split(window, 1), labels.split(window, 1), awake, strict=True):
        if asked:
            logits, state = step(predict, tokens, state)
            state = evict(state, eviction, window)
            total = total + F.cross_entropy(
                logits.flatten(0, 1).float() if logits.dtype != torch.float64 else logits.flatten(0, 1),
                targets.flatten(),
                ignore_index=IGNORE,
                reduction="sum",
            )
            count = count + (targets != IGNORE).sum()
        else:
            logits = None
            if tokens.shape[1] == window:
                state = step(consolidate, tokens, state)
            else:
                _, state = step(predict, tokens, state)
        if return_logits:
            shape = (*tokens.shape, model.config.vocab_size)
            pieces.append(model.head.weight.new_zeros(shape) if logits is None else logits)
    loss = total / count if any(awake) else model.head.weight.new_full((), torch.nan)
    return SleepOutput(loss, torch.cat(pieces, dim=1) if return_logits else None, state)


class Sleeper:
    """A model that reads a stream and takes a nap whenever its window is full.

    The awake pass that answers each token is also the first pass of the nap to come: the sleeper keeps what
    the looped blocks made of the window, and a nap adds passes 2 .. N.  Reading after a nap costs the same
    for every N.

    Parameters
    ----------
    model : HybridLM
    window : int
        L, tokens between naps.
    passes : int
        N, the awake pass included.
    eviction : {"hard", "keys", "sliding"}

    Attributes
    ----------
    naps : int
        Windows slept on so far.
    state : LMState or None
        The state after the newest token; None before the first.

    Notes
    -----
    No gradients.  Equal to :func:`sleep_forward` on the same tokens, unless a chunk with labels is full: that
    one Algorithm 1 does not sleep on.

    Chapter: 08_sleep
    """

    def __init__(self, model, *, window, passes=4, eviction="hard"):
        _check(passes, eviction, window, need_window=True)
        self.model, self.window, self.passes, self.eviction = model, window, passes, eviction
        self.naps, self.state = 0, None
        self._boundary = None  # the state at the window's start
        self._read = []  # what the looped blocks made of the window so far, (B, t, D) each
        self._last = None  # logits of the newest token

    @torch.no_grad()
    def feed(self, tokens):
        """Read tokens (B, t), any t of at least 1, in order; return their logits (B, t, vocab)."""
        h, logits = self.model.embed(tokens), []
        if self.state is None:
            self.state = self._boundary = self.model.initial_state(tokens.shape[0])
        elif (rows := self._last.shape[0]) != tokens.shape[0]:
            raise ValueError(f"tokens: the stream has {rows} rows; got {tokens.shape[0]}")
        while h.shape[1]:
            room = self.window - (self.state.position - self._boundary.position)
            logits.append(self._wake(h[:, :room]))
            h = h[:, room:]
            if self.state.position - self._boundary.position == self.window:
                self._nap()
        logits = torch.cat(logits, dim=1)
        self._last = logits[:, -1].clone()  # a view would keep all of them alive
        return logits

    def generate(self, count):
        """Continue the stream greedily: the next `count` tokens, (B, count), each fed back in turn."""
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"count must be an int of at least 1; got {count!r}")
        if self._last is None:
            raise ValueError("generate needs a beginning: feed at least one token first")
        tokens = []
        for _ in range(count):
            tokens.append(self._last.argmax(-1, keepdim=True))
            self.feed(tokens[-1])
        return torch.cat(tokens, dim=1)

    def nbytes(self):
        """Bytes of every tensor that the sleeper holds on to, shared storage counted once."""
        seen = {}

        def walk(x):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                seen[storage.data_ptr()] = storage.nbytes()
            elif isinstance(x, (tuple, list)):
                for item in x:
                    walk(item)

        for state in (self.state, self._boundary):
            if state is not None:
                walk((state.fast_weights, state.kv, state.conv))
        walk((self._read, self._last))
        return sum(seen.values())

    def _key_window(self):
        return self.window if self.eviction == "sliding" else None

    def _wake(self, h):
        """One pass over h (B, t, D): logits, and the looped blocks' output kept for the nap."""
        _, last = self.model.loop
        depth = len(self.model.layers)
        fast = self.state.fast_weights
        read, memories = self.model.run(h, self.state, fast, range(last + 1), self._key_window())
        h, rest = self.model.run(read, self.state, fast, range(last + 1, depth), self._key_window())
        self.state = collect(memories | rest, depth, self.state.position + h.shape[1])
        if self.passes > 1:
            self._read.append(read)
        return self.model.readout(h)

    def _nap(self):
        """Passes 2 .. N over the full window, from the caches at its start; then eviction."""
        first, last = self.model.loop
        depth = len(self.model.layers)
        looped, later = range(first, last + 1), range(last + 1, depth)
        if self.passes > 1 and self.model.has_fast_weights:
            h, fast, memories = (
                torch.cat(self._read, dim=1),
                list(self.state.fast_weights),
                spread(self.state),
            )
            for n in range(2, self.passes + 1):
                wanted = n < self.passes or bool(later)
                h, new = self.model.run(h, self._boundary, fast, looped, self._key_window(), wanted)
                fast[first : last + 1] = (new[i].S for i in looped)
                memories |= new
            # The blocks after the loop read each window once, and what they read is the last pass.
            fast = self._boundary.fast_weights
            _, new = self.model.run(h, self._boundary, fast, later, self._key_window(), wanted=False)
            self.state = collect(memories | new, depth, self.state.position)
        state = evict(self.state, self.eviction, self.window)
        # Slices would keep the whole window alive: own what is carried on, let go of the rest.
        self.state = self._boundary = replace(
            state,
            kv=state.kv and tuple(pair and tuple(x.clone() for x in pair) for pair in state.kv),
            conv=state.conv and tuple(x if x is None else x.clone() for x in state.conv),
        )
        self._read = []
        self.naps += 1


def _check(passes, eviction, window, need_window=False):
    if not isinstance(passes, int) or isinstance(passes, bool) or passes < 1:
        raise ValueError(
            f"passes must be an int of at least 1; got {passes!r} (to wake unslept, reset the state)"
        )
    if eviction not in EVICTIONS:
        raise ValueError(f"eviction must be one of {', '.join(EVICTIONS)}; got {eviction!r}")
    if window is None and not need_window:
        return
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        raise ValueError(f"window must be an int of at least 1; got {window!r}")
