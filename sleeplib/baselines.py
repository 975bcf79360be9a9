"""The rivals of sleep: what else could be done with a window before its cache goes, or after the question.

Each is a :class:`HybridLM` that differs in what it does with a window asleep (``consolidate``), awake
(``predict``) or at its end (``evict``), so that Algorithm 1, the training loop and the records are those of
sleep itself.  A rival's settings are a :class:`ModelConfig` of its own kind, and ``config.build()`` makes it.

==============  =======================================================================================
settings        what it does
==============  =======================================================================================
PruneConfig     keeps the keys and values of some tokens: the newest, sinks, those attended to; or of all
PassesConfig    spends N passes otherwise: without feeding h back, without writing, after the question
UntiedConfig    sleeps with other weights in every pass
TTTConfig       takes N gradient steps on the loss of the next token, in the weights of an MLP
==============  =======================================================================================
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from .checks import finite_number, integer
from .kernels import naive, use_numba
from .layers import Attention, SwiGLU, rotary_angles
from .model import Block, HybridLM, ModelConfig
from .state import LMState

# Pruning: what survives of a window is some of its keys and values, word for word


@dataclass(frozen=True)
class PruneConfig(ModelConfig):
    """A model whose cache is pruned at the end of a window, and not dropped.

    Parameters
    ----------
    keep : int, optional
        Tokens whose keys and values each attention block keeps; all if absent (full attention, the ceiling).
    how : {"recent", "heavy"}
        Which: the newest; or the newest half, and of the others those that got most attention.
    sinks : int
        How many of the kept are the very first tokens ("recent" only).

    Notes
    -----
    With sinks it is StreamingLLM, positions counted inside the cache as there; "heavy" is H2O's mixture with
    SnapKV's measure: the attention that the newest window paid, summed over its queries and heads, a choice
    a block.  Pruning is trained through, so what is kept can learn to speak for what is not.

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
        cos, sin = rotary_angles(ages[..., :1] - ages, q.shape[3], self.rope_base, x.dtype)
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
        """Answer; the question's own keys are dropped, not those that were kept for it."""
        return _with_cache_of(state, super().predict(tokens, state, passes, window))

    def evict(self, state, eviction="hard", window=None):
        """Keep the pruned cache; the convolutions' context goes as it does for a sleeper."""
        return replace(state, conv=None) if eviction == "hard" else state


def _with_cache_of(before, result):
    """(logits, state) with the keys of the state `before`."""
    logits, state = result
    return logits, replace(state, kv=before.kv, key_ages=before.key_ages)


# The same N passes, spent otherwise


@dataclass(frozen=True)
class PassesConfig(ModelConfig):
    """A model that spends its N passes in another way than sleep does.

    Parameters
    ----------
    how : str
        ``"replay"``: every pass reads the tokens anew, only S goes from pass to pass: more writing, and no
        more thinking.  ``"frozen"``: h goes from pass to pass, and every pass reads and writes a copy of the
        S at the window's start, but the last, whose S stays: more thinking, and no more writing.
        ``"rewrite"``: one pass, in which each block writes the same keys and values N times, N steps of
        gradient descent on ``|S^T k - v|^2 / 2``.  ``"awake"``: one pass over the context, which is dropped,
        and N over the question, each from the S that the context left.  ``"awake-cache"``: so too, with full
        attention over the context's cache.

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
        """Read a window that nothing is asked in, and give the state that remains."""
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
    """A model that sleeps with weights of their own in each of its passes.

    Parameters
    ----------
    sets : int
        Sets of blocks, one a pass; N must be the same.  Awake the last one reads.

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
        """Read a window in N passes, each through the blocks of its own."""
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


# Test-time training: the window is learned by gradient descent on the loss of the next token


