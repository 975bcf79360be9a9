"""A rival of sleep: test-time training, gradient descent on the next-token loss of a window.

As in :mod:`sleeplib.baselines`, the model differs in what it does with a window asleep.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from .checks import finite_number, integer
from .kernels import use_numba
from .layers import SwiGLU
from .model import Block, HybridLM, ModelConfig
from .state import LMState


@dataclass(frozen=True)
class TTTConfig(ModelConfig):
    """A transformer that learns each window by heart: N steps of gradient descent on an MLP's weights.

    Parameters
    ----------
    fast_size : int, optional
        Hidden width of the MLP that learns; that of the other MLPs if absent.
    inner_lr : float
        Where the inner learning rate of each of its three matrices starts; the rates are learned too.

    Notes
    -----
    After E2E-TTT (arXiv 2512.23675): the MLPs of the last quarter of the blocks learn (here that of one),
    each beside one that does not; the first weights are trained through the inner steps (second order).  Ours
    differs: hard eviction at a window's end, as in every other arm; N steps a window, not one; the sum of the
    losses, not their mean; learned rates.

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
        """The fast weight that every sequence starts from, (B, 3, D, F)."""
        W = torch.stack((self.first.gate.weight.T, self.first.up.weight.T, self.first.down.weight))
        return W.expand(batch_size, *W.shape)

    def attend(self, h, memory, sliding_window=None):
        """The first half of the block."""
        y, after = self.mixer(self.mixer_norm(h), memory._replace(S=None), sliding_window)
        return h + y, after._replace(S=memory.S)

    def feed(self, h, weights):
        """The second half: both MLPs, the second with the given weights gate, up and down, (B, D, F) each."""
        gate, up, down = weights
        x = self.mlp_norm(h)  # (B, T, D)
        return h + self.mlp(x) + F.silu(x @ gate) * (x @ up) @ down.mT

    def forward(self, h, memory, sliding_window=None, write_only=False):
        """Map h (B, T, D) and this block's memory to the next h and memory."""
        h, memory = self.attend(h, memory, sliding_window)
        return None if write_only else self.feed(h, memory.S.unbind(1)), memory


class TestTimeTrained(HybridLM):
    """A transformer with an MLP that goes on learning while it reads.

    Chapter: 15_argument
    """

    config_class = TTTConfig
    __test__ = False  # not a test class for pytest

    def __init__(self, config):
        super().__init__(config)
        self.layers[-1] = TTTBlock(config)

    def initial_state(self, batch_size):
        """Return an :class:`LMState` with empty caches and the first weights of the MLP that learns."""
        state = super().initial_state(batch_size)
        return replace(
            state, fast_weights=(*state.fast_weights[:-1], self.layers[-1].first_weights(batch_size))
        )

    def fast_parameters(self):
        """The weights that every window's steps start from, and the rates of these steps: a list."""
        return [*self.layers[-1].first.parameters(), self.layers[-1].log_rate]

    def consolidate(self, tokens, state, passes, window=None):
        """Read a window once, and take N steps on the cross-entropy of its tokens 2, 3, ...

        It is a RuntimeError under :class:`torch.inference_mode`, where nothing can learn.
        """
        if torch.is_inference_mode_enabled():
            raise RuntimeError("this model takes gradient steps while it reads: use torch.no_grad")
        h, block = self.embed(tokens), self.layers[-1]
        self.check_state(state, h)
        h, memories = self.run(h, state.blocks(), range(len(self.layers) - 1), window)
        h, memories[-1] = block.attend(h, memories[-1], window)
        weights, rates = memories[-1].S.unbind(1), block.log_rate.exp()
        trained = torch.is_grad_enabled() and any(x.requires_grad for x in (h, rates, *weights))
        # The kernels' gradients have no gradients of their own: what needs those is plain PyTorch.
        with torch.enable_grad(), use_numba(False):
            # A detached state, or weights that are not trained, become leaves to take steps from.
            weights = [W if trained and W.requires_grad else W.detach().requires_grad_() for W in weights]
            for _ in range(passes):
                logits = self.readout(block.feed(h, weights))[:, :-1].flatten(0, 1)
                loss = F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum")
                grads = torch.autograd.grad(loss, weights, create_graph=trained)
                weights = [W - rate * grad for W, rate, grad in zip(weights, rates, grads)]
            S = torch.stack(weights, 1)
        memories[-1] = memories[-1]._replace(S=S if trained else S.detach())
        return LMState.from_blocks(memories, state.position + tokens.shape[1])
