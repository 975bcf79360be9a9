"""A pretrained model as the frozen value that an experiment keeps in place of a ModelConfig."""

from dataclasses import dataclass

from ..checks import integer
from ..tasks.gsm_infinite.tokens import padding
from .adapter import Insert
from .files import read_json
from .loading import load, load_tokenizer, resolve
from .lora import LoRA
from .published import PUBLISHED, on_meta


@dataclass(frozen=True)
class PretrainedConfig:
    """Which pretrained model an experiment fine-tunes, and how it is prepared for sleep.

    Parameters
    ----------
    source : str
        ``"owner/name"`` of a repository, or a folder, see :func:`load`.
    vocab_size : int
        Rows of its embedding, so that a task can be checked against it before anything is loaded.
    padding : int, optional
        If absent, what :class:`TokenizedGSM` pads with: the tokenizer's padding, or else its end of text, or
        else 0; for a model that was saved, what it was saved with.
    loop, insert, lora, dtype, revision, trust_remote_code, backend
        As :func:`load` takes them.

    Chapter: 16_pretrained
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
        """Load the model; ValueError if its vocabulary does not have the size that is stated here."""
        found, options = self._found(), self._settings()
        if self.padding is None and not found.saved:
            tokenizer = load_tokenizer(found.base, found.trust[0])
            options["padding"] = None if tokenizer is None else padding(tokenizer)
        options |= {k: getattr(self, k) for k in ("dtype", "revision", "trust_remote_code", "backend")}
        model = load(self.source, **options)
        if model.vocab_size != self.vocab_size:
            raise ValueError(
                f"model.vocab_size is {self.vocab_size}; {self.source} has {model.vocab_size} tokens"
            )
        return model

    def on_meta(self):
        """The model without numbers, which needs no weights: what it costs can be counted on it."""
        config, options, saved = PUBLISHED.get(self.source), self._settings(), False
        if config is None:
            found = self._found()
            config = read_json(found.base / "config.json", "it is no folder of a model of transformers")
            options, saved = found.settings, found.saved
        if options["padding"] is None and not saved:
            options["padding"] = 0  # some token will be padding; which one does not change the cost
        return on_meta(config, dtype=self.dtype, **options)

    def _settings(self):
        return {name: getattr(self, name) for name in ("loop", "insert", "lora", "padding")}

    def _found(self):
        return resolve(self.source, self.revision, self.trust_remote_code, weights=False, **self._settings())
