"""A pretrained model as the frozen value that an experiment keeps, in the place of a ModelConfig."""

from dataclasses import dataclass

from ..checks import integer
from .adapter import Insert
from .loading import load
from .lora import LoRA


@dataclass(frozen=True)
class PretrainedConfig:
    """Which pretrained model an experiment fine-tunes, and how it is made ready for sleep.

    Parameters
    ----------
    source : str
        ``"owner/name"`` of a repository, or a folder, see :func:`load`.
    vocab_size : int
        Rows of its embedding, so that a task can be checked against it before anything is loaded.
    loop, insert, lora, padding, dtype, revision, trust_remote_code, backend
        As :func:`load` takes them.

    Chapter: 06_hybrid
    """

    source: str
    vocab_size: int
    loop: tuple[int, int] | None = None
    insert: Insert | None = None
    lora: LoRA | None = None
    padding: int | None = None
    dtype: str = "float32"
    revision: str | None = None
    trust_remote_code: bool = False
    backend: str = "auto"

    def __post_init__(self):
        object.__setattr__(self, "vocab_size", integer("vocab_size", self.vocab_size, 1))

    def build(self):
        """Load the model; ValueError if its vocabulary is not of the size that is stated here."""
        names = "loop insert lora padding dtype revision trust_remote_code backend".split()
        model = load(self.source, **{name: getattr(self, name) for name in names})
        if model.vocab_size != self.vocab_size:
            raise ValueError(
                f"model.vocab_size is {self.vocab_size}; {self.source} has {model.vocab_size} tokens"
            )
        return model
