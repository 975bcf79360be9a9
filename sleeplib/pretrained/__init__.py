"""Sleep for models that people already have: pretrained hybrids, and transformers that learn to sleep."""

from .adapter import FAMILIES, Insert, PretrainedLM, family
from .blocks import AttentionBlock, Block, DeltaBlock
from .hybrids import Plain
from .jet import JetNemotron
from .ouro import Ouro

__all__ = ["FAMILIES", "AttentionBlock", "Block", "DeltaBlock", "Insert", "JetNemotron", "Ouro", "Plain"]
__all__ += ["PretrainedLM", "family"]
