"""What can be put to sleep: the few members through which sleep knows a model, and what runs passes."""

import torch

from .checks import check_tensor, integer, token_tensor
from .state import LMState


class Sleepable:
    """A model that can sleep: blocks whose memory is explicit, between an embedding and a readout.

    A subclass provides the attributes below and three methods: ``initial_state(batch_size)`` gives the
    :class:`LMState` before the first token, ``embed(tokens)`` maps (B, T) int64 to h (B, T, D), and
    ``readout(h)`` maps h to logits (B, T, vocab).  Running passes over the blocks is provided here, once.
    Nothing in :func:`sleep`, :func:`sleep_forward` and :class:`Sleeper` knows more of a model than this.

    For each window Algorithm 1 asks a model to ``consolidate`` (asleep) or to ``predict`` (awake), and to
    ``evict`` at its end.  What they do here is sleep; :mod:`sleeplib.baselines` and
    :mod:`sleeplib.ttt` have models that do something else.

    Attributes
    ----------
    layers : sequence of callable
        One block each: ``block(h, memory, sliding_window, write_only=False) -> (h, memory)`` maps h (B, T, D)
        and the block's :class:`Memory` to the next ones.  With `write_only` nobody reads the h it returns.
    loop : tuple of (int, int)
        First and last block, from 0 and both included, that repeated passes run through.
    vocab_size, d_model : int
        Number of tokens, width D.

    Chapter: 08_sleep
    """

    @property
    def has_fast_weights(self):
        """Whether any block carries a fast weight: without one there is nothing to write during sleep."""
        return any(S is not None for S in self.initial_state(1).fast_weights)

    def fast_parameters(self):
        """What may be trained before all else: the parameters of the blocks with a fast weight, a list.

        Section 6.4 of the paper trains inserted layers first.
        """
        fast = zip(self.layers, self.initial_state(1).fast_weights)
        return [p for block, S in fast if S is not None for p in block.parameters()]

    def may_learn(self, name):
        """Whether the parameter of this name is ever trained."""
        return True

    def learn(self, part="all"):
        """Let "all" that :meth:`may_learn` admits learn, or only the :meth:`fast_parameters` ("fast")."""
        if part not in ("all", "fast"):
            raise ValueError(f"part must be 'all' or 'fast'; got {part!r}")
        fast = set(map(id, self.fast_parameters()))
        for name, p in self.named_parameters():
            p.requires_grad_(self.may_learn(name) and (part == "all" or id(p) in fast))

    def order(self, passes):
        """Numbers of the blocks that `passes` passes run through, one after the other."""
        first, last = self.loop
        return [*range(first), *[*range(first, last + 1)] * passes, *range(last + 1, len(self.layers))]

    def run(self, h, memories, order, window=None, write_only=False):
        """Run blocks over h (B, T, D), in any order, equation (6).

        `memories` is a list of one :class:`Memory` a block, `order` the numbers of the blocks to visit, and
        `window` how many of its newest keys a query sees.  However often a block is visited, it finds the
        cache that it had before its first visit, and the fast weight that its previous visit wrote.  With
        `write_only` the h at the end is of no use to anyone, and the last block only writes.

        Returns the h at the end, or None, and the memories: of a visited block, what its last visit left.
        """
        after = list(memories)
        for visit, i in enumerate(order, 1):
            before = memories[i]._replace(S=after[i].S)
            h, after[i] = self.layers[i](h, before, window, write_only and visit == len(order))
        return h, after

    def blocks(self, h, state, passes=1, window=None, write_only=False):
        """Run all blocks over h (B, T, D), those of the loop `passes` times, equation (6).

        Parameters
        ----------
        h : torch.Tensor, shape (B, T, D)
        state : LMState
            What came before; every pass starts from its caches and position, and only h and the fast weights
            go from pass to pass.
        passes : int
            N.
        window : int, optional
            A query sees its newest `window` keys, itself included.
        write_only : bool
            Whether h is of no use to anyone; then nothing is computed after the last write.

        Returns
        -------
        h : torch.Tensor, shape (B, T, D), or None
        state : LMState
            The caches are those of the last pass; the position has advanced by T.

        Raises
        ------
        ValueError, TypeError
            On arguments that do not fit the model or one another; the message names the argument.
        """
        passes = integer("passes", passes, 1, 100_000)
        window = None if window is None else integer("window", window, 1)
        self.check_h(h)
        self.check_state(state, h)
        position = state.position + h.shape[1]
        h, memories = self.run(h, state.blocks(), self.order(passes), window, write_only)
        return h, LMState.from_blocks(memories, position)

    def consolidate(self, tokens, state, passes, window=None):
        """Asleep: read tokens (B, T) in N `passes`, equation (6); return the state that remains."""
        passes = passes if self.has_fast_weights else 1
        return self.blocks(self.embed(tokens), state, passes=passes, window=window, write_only=True)[1]

    def forward(self, tokens, state, window=None):
        """Read tokens (B, T) awake, in one pass: logits (B, T, vocab) and the next state."""
        h, state = self.blocks(self.embed(tokens), state, window=window)
        return self.readout(h), state

    def predict(self, tokens, state, passes, window=None):
        """Awake: :meth:`forward`, whatever N is."""
        return Sleepable.forward(self, tokens, state, window)  # a model may call something else forward

    def evict(self, state, eviction="hard", window=None):
        """Drop the cache at a window's end, see :meth:`LMState.evict`."""
        return state.evict(eviction, window)

    def check_tokens(self, tokens):
        """Raise unless tokens are int64 (B, T) on the model's device and, if that is a CPU, known words."""
        token_tensor("tokens", tokens, self.vocab_size)
        if tokens.device != self.device:
            raise ValueError(f"tokens are on {tokens.device}, the model on {self.device}")

    def check_h(self, h):
        """Raise an error unless h is a float tensor (B, T, D) of the model's width, precision and device."""
        check_tensor("h", h, ("B", "T", self.d_model), empty=False)
        dtype, device = getattr(self, "dtype", h.dtype), getattr(self, "device", h.device)
        if h.device != device or h.dtype != dtype and not torch.is_autocast_enabled(device.type):
            raise TypeError(f"h must be {dtype} on {device}, as the model is; got {h.dtype} on {h.device}")

    def check_state(self, state, h):
        """Raise an error unless `state` has as many blocks as the model, and tensors that go with h."""
        if not isinstance(state, LMState):
            raise TypeError(f"state must be an LMState; got {type(state).__name__}")
        depth = len(self.layers)
        for field in (state.fast_weights, state.kv, state.conv, state.key_ages):
            if field is not None and len(field) != depth:
                raise ValueError(f"state has {len(field)} blocks, the model {depth}: not of this model")
        for S, kv, conv, _ in state.blocks():
            for x in (S, *(kv or ()), conv):
                numbers = isinstance(x, torch.Tensor) and x.is_floating_point() and x.ndim
                if x is not None and not (numbers and x.layout is torch.strided):
                    raise TypeError("state: its fields must hold dense floating-point tensors or None")
                if x is not None and (len(x) != len(h) or x.device != h.device):
                    raise ValueError(f"state is not of {len(h)} rows on {h.device}, as the tokens are")