@dataclass(frozen=True)
class TTTConfig(ModelConfig):
    """A transformer that learns each window by heart: N steps of gradient descent in an MLP's weights.

    Parameters
    ----------
    fast_size : int, optional
        Hidden width of the MLP that learns; that of the other MLPs if absent.
    inner_lr : float
        Where the inner learning rate of each of its three matrices starts; the rates are learned too.

    Notes
    -----
    After E2E-TTT (arXiv 2512.23675): the MLPs of the last quarter of the blocks learn, here one of four,
    each beside one that does not; the first weights are trained through the inner steps (second order).  Ours
    differs: hard eviction at a window's end, as in every other arm; N steps a window and not one; the sum of
    the losses and not their mean; learned rates.

    Chapter: 15_argument
    """

    pattern: str = "aaaa"
    fast_size: int | None = None
    inner_lr: float = 0.03

    def __post_init__(self):
        super().__post_init__()
        if set(self.pattern) != {"a"} or not 4 <= len(self.pattern) < 8 or self.loop is not None:
            raise ValueError(
                f"pattern must be 4 to 7 times a, and loop None; got {self.pattern!r}, {self.loop}"
            )
        size = self.hidden if self.fast_size is None else integer("fast_size", self.fast_size, 1)
        object.__setattr__(self, "fast_size", size)
        object.__setattr__(self, "inner_lr", finite_number("inner_lr", self.inner_lr, least=1e-9))

    def build(self):
        """Make the model."""
        return TestTimeTrained(self)


class TTTBlock(Block):
    """Attention, and beside the MLP a second one whose weights are the block's fast weight.

    The fast weight is (B, 3, D, F): gate, up and down of a SwiGLU of width F, the last transposed.
    """

    def __init__(self, config):
        super().__init__("a", config)
        self.first = SwiGLU(config.d_model, config.fast_size)
        self.log_rate = nn.Parameter(torch.full((3,), math.log(config.inner_lr)))

    def first_weights(self, batch_size):
        """What every sequence starts from, (B, 3, D, F)."""
        W = torch.stack((self.first.gate.weight.T, self.first.up.weight.T, self.first.down.weight))
        return W.expand(batch_size, *W.shape)

    def attend(self, h, memory, sliding_window=None):
        """The first half of the block."""
        y, after = self.mixer(self.mixer_norm(h), memory._replace(S=None), sliding_window)
        return h + y, after._replace(S=memory.S)

    def feed(self, h, W):
        """The second half: both MLPs, the one with the weights W (B, 3, D, F) given."""
        x = self.mlp_norm(h)  # (B, T, D)
        gate, up = torch.einsum("btd,bndf->nbtf", x, W[:, :2])
        return h + self.mlp(x) + torch.einsum("btf,bdf->btd", F.silu(gate) * up, W[:, 2])

    def forward(self, h, memory, sliding_window=None, write_only=False):
        """Map h (B, T, D) and this block's memory to the next h and memory."""
        h, memory = self.attend(h, memory, sliding_window)
        return None if write_only else self.feed(h, memory.S), memory


class TestTimeTrained(HybridLM):
    """A transformer one of whose MLPs goes on learning while it reads.

    Chapter: 15_argument
    """

    config_class = TTTConfig
    __test__ = False  # no test class of pytest's

    def __init__(self, config):
        super().__init__(config)
        self.layers[-1] = TTTBlock(config)

    def initial_state(self, batch_size):
        """Return an :class:`LMState` with empty caches and the first weights of the MLP that learns."""
        state = super().initial_state(batch_size)
        return replace(
            state, fast_weights=(*state.fast_weights[:-1], self.layers[-1].first_weights(batch_size))
        )

    def consolidate(self, tokens, state, passes, window=None):
        """Read a window once, and take N steps on the cross-entropy of its tokens 2, 3, ..."""
        h, block, trained = self.embed(tokens), self.layers[-1], torch.is_grad_enabled()
        self.check_state(state, h)
        h, memories = self.run(h, state.blocks(), range(len(self.layers) - 1), window)
        h, memories[-1] = block.attend(h, memories[-1], window)
        W, rates = memories[-1].S, block.log_rate.exp().view(3, 1, 1)
        # The kernels' gradients have no gradients: what is differentiated twice is plain PyTorch.
        with torch.enable_grad(), use_numba(False):
            W = W if trained else W.detach().requires_grad_()
            for _ in range(passes):
                logits = self.readout(block.feed(h, W))[:, :-1].flatten(0, 1)
                loss = F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum")
                W = W - rates * torch.autograd.grad(loss, W, create_graph=trained)[0]
        memories[-1] = memories[-1]._replace(S=W if trained else W.detach())
        return LMState.from_blocks(memories, state.position + tokens.shape[1])
