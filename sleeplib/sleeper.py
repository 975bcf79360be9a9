"""Streaming: a model that reads token by token and takes a nap whenever its window is full."""

from dataclasses import dataclass, replace

import torch

from .algorithm import check_model, check_passes
from .checks import integer
from .interface import Sleepable
from .state import LMState, check_eviction, storage_bytes


@dataclass(frozen=True)
class _Stream:
    """A stream at one moment; a sleeper moves from one such moment to the next in a single assignment."""

    state: LMState  # after the newest token
    boundary: LMState  # at the window's start
    read: tuple = ()  # what the looped blocks made of the window so far, (B, t, D) each
    last: torch.Tensor | None = None  # logits of the newest token, (B, vocab)
    naps: int = 0


class Sleeper:
    """A model that reads a stream and takes a nap whenever its window is full.

    The awake pass that answers each token is also the first pass of the nap to come: the sleeper keeps what
    the looped blocks made of the window, and a nap adds passes 2 .. N.  Reading after a nap costs the same
    for every N.

    Parameters
    ----------
    model : Sleepable
        A :class:`HybridLM`, or another subclass of :class:`Sleepable`.
    window : int
        L, tokens between naps.
    passes : int
        N, the awake pass included.
    eviction : {"hard", "keys", "sliding"}

    Notes
    -----
    There are no gradients.  The results are those of :func:`sleep_forward` on the same tokens, unless a full
    chunk has labels: Algorithm 1 does not sleep on it, a sleeper does.  A call that is interrupted, or
    refused, leaves the stream as it was.

    Chapter: 08_sleep
    """

    def __init__(self, model, *, window, passes=4, eviction="hard"):
        check_model(model)
        if not hasattr(model, "run"):
            raise TypeError(f"model: {type(model).__name__} cannot stream, it lacks run; see Sleepable")
        for name in ("consolidate", "predict", "evict"):
            if getattr(type(model), name, own := getattr(Sleepable, name)) is not own:
                raise TypeError(
                    f"model: {type(model).__name__} cannot stream, it has a way to {name} of its own"
                )
        check_eviction(eviction)
        self.model = model
        # Fixed: the part of a window that was read was read under these settings.
        self._window, self._passes = integer("window", window, 1), check_passes(passes)
        self._eviction, self._stream = eviction, None
        self._sleeps = self._passes > 1 and model.has_fast_weights  # else a nap only drops the cache

    window = property(lambda self: self._window, doc="L, tokens between naps.")
    passes = property(lambda self: self._passes, doc="N, the awake pass included.")
    eviction = property(lambda self: self._eviction, doc="What happens to the cache after a nap.")
    naps = property(lambda self: self._stream.naps if self._stream else 0, doc="Windows slept on so far.")
    state = property(
        lambda self: self._stream and self._stream.state, doc="The state after the newest token."
    )

    @torch.no_grad()
    def feed(self, tokens):
        """Read tokens (B, t), any t of at least 1, in order; return their logits (B, t, vocab)."""
        h, logits, stream = self.model.embed(tokens), [], self._stream
        if stream is None:
            start = self.model.initial_state(len(tokens))
            stream = _Stream(start, start)
        elif (rows := len(stream.last)) != len(tokens):
            raise ValueError(f"tokens: the stream has {rows} rows; got {len(tokens)}")
        while h.shape[1]:
            room = self.window - (stream.state.position - stream.boundary.position)
            piece, stream = self._wake(h[:, :room], stream)
            logits.append(piece)
            h = h[:, room:]
            if stream.state.position - stream.boundary.position == self.window:
                stream = self._nap(stream)
        logits = torch.cat(logits, dim=1)
        self._stream = replace(stream, last=logits[:, -1].clone())  # a view would keep all of them alive
        return logits

    def generate(self, count):
        """Continue the stream greedily: the next `count` tokens, (B, count), each fed back in turn."""
        count, before, tokens = integer("count", count, 1), self._stream, []
        if before is None:
            raise ValueError("generate needs a beginning: feed at least one token first")
        try:
            for _ in range(count):
                tokens.append(self._stream.last.argmax(-1, keepdim=True))
                self.feed(tokens[-1])
        except BaseException:
            self._stream = before
            raise
        return torch.cat(tokens, dim=1)

    def nbytes(self):
        """Bytes of every tensor of the stream (not the weights), shared storage counted once."""
        if self._stream is None:
            return 0
        stream = self._stream
        return storage_bytes([*stream.state.tensors(), *stream.boundary.tensors(), *stream.read, stream.last])

    def _key_window(self):
        return self.window if self.eviction == "sliding" else None

    def _wake(self, h, stream):
        """One pass over h (B, t, D): logits, and the stream with what the nap will start from."""
        model, last = self.model, self.model.loop[1]
        memories, position = stream.state.blocks(), stream.state.position + h.shape[1]
        read, memories = model.run(h, memories, range(last + 1), self._key_window())
        h, memories = model.run(read, memories, range(last + 1, len(memories)), self._key_window())
        kept = (*stream.read, read) if self._sleeps else ()
        return model.readout(h), replace(stream, state=LMState.from_blocks(memories, position), read=kept)

    def _nap(self, stream):
        """Passes 2 .. N over the full window, from the caches at its start; then eviction."""
        model, state, (first, last) = self.model, stream.state, self.model.loop
        if self._sleeps:
            awake, start = state.blocks(), stream.boundary.blocks()
            # Blocks after the loop read a window once, after the last pass: what they wrote awake is undone.
            start = [b._replace(S=a.S) if i <= last else b for i, (a, b) in enumerate(zip(awake, start))]
            order = model.order(self.passes - 1)[first:]
            _, slept = model.run(
                torch.cat(stream.read, dim=1), start, order, self._key_window(), write_only=True
            )
            state = LMState.from_blocks(awake[:first] + slept[first:], state.position)
        # Slices would keep the whole window alive: copy what is carried on, let go of the rest.
        state = state.evict(self.eviction, self.window).clone()
        return _Stream(state, state, naps=stream.naps + 1)
