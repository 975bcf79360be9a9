"""Low-rank differences on every projection of the original, by peft: what a small GPU can train."""

from dataclasses import dataclass

from torch import nn

from ..checks import finite_number, integer


@dataclass(frozen=True)
class LoRA:
    """Low-rank differences: each projection W of the original becomes ``W + alpha / rank * B A``.

    Parameters
    ----------
    rank : int
        Rows of A and columns of B.
    alpha : float
        The factor, before it is divided by `rank`.

    Notes
    -----
    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.

    Chapter: 16_pretrained
    """

    rank: int = 16
    alpha: float = 32.0

    def __post_init__(self):
        object.__setattr__(self, "rank", integer("lora.rank", self.rank, 1))
        object.__setattr__(self, "alpha", finite_number("lora.alpha", self.alpha, least=0))


def add_lora(model, lora):
    """Wrap every projection in the original's layers; their weights freeze, what is inserted still learns.

    The routed experts of a mixture are no projections: they freeze, and get no low-rank differences.

    Parameters
    ----------
    model : PretrainedLM
    lora : LoRA

    Chapter: 16_pretrained
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("lora needs peft: pip install 'sleeplib[pretrained]'") from error
    if model.lora is not None:
        raise ValueError("lora: the model has low-rank differences already")
    names = [
        name
        for name, module in model.layers.named_modules()
        if isinstance(module, nn.Linear) and not model.is_added(f"layers.{name}")
    ]
    # Into the list of layers: it has no configuration that would let peft choose more.
    inject_adapter_in_model(
        LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=names), model.layers
    )
    model.lora = lora
    model.learn("all")


def without_lora(state):
    """A state dict as it would be without the differences, under the original's own names."""
    return {k.replace(".base_layer.", "."): v for k, v in state.items() if ".lora_" not in k}
