"""HybridLM: attention that forgets and fast weights that stay, in one stack of blocks."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from .kernels import BACKENDS
from .layers import Attention, GatedDeltaNet, Memory, RMSNorm, SwiGLU, linear
from .records import write_atomically

MIXERS = "aghj"


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a :class:`HybridLM`.

    Parameters
    ----------
    vocab_size : int
        Number of tokens.
    d_model : int
        Width D.
    pattern : str
        One letter a block: ``a`` attention, ``g`` gated delta, ``h`` gated Hebbian, ``j`` Jet.
    num_heads : int
        Heads H of every mixer.
    loop : (int, int), optional
        First and last block (from 0, both included) that repeated passes run through; all if absent.
    key_size, value_size : int, optional
        K and V of a fast weight; ``d_model / num_heads`` and twice that if absent.
    mlp_size : int, optional
        Hidden width of the feed-forward layers; 8/3 of D, rounded up to a multiple of 16, if absent.
    conv_taps : int
        Length of the short convolutions.
    rope_base : float
        Base of the rotary rates.
    backend : str
        Backend of the recurrences, see :func:`gated_delta_rule`.

    Raises
    ------
    ValueError, TypeError
        If a field does not fit; the message names it.

    Notes
    -----
    Equations (4) and (5) of the paper: a pattern of ``a`` alone is a transformer, ``agag`` the hybrid.

    Chapter: 06_hybrid
    """

    vocab_size: int
    d_model: int = 64
    pattern: str = "agag"
    num_heads: int = 4
    loop: tuple[int, int] | None = None
    key_size: int | None = None
    value_size: int | None = None
    mlp_size: int | None = None
    conv_taps: int = 4
    rope_base: float = 10_000.0
    backend: str = "auto"

    def __post_init__(self):
        if not isinstance(self.pattern, str) or not self.pattern or set(self.pattern) - set(MIXERS):
            raise ValueError(f"pattern must be letters of {MIXERS!r}, one a block; got {self.pattern!r}")
        sizes = ("vocab_size", "d_model", "num_heads", "key_size", "value_size", "mlp_size", "conv_taps")
        for name in sizes:
            value = getattr(self, name)
            if value is None and name in ("key_size", "value_size", "mlp_size"):
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int; got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        if self.d_model % (2 * self.num_heads):
            raise ValueError(
                f"d_model must be a multiple of 2 * num_heads = {2 * self.num_heads}; got {self.d_model}"
            )
        if not self.rope_base > 1:
            raise ValueError(f"rope_base must be above 1; got {self.rope_base!r}")
        if self.backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {self.backend!r}")
        if self.loop is not None:
            loop = tuple(self.loop) if isinstance(self.loop, (tuple, list)) else ()
            whole = len(loop) == 2 and all(type(i) is int for i in loop)
            if not whole or not 0 <= loop[0] <= loop[1] < len(self.pattern):
                raise ValueError(
                    f"loop must be (first, last), 0 <= first <= last < {len(self.pattern)}; got {self.loop!r}"
                )
            object.__setattr__(self, "loop", loop)

    @property
    def K(self):
        """Key size of a fast weight."""
        return self.key_size or self.d_model // self.num_heads

    @property
    def V(self):
        """Value size of a fast weight."""
        return self.value_size or 2 * self.K

    @property
    def hidden(self):
        """Hidden width of a feed-forward layer."""
        return self.mlp_size or -(-8 * self.d_model // 48) * 16


@dataclass(frozen=True)
class LMState:
    """All that a model carries from one call to the next.

    Parameters
    ----------
    fast_weights : tuple
        One (B, H, K, V) tensor, or None for an attention block, for each block.  Survives eviction.
    kv : tuple or None
        One (keys, values) pair, each (B, S, H, size), or None, for each block.
    conv : tuple or None
        One (B, taps - 1, channels) tensor, or None, for each block.
    position : int
        Tokens read so far.

    Notes
    -----
    Chapter: 08_sleep
    """

    fast_weights: tuple
    kv: tuple | None = None
    conv: tuple | None = None
    position: int = 0


class Block(nn.Module):
    """Pre-norm mixer and pre-norm feed-forward layer, each with a residual connection.

    Notes
    -----
    Chapter: 06_hybrid
    """

    def __init__(self, kind, config):
        super().__init__()
        D, H = config.d_model, config.num_heads
        self.mixer_norm, self.mlp_norm = RMSNorm(D), RMSNorm(D)
        self.mixer = (
            Attention(D, H, config.rope_base)
            if kind == "a"
            else GatedDeltaNet(
                D,
                H,
                config.K,
                config.V,
                config.conv_taps,
                rule="hebbian" if kind == "h" else "delta",
                dynamic=kind == "j",
                backend=config.backend,
            )
        )
        self.mlp = SwiGLU(D, config.hidden)

    def forward(self, h, memory, window=None, wanted=True):
        """Map h (B, T, D) and this block's memory to the next h (None if not `wanted`) and memory."""
        y, memory = self.mixer(self.mixer_norm(h), memory, window, wanted)
        if not wanted:
            return None, memory
        h = h + y
        return h + self.mlp(self.mlp_norm(h)), memory


class HybridLM(nn.Module):
    """A language model whose blocks carry a KV cache, which is dropped, and fast weights, which stay.

    Parameters
    ----------
    config : ModelConfig

    Notes
    -----
    Projections start at N(0, 1 / fan_in) in variance, the output projection of every mixer and feed-forward
    layer at zero (a block starts as the identity, so N passes start as one), embeddings at N(0, 1).

    Chapter: 06_hybrid
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(kind, config) for kind in config.pattern)
        self.norm = RMSNorm(config.d_model)
        self.head = linear(config.d_model, config.vocab_size)

    @property
    def has_fast_weights(self):
        """Whether any block carries a fast weight: without one there is nothing to write during sleep."""
        return set(self.config.pattern) != {"a"}

    @property
    def loop(self):
        """First and last looped block."""
        return self.config.loop or (0, len(self.layers) - 1)

    def initial_state(self, batch_size):
        """Return an :class:`LMState` with empty caches and zero fast weights, on the model's device."""
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be an int of at least 1; got {batch_size!r}")
        c, weight = self.config, self.head.weight
        shape = (batch_size, c.num_heads, c.K, c.V)
        wide = torch.promote_types(torch.float32, weight.dtype)
        return LMState(
            tuple(None if kind == "a" else weight.new_zeros(shape, dtype=wide) for kind in c.pattern)
        )

    def embed(self, tokens):
        """Look up tokens (B, T), int64, to h (B, T, D)."""
        if not isinstance(tokens, torch.Tensor) or tokens.dtype != torch.int64:
            kind = tokens.dtype if isinstance(tokens, torch.Tensor) else type(tokens).__name__
            raise TypeError(f"tokens must be an int64 tensor; got {kind}")
        if tokens.ndim != 2 or 0 in tokens.shape:
            raise ValueError(f"tokens must have shape (B, T), neither of them 0; got {tuple(tokens.shape)}")
        known = tokens.device.type == "cpu" and not torch.compiler.is_compiling()
        if known and not bool(((tokens >= 0) & (tokens < self.config.vocab_size)).all()):
            raise ValueError(
                f"tokens must lie in 0 .. {self.config.vocab_size - 1}; "
                f"got {int(tokens.min())} .. {int(tokens.max())}"
            )
        return self.embedding(tokens)

    def run(self, h, state, fast_weights, span, window=None, wanted=True):
        """Run blocks ``span`` once over h (B, T, D); if h is not `wanted`, the last one only writes.

        The caches and the position are those of `state`, the fast weights those given: a repeated pass sees
        the same past again, but with what the pass before has written.

        Returns
        -------
        h : torch.Tensor, shape (B, T, D)
        memories : dict of int to Memory
            What each block of the span carries on.
        """
        memories = {}
        old = spread(state)
        for i in span:
            memory = old[i]._replace(S=fast_weights[i])
            h, memories[i] = self.layers[i](h, memory, window, wanted or i != span[-1])
        return h, memories

    def blocks(self, h, state, passes=1, window=None, wanted=True):
        """Run all blocks over h (B, T, D), those of the loop `passes` times, equation (6).

        Parameters
        ----------
        h : torch.Tensor, shape (B, T, D)
        state : LMState
            What came before; every pass starts from its caches and position, only h and the fast weights
            go from pass to pass.
        passes : int
            N.
        window : int, optional
            A query sees its newest `window` keys, itself included.
        wanted : bool
            Whether anyone will read h; if not, nothing is computed after the last write.

        Returns
        -------
        h : torch.Tensor, shape (B, T, D), or None
        state : LMState
            The caches are those of the last pass; the position has advanced by T.
        """
        if not isinstance(passes, int) or isinstance(passes, bool) or passes < 1:
            raise ValueError(f"passes must be an int of at least 1; got {passes!r}")
        if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
            raise ValueError(f"window must be an int of at least 1 or None; got {window!r}")
        if len(state.fast_weights) != len(self.layers):
            raise ValueError(
                f"state has {len(state.fast_weights)} blocks, the model {len(self.layers)}: not of this model"
            )
        if h.ndim != 3 or h.shape[2] != self.config.d_model:
            raise ValueError(f"h must have shape (B, T, {self.config.d_model}); got {tuple(h.shape)}")
        carried = (*state.fast_weights, *(pair and pair[0] for pair in state.kv or ()), *(state.conv or ()))
        if any(x is not None and x.shape[0] != h.shape[0] for x in carried):
            raise ValueError(f"state is not of {h.shape[0]} rows, as the tokens are")
        first, last = self.loop
        depth, position = len(self.layers), state.position + h.shape[1]
        fast, memories = list(state.fast_weights), {}
        spans = (range(first), *[range(first, last + 1)] * passes, range(last + 1, depth))
        spans = [span for span in spans if span]
        for number, span in enumerate(spans, 1):
            h, new = self.run(h, state, fast, span, window, wanted or number < len(spans))
            memories |= new
            for i in span:
                fast[i] = new[i].S
        return h, collect(memories, depth, position)

    def readout(self, h):
        """Map h (B, T, D) to logits (B, T, vocab)."""
        return self.head(self.norm(h))

    def forward(self, tokens, state, window=None):
        """Read tokens (B, T) awake, in one pass: logits (B, T, vocab) and the next state."""
        h, state = self.blocks(self.embed(tokens), state, window=window)
        return self.readout(h), state

    def save(self, folder):
        """Write ``config.json`` and ``model.safetensors`` to `folder`, each whole or not at all."""
        folder = Path(folder)
        write_atomically(
            folder / "model.safetensors", save({k: v.contiguous() for k, v in self.state_dict().items()})
        )
        text = json.dumps(dataclasses.asdict(self.config), indent=1)
        write_atomically(folder / "config.json", text.encode())

    @classmethod
    def from_checkpoint(cls, folder):
        """Read a model that :meth:`save` has written.

        Raises
        ------
        FileNotFoundError
            If `folder` holds no checkpoint.
        ValueError
            If a file is damaged, or belongs to another kind of model.
        """
        folder = Path(folder)
        config_file, weights_file = folder / "config.json", folder / "model.safetensors"
        for file in (config_file, weights_file):
            if not file.is_file():
                raise FileNotFoundError(f"folder: {file} is missing; not a checkpoint of HybridLM.save")
        try:
            model = cls(ModelConfig(**json.loads(config_file.read_text())))
        except (ValueError, TypeError) as error:
            raise ValueError(f"folder: {config_file} is not a ModelConfig: {error}") from error
        try:
            weights = load_file(weights_file)
        except SafetensorError as error:
            raise ValueError(f"folder: {weights_file} is damaged: {error}") from error
        dtype = next(iter(weights.values())).dtype if weights else torch.float32
        try:
            model.to(dtype).load_state_dict(weights)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"folder: {weights_file} does not fit {config_file}: {error}") from error
        return model


def spread(state):
    """Split an :class:`LMState` into the memories of the blocks, by number."""
    depth = len(state.fast_weights)
    caches = zip(state.fast_weights, state.kv or (None,) * depth, state.conv or (None,) * depth, strict=True)
    return dict(enumerate(Memory(*memory) for memory in caches))


def collect(memories, depth, position):
    """Gather the memories of all blocks, by number, into an :class:`LMState`."""
    memories = [memories[i] for i in range(depth)]
    return LMState(
        fast_weights=tuple(m.S for m in memories),
        kv=tuple(m.kv for m in memories),
        conv=tuple(m.conv for m in memories),
        position=position,
    )
