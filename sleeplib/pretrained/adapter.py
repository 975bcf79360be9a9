"""A pretrained model behind the interface of sleep: its own modules, run with their memory exposed."""

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import nn

from ..checks import block_range, integer
from ..interface import Sleepable
from ..kernels import BACKENDS
from ..layers import GatedDeltaNet, RMSNorm
from ..state import LMState
from .blocks import keep_real

FAMILIES = {}  # config.model_type -> subclass of PretrainedLM


@dataclass(frozen=True)
class Insert:
    """Layers of fast weights to insert between those of a model that has too few, or none.

    Parameters
    ----------
    after : tuple of int
        Numbers of the original's layers, from 0, after each of which a new one is inserted.
    num_heads, key_size, value_size : int
        H, K and V of each.
    dynamic : bool
        Whether they are Jet layers, like those the paper puts into Ouro; else gated delta layers.
    conv_taps : int
        Length of their convolutions.

    Notes
    -----
    Section 6.3 of the paper: six Jet layers without a feed-forward layer of their own.

    Chapter: 16_pretrained
    """

    after: tuple[int, ...]
    num_heads: int
    key_size: int
    value_size: int
    dynamic: bool = True
    conv_taps: int = 4

    def __post_init__(self):
        for name in ("num_heads", "key_size", "value_size", "conv_taps"):
            object.__setattr__(self, name, integer(f"insert.{name}", getattr(self, name), 1))
        after = self.after if isinstance(self.after, (tuple, list)) else (self.after,)
        after = tuple(integer("insert.after", i, 0) for i in after)
        if not after or list(after) != sorted(set(after)):
            raise ValueError(f"insert.after must be layers, each once, in order; got {self.after!r}")
        object.__setattr__(self, "after", after)


class InsertedBlock(nn.Module):
    """A layer of fast weights of our own between two layers of the original; it starts as the identity.

    It computes in the precision of its own weights, even where those of the original are bfloat16.  If
    `padded`, rows of h that are zero are padding, and stay so.

    Chapter: 16_pretrained
    """

    def __init__(self, d_model, insert, backend="auto", padded=False):
        super().__init__()
        self.padded = padded
        self.fast_shape = insert.num_heads, insert.key_size, insert.value_size
        self.mixer_norm = RMSNorm(d_model)
        options = dict(taps=insert.conv_taps, dynamic=insert.dynamic, backend=backend)
        self.mixer = GatedDeltaNet(d_model, *self.fast_shape, **options)

    def forward(self, h, memory, sliding_window=None, write_only=False):
        """Map h (B, T, D) and this block's memory to the next h, None if `write_only`, and memory."""
        real = h.ne(0).any(-1) if self.padded else None
        x = self.mixer_norm(h.to(self.mixer_norm.weight.dtype))
        y, memory = self.mixer(x, memory, sliding_window, write_only, real)
        return None if write_only else h + keep_real(y.to(h.dtype), real), memory


