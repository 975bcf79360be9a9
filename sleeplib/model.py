"""HybridLM: attention that forgets and fast weights that stay, in one stack of blocks."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from .checks import block_range, finite_number, integer
from .interface import Sleepable
from .kernels import BACKENDS
from .layers import Attention, GatedDeltaNet, RMSNorm, SwiGLU, linear
from .records import kept_model_path, write_atomically
from .state import LMState

MIXERS = "aghj"


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a :class:`HybridLM`.

    Parameters
    ----------
    vocab_size, d_model : int
        Number of tokens, width D.
    pattern : str
        One letter a block: ``a`` attention, ``g`` gated delta, ``h`` gated Hebbian, ``j`` Jet.
    num_heads : int
        Heads H of every mixer.
    loop : (int, int), optional
        First and last block (from 0, both included) that repeated passes run through; all if absent.
    key_size, value_size : int, optional
        K and V of a fast weight; if absent ``d_model / num_heads`` and ``2 * K``.
    mlp_size : int, optional
        Hidden width of the feed-forward layers; 8/3 of D, rounded up to a multiple of 16, if absent.
    conv_taps, rope_base : int, float
        Length of the short convolutions, base of the rotary rates.
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
        optional = ("key_size", "value_size", "mlp_size")
        for name in ("vocab_size", "d_model", "num_heads", "conv_taps", *optional):
            value = getattr(self, name)
            if value is not None or name not in optional:
                object.__setattr__(self, name, integer(name, value, 1))
        if self.d_model % (2 * self.num_heads):
            wanted = f"a multiple of 2 * num_heads = {2 * self.num_heads}"
            raise ValueError(f"d_model must be {wanted}; got {self.d_model}")
        object.__setattr__(self, "rope_base", finite_number("rope_base", self.rope_base, least=1))
        if self.backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {self.backend!r}")
        if self.loop is not None:
            object.__setattr__(self, "loop", block_range("loop", self.loop, len(self.pattern)))

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

    def build(self):
        """Make the model, with weights as they are before training."""
        return HybridLM(self)

    def on_meta(self):
        """Make the model without numbers, on device "meta", so that its cost can be counted."""
        with torch.device("meta"):
            return self.build()


class Block(nn.Module):
    """Pre-norm mixer and pre-norm feed-forward layer, each with a residual connection.

    Chapter: 06_hybrid
    """

    def __init__(self, kind, config):
        super().__init__()
        D, H = config.d_model, config.num_heads
        self.mixer_norm, self.mlp_norm = RMSNorm(D), RMSNorm(D)
        if kind == "a":
            self.mixer = Attention(D, H, config.rope_base)
        else:
            rule, sizes = "hebbian" if kind == "h" else "delta", (config.K, config.V, config.conv_taps)
            self.mixer = GatedDeltaNet(D, H, *sizes, rule, dynamic=kind == "j", backend=config.backend)
        self.mlp = SwiGLU(D, config.hidden)

    def forward(self, h, memory, sliding_window=None, write_only=False):
        """Map h (B, T, D) and this block's memory to the next h, or None if `write_only`, and memory."""
        y, memory = self.mixer(self.mixer_norm(h), memory, sliding_window, write_only)
        if write_only:
            return None, memory
        h = h + y
        return h + self.mlp(self.mlp_norm(h)), memory


class HybridLM(Sleepable, nn.Module):
    """A language model whose blocks carry a KV cache, which is dropped, and fast weights, which stay.

    Parameters
    ----------
    config : ModelConfig

    Notes
    -----
    Projections start from N(0, 1 / fan_in), the second number a variance; the output projection of every
    mixer and feed-forward layer at zero (a block starts as the identity: N passes leave h as one does);
    embeddings from N(0, 1).

    Chapter: 06_hybrid
    """

    config_class = ModelConfig

    def __init__(self, config):
        super().__init__()
        self.config, self.vocab_size, self.d_model = config, config.vocab_size, config.d_model
        self.loop = config.loop or (0, len(config.pattern) - 1)
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(kind, config) for kind in config.pattern)
        self.norm = RMSNorm(config.d_model)
        self.head = linear(config.d_model, config.vocab_size)

    @property
    def dtype(self):
        """Precision of the weights, and of h."""
        return self.head.weight.dtype

    @property
    def device(self):
        """Where the weights are."""
        return self.head.weight.device

    def initial_state(self, batch_size):
        """Return an :class:`LMState` with empty caches and fast weights of zeros, on the model's device."""
        c, weight = self.config, self.head.weight
        shape = (integer("batch_size", batch_size, 1), c.num_heads, c.K, c.V)
        wide = torch.promote_types(torch.float32, weight.dtype)
        zeros = dict(dtype=wide, device=weight.device)  # whole tensors, also where the weight is in parts
        return LMState(tuple(None if k == "a" else torch.zeros(shape, **zeros) for k in c.pattern))

    def fast_parameters(self):
        """The parameters of the mixer, and of the norm before it, in every block with a fast weight."""
        fast = [b for b in self.modules() if isinstance(b, Block) and isinstance(b.mixer, GatedDeltaNet)]
        return [p for block in fast for part in (block.mixer_norm, block.mixer) for p in part.parameters()]

    def embed(self, tokens):
        """Map tokens (B, T), int64, to h (B, T, D)."""
        self.check_tokens(tokens)
        return self.embedding(tokens)

    def readout(self, h):
        """Map h (B, T, D) to logits (B, T, vocab)."""
        self.check_h(h)
        return self.head(self.norm(h))

    def save(self, folder):
        """Write ``config.json`` and ``model.safetensors`` to `folder`, each whole or not at all."""
        folder = Path(folder)
        weights = save({k: v.contiguous() for k, v in self.state_dict().items()})
        write_atomically(folder / "model.safetensors", weights)
        text = json.dumps(dataclasses.asdict(self.config), indent=1)
        write_atomically(folder / "config.json", text.encode())

    @classmethod
    def from_checkpoint(cls, folder):
        """Read a model that :meth:`save` has written, from its folder.

        A name such as "rule110-quick/N4-seed0" finds one of the models that come with the book.

        Raises
        ------
        FileNotFoundError
            If `folder` holds no checkpoint.
        ValueError
            If a file is damaged, or belongs to another kind of model.
        """
        own = Path(folder).is_dir() or Path(folder).is_absolute()
        folder = Path(folder) if own else kept_model_path(folder, "folder")
        config_file, weights_file = folder / "config.json", folder / "model.safetensors"
        for file in (config_file, weights_file):
            if not file.is_file():
                raise FileNotFoundError(f"folder: {file} is missing; not a checkpoint of HybridLM.save")
        try:
            model = cls(cls.config_class(**json.loads(config_file.read_text())))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"folder: {config_file} is not a {cls.config_class.__name__}: {error}"
            ) from error
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
