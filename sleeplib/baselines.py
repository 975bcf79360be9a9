"""The rivals of sleep: what else could be done with a window before its cache goes, or after the question.

Each is a :class:`HybridLM` that differs in what it does with a window asleep (``consolidate``), awake
(``predict``) or at its end (``evict``), so that Algorithm 1, the training loop and the records are those of
sleep itself.  A rival's settings are a :class:`ModelConfig` of its own kind, and ``config.build()`` makes it.

==============  =======================================================================================
settings        what it does
==============  =======================================================================================
PruneConfig     keeps keys and values: of the newest tokens, of sinks, of those attended to, or of all
PassesConfig    spends N passes in another way: without feeding h back, without writing, after the question
UntiedConfig    sleeps with different weights in each pass
TTTConfig       takes N gradient steps on the loss of the next token (:mod:`sleeplib.ttt`)
==============  =======================================================================================
"""

from dataclasses import dataclass, replace

import torch
from torch import nn

from .checks import integer
from .kernels import naive
from .layers import Attention, rotary_angles
from .model import Block, HybridLM, ModelConfig
from .state import LMState

# Pruning: what survives a window is some of its keys and values, word for word


@dataclass(frozen=True)
class PruneConfig(ModelConfig):
    """A model whose cache is pruned, not dropped.

    Parameters
    ----------
    keep : int, optional
        Tokens whose keys and values each attention block keeps; all if absent (full attention, the ceiling).
    how : {"recent", "heavy"}
        Which tokens: the newest; or a newest half, and of the others those that got the most attention.
    sinks : int
        How many of the kept tokens are the very first ones ("recent" only).

    Notes
    -----
    With sinks it is StreamingLLM, positions counted inside the cache, as there.  "heavy" is H2O's mixture
    with SnapKV's measure: the attention that the newest window paid, summed over its queries and heads; each
    block chooses for itself.  Pruning is trained through, so what is kept can learn to speak for what is not.

    Chapter: 15_argument
    """

    keep: int | None = None
    how: str = "recent"
    sinks: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.how not in ("recent", "heavy"):
            raise ValueError(f"how must be 'recent' or 'heavy'; got {self.how!r}")
        if self.keep is not None:
            object.__setattr__(self, "keep", integer("keep", self.keep, 1))
        most = self.keep - 1 if self.keep and self.how == "recent" else 0
        object.__setattr__(self, "sinks", integer("sinks", self.sinks, 0, most))

    def build(self):
        """Make the model."""
        return Pruned(self)


class PrunedAttention(Attention):
    """Attention that prunes its cache after each read."""

    def __init__(self, config):
        super().__init__(config.d_model, config.num_heads, config.rope_base)
        self.keep, self.how, self.sinks = config.keep, config.how, config.sinks

    def forward(self, x, memory, sliding_window=None, write_only=False):
        """As :meth:`Attention.forward`, but the memory that it returns has at most ``keep`` keys."""
        y, memory = super().forward(x, memory, sliding_window, write_only)
        keys, values = memory.kv
        if self.keep is None or keys.shape[1] <= self.keep:
            return y, memory
        if self.how == "recent":
            kept = [torch.cat((z[:, : self.sinks], z[:, self.sinks - self.keep :]), dim=1) for z in memory.kv]
            return y, memory._replace(kv=tuple(kept), ages=None)
        (B, S), new = keys.shape[:2], self.keep - self.keep // 2
        ages = torch.arange(S, 0, -1, device=x.device) if memory.ages is None else memory.ages
        score = self.received(x, keys, ages)
        score[:, S - new :] = torch.inf
        index = score.topk(self.keep, dim=1).indices.sort(dim=1).values  # (B, keep), the oldest first
        rows = torch.arange(B, device=x.device).unsqueeze(1)
        kept = tuple(z[rows, index] for z in memory.kv)
        return y, memory._replace(kv=kept, ages=ages.expand(B, S).gather(1, index))

    @torch.no_grad()
    def received(self, x, keys, ages):
        """Attention that each key (B, S, H, K) gets from the queries of x (B, T, D), summed: (B, S)."""
        T, S = x.shape[1], keys.shape[1]
        q = self.q(x).unflatten(-1, (self.num_heads, -1))  # (B, T, H, K)
        wide = torch.promote_types(keys.dtype, x.dtype)
        cos, sin = rotary_angles(ages[..., :1] - ages, q.shape[3], self.rope_base, wide)
        q = naive.apply_rotary(q, cos[..., S - T :, :], sin[..., S - T :, :])
        scores = torch.einsum("bthk,bshk->bhts", q, naive.apply_rotary(keys, cos, sin)) * q.shape[3] ** -0.5
        hidden = ages.unsqueeze(-2) < ages[..., S - T :].unsqueeze(-1)  # keys younger than the query
        hidden = hidden.unsqueeze(1) if hidden.ndim == 3 else hidden
        return scores.masked_fill(hidden, -torch.inf).softmax(-1).sum((1, 2))