class PretrainedLM(Sleepable, nn.Module, ABC):
    """A decoder of Hugging Face's transformers that can be put to sleep.

    Embedding, norms, projections and feed-forward layers are the original's own modules, called as such, so
    whatever wraps or hooks them still takes effect.  Attention, convolutions and recurrences are ours, so
    that keys, contexts and fast weights go in and come out, and gradients flow through them.

    Parameters
    ----------
    original : transformers.PreTrainedModel
        A causal language model; its modules are shared, not copied.
    loop : tuple of (int, int), optional
        First and last of the original's layers, from 0 and both included, that repeated passes run through; a
        layer that is inserted after one of them is part of the loop.  If absent, the family's own choice.
    insert : Insert, optional
        Layers of fast weights to add.
    padding : int, optional
        A token that is padding wherever it occurs: nobody attends to it, and it writes nothing.  Every other
        token is read; if absent, every token is.
    backend : str
        Backend of the recurrences, see :func:`gated_delta_rule`.

    Attributes
    ----------
    original : transformers.PreTrainedModel
        Not a submodule: parameters have the names of this class's modules.

    Notes
    -----
    Padding is a row of h that is zero.  :meth:`embed` makes it so, every block keeps it so, and what a block
    remembers of it is an age below 0 in :class:`Memory`, which no query sees.  So it needs no argument of its
    own on the way through sleep.

    A family says how it is run by overriding :meth:`make_blocks` and, if need be, other methods.

    Chapter: 16_pretrained
    """

    def __init__(self, original, *, loop=None, insert=None, padding=None, backend="auto"):
        super().__init__()
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
        object.__setattr__(self, "original", original)
        self.lora = self.tokenizer = self.source = None
        body = original.get_decoder()
        self.config = body.config
        self.vocab_size, self.d_model = self.config.vocab_size, self.config.hidden_size
        self.padding = None if padding is None else integer("padding", padding, 0, self.vocab_size - 1)
        self.embedding, self.head = original.get_input_embeddings(), original.get_output_embeddings()
        self.norm = body.norm
        if self.head.weight is self.embedding.weight:  # one tensor, one name
            self.register_state_dict_post_hook(_forget_head)
            self.register_load_state_dict_pre_hook(_recall_head)
        self.rotary = getattr(body, "rotary_emb", None)  # a submodule: it moves along to another device
        own = self.make_blocks(body, padded=padding is not None, backend=backend)
        loop = self.default_loop(len(own)) if loop is None else loop
        self.native_loop = block_range("loop", loop, len(own))
        self.insert = insert
        blocks, places = [], []
        if insert is not None and insert.after[-1] >= len(own):
            raise ValueError(f"insert.after must lie in 0 .. {len(own) - 1}; got {insert.after}")
        for i, block in enumerate(own):
            places.append(len(blocks))
            blocks.append(block)
            if insert is not None and i in insert.after:
                added = InsertedBlock(self.d_model, insert, backend, padded=padding is not None)
                blocks.append(added.to(self.device, torch.promote_types(torch.float32, self.dtype)))
        places.append(len(blocks))
        self.layers = nn.ModuleList(blocks)
        first, last = self.native_loop
        self.loop = places[first], places[last + 1] - 1

    @abstractmethod
    def make_blocks(self, body, *, padded, backend):
        """One block for each decoder layer of `body`: a list of modules with a ``fast_shape``."""

    def default_loop(self, depth):
        """The layers that passes repeat if no loop is given: all `depth` of them."""
        return 0, depth - 1

    @property
    def dtype(self):
        """Precision of the original's weights, and of h."""
        return self.embedding.weight.dtype

    @property
    def device(self):
        """Where the weights are."""
        return self.embedding.weight.device

    @property
    def inserted(self):
        """The blocks that were added: a list."""
        return [block for block in self.layers if isinstance(block, InsertedBlock)]

    def initial_state(self, batch_size):
        """Return an :class:`LMState` with empty caches and zero fast weights, on the model's device."""
        rows, wide = integer("batch_size", batch_size, 1), torch.promote_types(torch.float32, self.dtype)
        shapes = [block.fast_shape for block in self.layers]
        options = dict(dtype=wide, device=self.device)
        return LMState(tuple(x and torch.zeros(rows, *x, **options) for x in shapes))

    def embed(self, tokens):
        """Look up tokens (B, T), int64, to h (B, T, D); padding is zero."""
        self.check_tokens(tokens)
        h = self.embedding(tokens)
        return h if self.padding is None else h.masked_fill((tokens == self.padding).unsqueeze(-1), 0)

    def readout(self, h):
        """Map h (B, T, D) to logits (B, T, vocab)."""
        self.check_h(h)
        return self.head(self.norm(h))

    def is_added(self, name):
        """Whether the parameter or module of this name is not part of the original."""
        number = name.split(".")[1] if name.startswith("layers.") else None
        return ".lora_" in name or number is not None and isinstance(self.layers[int(number)], InsertedBlock)

    def original_parameters(self):
        """The parameters of the original: a list."""
        return [p for name, p in self.named_parameters() if not self.is_added(name)]

    def fast_parameters(self):
        """What the paper trains first: inserted layers or, if there are none, all blocks that hold an S."""
        chosen = self.inserted or [block for block in self.layers if block.fast_shape]
        names = {id(p): name for name, p in self.named_parameters()}
        found = [p for block in chosen for p in block.parameters()]
        return [p for p in found if self.may_learn(names[id(p)])]

    def may_learn(self, name):
        """Whether a parameter is ever trained: low-rank differences learn in place of the original."""
        return self.lora is None or self.is_added(name)

    def save(self, folder):
        """Write the whole model to a folder, see :func:`sleeplib.pretrained.save`."""
        from .loading import save

        save(self, folder)

    def settings(self):
        """What this model is made of besides the original: plain data, as a checkpoint keeps it."""
        insert = self.insert and dataclasses.asdict(self.insert)
        return dict(loop=list(self.native_loop), insert=insert, padding=self.padding)


def _forget_head(model, state, prefix, _):
    state.pop(f"{prefix}head.weight", None)


def _recall_head(model, state, prefix, *_):
    if f"{prefix}embedding.weight" in state:
        state[f"{prefix}head.weight"] = state[f"{prefix}embedding.weight"]


def family(*model_types):
    """Register a subclass of :class:`PretrainedLM` for these values of ``config.model_type``."""

    def enter(cls):
        FAMILIES.update(dict.fromkeys(model_types, cls))
        return cls

    return enter
