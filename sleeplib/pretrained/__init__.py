"""Sleep for models that people already have: pretrained hybrids, and transformers that learn to sleep."""

from .adapter import FAMILIES, Insert, PretrainedLM, family
from .blocks import AttentionBlock, Block, DeltaBlock
from .hybrids import Plain

__all__ = ["FAMILIES", "AttentionBlock", "Block", "DeltaBlock", "Insert", "Plain", "PretrainedLM", "family"]
