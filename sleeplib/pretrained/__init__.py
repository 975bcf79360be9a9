"""Sleep for models that people already have: pretrained hybrids, and transformers that learn to sleep."""

from .adapter import FAMILIES, Insert, PretrainedLM, family
from .blocks import AttentionBlock, Block, DeltaBlock
from .config import PretrainedConfig
from .hybrids import Plain
from .loading import adapt, load, save
from .lora import LoRA, add_lora
from .text import TokenizedGSM, write

__all__ = ["FAMILIES", "AttentionBlock", "Block", "DeltaBlock", "Insert", "LoRA"]
__all__ += ["Plain", "PretrainedConfig", "PretrainedLM", "TokenizedGSM", "adapt", "add_lora", "family"]
__all__ += ["load", "save", "write"]
