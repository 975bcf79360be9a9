"""GSM-Infinite in the tokens of a pretrained model."""

import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F

from ..checks import integer
from ..sleeper import Sleeper
from ..tasks import GSMInfinite
from ..tasks.base import IGNORE
from ..tasks.gsm_infinite.chance import gather, sample_targets
from ..tasks.gsm_infinite.solver import solve_text
from ..tasks.gsm_infinite.tokens import padding
from .files import fetch
from .loading import check_tokenizer, load_tokenizer


@dataclass(frozen=True)
class TokenizedGSM(GSMInfinite):
    """GSM-Infinite in the tokens of a pretrained model, as in the paper's third experiment.

    Lengths are counted in the model's tokens.  A sequence is padded on the left to ``tokens[1]``, then
    " Answer:" asks; after the answer comes padding, up to ``tokens[1] + room``.  Steps are not asked for.

    Parameters
    ----------
    source : str
        Whose tokenizer: ``"owner/name"`` of a repository or a folder.
    vocab_size : int
        Rows of the model's embedding.
    room : int
        Tokens for the mark that asks, and for the answer.
    revision : str, optional
        Of the repository.  If absent, its default branch; give the one from which the model is loaded.

    Raises
    ------
    TypeError, ValueError, OSError
        If a setting does not fit, or there is no such tokenizer; the message names the setting.

    Notes
    -----
    The other parameters are those of :class:`GSMInfinite`.

    Chapter: 16_pretrained
    """

    source: str = ""
    vocab_size: int = 0
    room: int = 12
    revision: str | None = None

    def __post_init__(self):
        for name in ("vocab_size", "room"):
            object.__setattr__(self, name, integer(name, getattr(self, name), 1))
        if self.solution:
            raise ValueError("solution must be False: a pretrained model is asked for the answer alone")
        super().__post_init__()

    def _check_possible(self):
        """Check nothing: it takes the tokenizer to count, so the first batch says if such problems exist."""

    @property
    def length(self):
        """T, tokens in a sequence."""
        return self.tokens[1] + self.room

    @cached_property
    def tokenizer(self):
        """The tokenizer, loaded when it is first asked for."""
        return tokenizer_of(self.source, self.vocab_size, self.revision)

    def batch(self, count, rng, split="train"):
        """Draw `count` sequences by a numpy Generator, see :meth:`GSMInfinite.batch`."""
        batch = super().batch(count, rng, split, tokenizer=self.tokenizer)
        missing = self.length - batch.inputs.shape[1]
        if missing < 0:
            raise ValueError(f"room: question and answer take {self.room - missing} tokens; got {self.room}")
        fillers = padding(self.tokenizer), IGNORE, 0
        return type(batch)(*(F.pad(x, (0, missing), value=fill) for x, fill in zip(batch, fillers)))

    def chance(self):
        """Score of the commonest answer for the mode and the op count: dict of str to float."""
        return dict(_chance(self))

    def solve(self, inputs):
        """Answer by reading the tokens as English, see :meth:`GSMInfinite.solve`."""
        inputs, encode = self._check_inputs(inputs), self._reader(self.tokenizer)
        labels, first, filler = torch.full_like(inputs, IGNORE), self.tokens[1], padding(self.tokenizer)
        cue = encode(" Answer:")
        asked = first + len(cue) - 1
        for row, wanted in zip(inputs.tolist(), labels):
            if row[first : asked + 1] != cue:
                raise ValueError(f"inputs must ask at position {first}")
            answer = solve_text(self.tokenizer.decode([i for i in row[:first] if i != filler]))
            targets = torch.tensor(encode(f" {answer}"))
            wanted[asked : asked + len(targets)] = targets
        return labels


@lru_cache
def tokenizer_of(source, vocab_size, revision=None):
    """The tokenizer of a source, fetched without weights; an error if there is none, or it does not fit."""
    tokenizer = load_tokenizer(folder := fetch(source, revision, weights=False))
    if tokenizer is None:
        raise FileNotFoundError(f"source: {folder} holds no tokenizer (tokenizer.json)")
    check_tokenizer(tokenizer, vocab_size)
    return tokenizer


@lru_cache
def _chance(task):
    """Score of guessing each token of the answer by how common it is after those before it."""
    cells = {}
    for cell, targets in sample_targets(task).items():
        texts = [f" {word}" for (word,) in targets]
        answers = Counter(tuple(task.tokenizer.encode(x, add_special_tokens=False)) for x in texts)
        after = {}
        for answer, count in answers.items():
            for i, token in enumerate(answer):
                after.setdefault(answer[:i], Counter())[token] += count
        total = sum(counter.total() for counter in after.values())
        loss = -sum(n * math.log(n / c.total()) for c in after.values() for n in c.values()) / total
        token = sum(max(counter.values()) for counter in after.values()) / total
        cells[cell] = dict(loss=loss, token=token, exact=max(answers.values()) / answers.total())
    return gather(task, cells)


def write(model, text, count, *, window, passes=1, eviction="hard"):
    """Read a text, with a nap whenever a window is full, and go on greedily until an end of text or `count`.

    Parameters
    ----------
    model : PretrainedLM
        With a tokenizer.
    text : str
    count : int
        The most tokens to write.
    window, passes, eviction
        As :class:`Sleeper` takes them.

    Returns
    -------
    str
        What was written, without the mark at its end.

    Raises
    ------
    ValueError
        If the model came without a tokenizer, or there is nothing to read.

    Chapter: 16_pretrained
    """
    count, tokenizer = integer("count", count, 1), model.tokenizer
    if tokenizer is None:
        raise ValueError("model: it came without a tokenizer; feed tokens to a Sleeper")
    tokens = tokenizer(text, return_tensors="pt").input_ids.to(model.device)
    if not tokens.numel():
        raise ValueError("text: there is nothing to read")
    sleeper = Sleeper(model, window=window, passes=passes, eviction=eviction)
    sleeper.feed(tokens)
    written = []
    while len(written) < count and (token := int(sleeper.generate(1))) != tokenizer.eos_token_id:
        written.append(token)
    return tokenizer.decode(written)