class Pruned(HybridLM):
    """A model that carries a pruned cache from window to window, and fast weights where its pattern has any.

    Chapter: 15_argument
    """

    config_class = PruneConfig

    def __init__(self, config):
        super().__init__(config)
        for block, kind in zip(self.layers, config.pattern):
            if kind == "a":
                block.mixer = PrunedAttention(config)

    def predict(self, tokens, state, passes, window=None):
        """Answer; the question's own keys are dropped, those that were kept for it are not."""
        return _with_cache_of(state, super().predict(tokens, state, passes, window))

    def evict(self, state, eviction="hard", window=None):
        """Keep the pruned cache; the convolutions' context goes as it does for a sleeper."""
        return replace(state, conv=None) if eviction == "hard" else state


def _with_cache_of(before, result):
    """(logits, state) with the keys of the state `before`."""
    logits, state = result
    return logits, replace(state, kv=before.kv, key_ages=before.key_ages)


# The same N passes, spent in another way


@dataclass(frozen=True)
class PassesConfig(ModelConfig):
    """A model that spends its N passes differently from sleep.

    Parameters
    ----------
    how : str
        ``"replay"``: every pass reads the tokens anew, and only S goes from pass to pass: more writing, but
        no more thinking.  ``"frozen"``: h goes from pass to pass, and every pass starts from the S of the
        window's start; only what the last one writes stays: more thinking, but no more writing.
        ``"rewrite"``: one pass, in which each block writes the same keys and values N times, N steps of
        gradient descent on ``|S^T k - v|^2 / 2``.  ``"awake"``: one pass over the context, which is dropped,
        and N over the question, each from the S that the context left.  ``"awake-cache"``: the same, with
        full attention over the context's cache.

    Chapter: 15_argument
    """

    how: str = "replay"

    def __post_init__(self):
        super().__post_init__()
        ways = ("replay", "frozen", "rewrite", "awake", "awake-cache")
        if self.how not in ways:
            raise ValueError(f"how must be one of {', '.join(ways)}; got {self.how!r}")
        if self.loop is not None:
            raise ValueError(f"loop must be None, all blocks; got {self.loop}")

    def build(self):
        """Make the model."""
        return OtherPasses(self)


class OtherPasses(HybridLM):
    """A model that spends N passes as its config says.

    Chapter: 15_argument
    """

    config_class = PassesConfig

    def consolidate(self, tokens, state, passes, window=None):
        """Read a window in which nothing is asked, and return the state that remains."""
        how, h = self.config.how, self.embed(tokens)
        if how.startswith("awake"):
            return self.blocks(h, state, window=window, write_only=True)[1]
        self.check_state(state, h)
        start, order = state.blocks(), self.order(1)
        after = start
        if how == "rewrite":
            after = list(start)
            for i, block in enumerate(self.layers):
                for _ in range(passes if start[i].S is not None else 1):
                    y, after[i] = block(h, start[i]._replace(S=after[i].S), window)
                h = y
        for n in range(passes if how != "rewrite" else 0):
            last = n == passes - 1
            if how == "replay":
                before = [b._replace(S=a.S) for a, b in zip(after, start)]
                after = self.run(h, before, order, window, write_only=True)[1]
            else:
                h, after = self.run(h, start, order, window, write_only=last)
        return LMState.from_blocks(after, state.position + tokens.shape[1])

    def predict(self, tokens, state, passes, window=None):
        """Answer: in one pass, or in N."""
        h = self.embed(tokens)
        self.check_state(state, h)
        for _ in range(passes if self.config.how.startswith("awake") else 1):
            # From the same S each time: in one that was written, a token would read what follows it.
            h, after = self.run(h, state.blocks(), self.order(1), window)
        result = self.readout(h), LMState.from_blocks(after, state.position + tokens.shape[1])
        return _with_cache_of(state, result) if self.config.how == "awake-cache" else result

    def evict(self, state, eviction="hard", window=None):
        """Drop the cache, unless the passes after the question are to see it."""
        cached = self.config.how == "awake-cache"
        return replace(state, conv=None) if cached else super().evict(state, eviction, window)


@dataclass(frozen=True)
class UntiedConfig(ModelConfig):
    """A model whose passes each have weights of their own.

    Parameters
    ----------
    sets : int
        Sets of blocks, one a pass; N must be the same number.  Awake, the model reads with the last set.

    Chapter: 15_argument
    """

    sets: int = 4

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "sets", integer("sets", self.sets, 1, 1000))
        if self.loop is not None:
            raise ValueError(f"loop must be None, all blocks; got {self.loop}")

    def build(self):
        """Make the model."""
        return Untied(self)


class Untied(HybridLM):
    """A model with as many sets of blocks as passes, all of which write the same fast weights.

    Chapter: 15_argument
    """

    config_class = UntiedConfig

    def __init__(self, config):
        super().__init__(config)
        sets = (nn.ModuleList(Block(kind, config) for kind in config.pattern) for _ in range(config.sets - 1))
        self.earlier = nn.ModuleList(sets)

    def consolidate(self, tokens, state, passes, window=None):
        """Read a window in N passes, each through its own set of blocks."""
        if passes != self.config.sets:
            raise ValueError(f"passes must be {self.config.sets}, the sets of blocks; got {passes}")
        h = self.embed(tokens)
        self.check_state(state, h)
        start = state.blocks()
        after = list(start)
        for blocks in (*self.earlier, self.layers):
            for i, block in enumerate(blocks):
                unread = blocks is self.layers and i == len(blocks) - 1
                h, after[i] = block(h, start[i]._replace(S=after[i].S), window, unread)
        return LMState.from_blocks(after, state.position + tokens.shape[1])
