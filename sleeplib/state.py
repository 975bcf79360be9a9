"""What a model carries from one call to the next: fast weights that stay, a cache that can be dropped."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from .checks import integer

EVICTIONS = ("hard", "keys", "sliding")


class Memory(NamedTuple):
    """What one block carries from token to token.

    Parameters
    ----------
    S : torch.Tensor, shape (B, H, K, V), or None
        The fast weight; None in an attention block.
    kv : tuple of torch.Tensor, or None
        Cached keys (not yet rotated) and values, each (B, S, H, size).
    conv : torch.Tensor, shape (B, taps - 1, channels), or None
        The newest inputs of the convolution.
    ages : torch.Tensor of int64, shape (S,) or (B, S), or None
        Where each cached key stands, counted back from the next token (1 is the token just before it), the
        oldest first.  None means that there is no gap: S, ..., 2, 1.

    Chapter: 04_delta_rule
    """

    S: torch.Tensor | None = None
    kv: tuple | None = None
    conv: torch.Tensor | None = None
    ages: torch.Tensor | None = None


@dataclass(frozen=True)
class LMState:
    """All that a model carries from one call to the next.

    Parameters
    ----------
    fast_weights : tuple
        For each block a (B, H, K, V) tensor, or None if it is attention.  Survives eviction.
    kv : tuple or None
        For each block a (keys, values) pair, each (B, S, H, size), or None.
    conv : tuple or None
        For each block a (B, taps - 1, channels) tensor, or None.
    position : int
        Tokens read so far.
    key_ages : tuple or None
        For each block the ages of its cached keys, see :class:`Memory`, or None where the cache has no gap.

    Chapter: 08_sleep
    """

    fast_weights: tuple
    kv: tuple | None = None
    conv: tuple | None = None
    position: int = 0
    key_ages: tuple | None = None

    def __post_init__(self):
        for name in ("fast_weights", "kv", "conv", "key_ages"):
            value = getattr(self, name)
            if not isinstance(value, tuple) and (value is not None or name == "fast_weights"):
                raise TypeError(f"{name} must be a tuple, one entry a block; got {value!r}")

    def tensors(self):
        """Every tensor of the state."""
        for S, kv, conv, ages in self.blocks():
            yield from (x for x in (S, *(kv or ()), conv, ages) if x is not None)

    def block(self, i):
        """The :class:`Memory` of block i."""
        kv, conv, ages = (x and x[i] for x in (self.kv, self.conv, self.key_ages))
        return Memory(self.fast_weights[i], kv, conv, ages)

    def blocks(self):
        """The memories of all blocks, a list."""
        return [self.block(i) for i in range(len(self.fast_weights))]

    @classmethod
    def from_blocks(cls, memories, position):
        """Gather the memories of all blocks, in order, after `position` tokens."""
        fast_weights, kv, conv, ages = zip(*memories)
        return cls(fast_weights, kv, conv, position, ages if any(x is not None for x in ages) else None)

    def _map(self, f):
        """Apply f to every tensor."""

        def apply(x):
            return tuple(map(apply, x)) if isinstance(x, tuple) else x if x is None else f(x)

        names = ("fast_weights", "kv", "conv", "key_ages")
        return replace(self, **{name: apply(getattr(self, name)) for name in names})

    def detach(self):
        """Return the same state, detached: no gradient passes through it."""
        return self._map(torch.Tensor.detach)

    def clone(self):
        """Return a copy that owns its memory: a slice would keep alive what it was cut from."""
        return self._map(torch.Tensor.clone)

    def nbytes(self):
        """Bytes that the tensors keep alive, shared storage counted once."""
        return storage_bytes(self.tensors())

    def evict(self, eviction="hard", window=None):
        """Drop cached tokens; the fast weights and the position stay.

        Parameters
        ----------
        eviction : {"hard", "keys", "sliding"}
            Hard drops every cached key and the convolution context; "keys" drops the keys only; sliding keeps
            the newest ``window - 1`` keys, as many as the next token may see beside its own, and the context.
        window : int
            L, needed for sliding eviction.

        Returns
        -------
        LMState

        Raises
        ------
        ValueError
            If `eviction` is unknown, or for sliding eviction `window` is no int of at least 1 or cached keys
            and values differ in length.

        Notes
        -----
        Sections 3 and 6.4 of the paper.  That hard eviction clears the convolution context too is our
        reading: the context holds tokens, not fast weights.  "keys" is the other reading.

        Chapter: 08_sleep
        """
        check_eviction(eviction)
        if eviction == "hard":
            return replace(self, kv=None, conv=None, key_ages=None)
        if eviction == "keys":
            return replace(self, kv=None, key_ages=None)
        keep = integer("window", window, 1) - 1
        if self.kv is None:
            return self
        for shapes in ([x.shape for x in pair] for pair in self.kv if pair):
            if any(len(shape) < 2 or shape[:2] != shapes[0][:2] for shape in shapes):
                found = [tuple(shape) for shape in shapes]
                raise ValueError(f"state: cached keys and values must be (B, S, ...) both; got {found}")
        kv = tuple(pair and tuple(x[:, max(0, x.shape[1] - keep) :] for x in pair) for pair in self.kv)
        ages = self.key_ages and tuple(
            x if x is None else x[..., max(0, x.shape[-1] - keep) :] for x in self.key_ages
        )
        return replace(self, kv=kv, key_ages=ages)


def check_eviction(eviction):
    """Raise ValueError unless this is a known way to drop a cache."""
    if eviction not in EVICTIONS:
        raise ValueError(f"eviction must be one of {', '.join(EVICTIONS)}; got {eviction!r}")


def storage_bytes(tensors):
    """Bytes that some tensors keep alive, shared storage counted once."""
    storages = [x.untyped_storage() for x in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
