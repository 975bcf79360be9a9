"""GSM-Infinite: school arithmetic in a story of any length, most of which is beside the point."""

import random
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
import torch

from ...checks import integer
from ..base import IGNORE, Batch, ContextTask, check_batch_request, check_pair, score
from .chance import LEVELS, MODES, estimate_chance, target_words
from .language import THEMES, WORDS, vocabulary
from .problem import check_possible, draw_problem, draw_until
from .solver import solve_text
from .tokens import padding, reader

BOUNDS = {"ops": (1, 30), "tokens": (1, 1_000_000), "places": (1, 8), "kinds": (1, 8), "noise": (0, 24)}
LINE, EDGE = 18, 8  # most tokens that a parameter and an edge take in a solution


@dataclass(frozen=True)
class GSMInfinite(ContextTask):
    """Arithmetic in a long story (section 6.3 of the paper), after GSM-Infinite, arXiv 2502.05252.

    Places hold kinds of a thing; at level "hard" each thing also holds parts.  Each of these numbers has a
    sentence that gives it or defines it from others; the totals of a place have none: the reader must sum.  A
    problem asks for one of the numbers (forward), or reveals it and asks for a constant that it hangs on
    (reverse).  Distractors, in other names, fill the story: they may build on the numbers that matter, never
    the other way round.

    A sequence is padded on the left to ``tokens[1]``, then ``<answer>`` asks for one label, in the last
    window.  Two operations, ``tokens=(30, 40)``, ``window=10``: four windows to sleep on, one token awake::

        position  0        <pad>
                  1 .. 10  What is the total number of boats in Brinemouth ?
                 11 .. 29  The number of spotted boats in Jettymoor equals 2 more than the number of red boats
                           in Brinemouth .                                                (a distractor)
                 30 .. 39  The number of red boats in Brinemouth equals 3 .               (one operation)
                 40        <answer>      label 3: the total, a sum of one number          (one operation)

    With ``solution`` the steps come first: ``<solution>`` at ``tokens[1]``, the steps, ``<answer>`` and
    padding to a fixed length; all of it is labelled but the padding, and fed as it should have been answered.

    Parameters
    ----------
    ops : tuple of (int, int)
        Fewest and most operations.
    tokens : tuple of (int, int)
        Fewest and most tokens of question and context.
    theme : str or None
        "harbor", "orchard" or "library"; None draws one for each problem, as with mode and level.
    mode : {"forward", "reverse"} or None
    level : {"medium", "hard"} or None
    question_first : bool
        Whether the question comes before the context or after it.
    window : int
        L, tokens between naps.
    solution : bool
        Whether to ask for the steps before the answer.
    places, kinds : tuple of (int, int)
        Fewest and most places in the structure graph, and kinds that these draw from, at most 8.
    noise : tuple of (int, int)
        How many names of places and of kinds distractors are about, at most 24 each.
    max_value : int
        No number of a problem is larger, 4 to 1000.

    Raises
    ------
    TypeError, ValueError
        If a setting is not of its type, or no problem fits the settings; the message names the setting.

    Notes
    -----
    The op count is the number of edges of the graph that the query hangs on: a parameter adds one for each
    other that its formula needs and one for a constant drawn at random; an abstract one adds all the counts
    of its place, and twice as many where it sums counts times averages.  A formula is a constant from 1 to 4,
    another parameter, "c more than" or "c times" one, the difference of two or the sum of two to four.  Our
    readings: the copy of one parameter is a formula of one edge (else only a total could have two
    operations), level "hard" also has totals of things, and a query is abstract half of the time.  Draws that
    do not meet the op count, the length or the range of values are drawn again.

    Each number is one token, so that an answer is one label and ``exact`` needs no decoding; a smaller
    `max_value` keeps a small vocabulary.  The split depends on the problem without its distractors, in any
    order: one in eight is never seen in training, whatever stands around it.  Where places and kinds are so
    few that only some dozens of such problems exist, the answers of the two splits differ; chance is that of
    the test split.

    Chapter: 13_gsm_infinite
    """

    ops: tuple = (1, 8)
    tokens: tuple = (2000, 3300)
    theme: str | None = None
    mode: str | None = None
    level: str | None = None
    question_first: bool = True
    window: int = 2000
    solution: bool = False
    places: tuple = (1, 5)
    kinds: tuple = (1, 5)
    noise: tuple = (16, 16)
    max_value: int = 1000

    def __post_init__(self):
        for name, (low, high) in BOUNDS.items():
            value = check_pair(name, getattr(self, name))
            object.__setattr__(self, name, value)  # a list, as in a run record, will do
            if not all(low <= n <= high for n in value) or name != "noise" and value[0] > value[1]:
                order = "" if name == "noise" else ", the smaller first"
                raise ValueError(f"{name} must lie in {low} .. {high}{order}; got {value!r}")
        for name, (low, high) in {"window": (1, 1_000_000), "max_value": (4, 1000)}.items():
            object.__setattr__(self, name, integer(name, getattr(self, name), low, high))
        for name, known in {"theme": tuple(THEMES), "mode": MODES, "level": LEVELS}.items():
            if getattr(self, name) not in (None, *known):
                raise ValueError(
                    f"{name} must be None or one of {', '.join(known)}; got {getattr(self, name)!r}"
                )
        for name in ("question_first", "solution"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False; got {getattr(self, name)!r}")
        first = self.tokens[1]
        if first // self.window != (self.length - 1) // self.window:
            raise ValueError(
                f"window={self.window} cuts the solution: tokens {first} .. {self.length - 1} of a sequence "
                "must lie in one window"
            )
        self._check_possible()

    @property
    def modes(self):
        """The modes that are drawn."""
        return (self.mode,) if self.mode else MODES

    @property
    def levels(self):
        """The levels that are drawn."""
        return (self.level,) if self.level else LEVELS

    @property
    def themes(self):
        """The themes that are drawn."""
        return (self.theme,) if self.theme else tuple(THEMES)

    @property
    def vocab(self):
        """The closed vocabulary: marks, the words that these settings can produce, the numbers."""
        sizes = self.places[1], self.kinds[1], self.noise, self.max_value
        return vocabulary(self.themes, self.levels, self.modes, *sizes, self.solution)

    @property
    def context(self):
        """Tokens of question and context, padding included, before the mark that asks."""
        return self.tokens[1]

    @property
    def length(self):
        """T, tokens in a sequence of the closed vocabulary."""
        steps = self.ops[1] * (LINE + EDGE) + LINE + 1 if self.solution else 0
        return self.tokens[1] + 1 + steps

    def problem(self, rng, split="train", tokenizer=None):
        """Draw one problem in words.

        Parameters
        ----------
        rng : numpy.random.Generator
        split : {"train", "test"}
        tokenizer : object, optional
            Counts the tokens: anything with ``encode(text)``, or a callable.  Default: the closed vocabulary.

        Returns
        -------
        Problem

        Raises
        ------
        TypeError, ValueError
            If the tokenizer does not fit, or no problem of its tokens fits the settings.
        """
        check_batch_request(1, rng, split)
        draw = random.Random(int(rng.integers(1 << 63)))
        mode, ops = draw.choice(self.modes), draw.randint(*self.ops)
        return self._draw(draw, split, mode, ops, self._reader(tokenizer))

    def join(self, question, context):
        """Put a question and a context, both str, into one str in the order of `question_first`."""
        return f"{question} {context}" if self.question_first else f"{context} {question}"

    def encode(self, problem, tokenizer=None):
        """Write a problem in tokens.

        Parameters
        ----------
        problem : Problem
        tokenizer : object, optional
            Default: the closed vocabulary.

        Returns
        -------
        tuple of three lists of int
            Question and context; the mark that asks; what should be answered.

        Raises
        ------
        TypeError, ValueError
            If the tokenizer does not fit.
        """
        return self._encode(problem, self._reader(tokenizer))

    def batch(self, count, rng, split="train", tokenizer=None):
        """Draw `count` sequences, which share the modes and op counts evenly.

        Parameters
        ----------
        count : int
            B.
        rng : numpy.random.Generator
        split : {"train", "test"}
        tokenizer : object, optional
            Default: the closed vocabulary.  With another, T is ``tokens[1]`` plus what the mark and the
            longest answer of the batch take, less one; padding is the tokenizer's own, its end of text, or 0.

        Returns
        -------
        Batch
            ``groups`` holds the op count where something is asked; elsewhere 0 in forward and 1 in reverse
            rows.

        Raises
        ------
        TypeError, ValueError
            If the tokenizer does not fit, or no problem of its tokens fits the settings.
        """
        count, ids = check_batch_request(count, rng, split), self._reader(tokenizer)
        cells = list(product(self.modes, range(self.ops[0], self.ops[1] + 1)))
        order, seeds = rng.permutation(len(cells)), rng.integers(1 << 63, size=count)
        problems, rows = [], []
        for i, seed in enumerate(seeds):
            mode, ops = cells[order[i % len(cells)]]
            problems.append(self._draw(random.Random(int(seed)), split, mode, ops, ids))
            rows.append(self._encode(problems[-1], ids))
        first, width = self.tokens[1], self.length
        if ids:
            width = first + max(len(cue) + len(targets) for _, cue, targets in rows) - 1
        inputs = np.full((count, width), padding(tokenizer), dtype=np.int64)
        labels = np.full_like(inputs, IGNORE)
        groups = np.zeros_like(inputs)
        for row, (prompt, cue, targets), problem in zip(range(count), rows, problems):
            told = [*prompt, *cue, *targets[:-1]]
            inputs[row, first - len(prompt) : first - len(prompt) + len(told)] = told
            asked = slice(first + len(cue) - 1, first + len(cue) - 1 + len(targets))
            labels[row, asked] = targets
            groups[row] = problem.mode == "reverse"
            groups[row, asked] = problem.ops
        return Batch(*map(torch.from_numpy, (inputs, labels, groups)))

    def solve(self, inputs):
        """Answer from the visible tokens alone, by reading them as English (not by the generator's graph).

        Parameters
        ----------
        inputs : torch.Tensor of int64, shape (B, T)
            In the closed vocabulary.

        Returns
        -------
        torch.Tensor of int64, shape (B, T)
            Labels, -100 where nothing is asked.

        Raises
        ------
        TypeError, ValueError
            If `inputs` are not tokens of this task, or a text cannot be read.
        """
        inputs = self._check_inputs(inputs)
        labels, vocab, first = torch.full_like(inputs, IGNORE), self.vocab, self.tokens[1]
        for row, wanted in zip(inputs.tolist(), labels):
            words = [vocab[i] for i in row]
            text = " ".join(word for word in words[:first] if word != "<pad>")
            last = words.index("<answer>") if "<answer>" in words else -1
            if last < first:
                raise ValueError(f"inputs must show <answer> at position {first} or, after a solution, later")
            wanted[first:last] = torch.tensor(row[first + 1 : last + 1])
            wanted[last] = vocab.index(str(solve_text(text)))
        return labels

    def chance(self):
        """Score of the commonest answer for the mode and the op count, whatever the context says.

        Returns
        -------
        dict of str to float
            The keys of :meth:`score`, from a fixed sample of the test split, drawn once.  With `solution` it
            is the commonest token, which never gets all steps right.
        """
        return dict(estimate_chance(self))

    def score(self, logits, batch):
        """Score logits (B, T, vocab), or only those of labels (labels, vocab), on a batch.

        Returns
        -------
        dict of str to float
            ``loss`` (nats per label), ``token`` (accuracy per label) and ``exact`` (rows all right); loss and
            exact also for each op count, as in ``exact/3``, and for each mode with it, as in
            ``exact/reverse-3``, where the batch has such rows.
        """
        result = score(logits, batch)
        if batch.groups is None:
            return result
        reverse = (batch.groups == 1) & (batch.labels == IGNORE)
        cells = batch.groups + 100 * reverse.any(dim=1, keepdim=True)
        for key, value in score(logits, batch._replace(groups=cells)).items():
            name, _, cell = key.partition("/")
            if cell:
                result[f"{name}/{MODES[int(cell) // 100]}-{int(cell) % 100}"] = value
        return result

    def _check_possible(self):
        check_possible(self)

    def _reader(self, tokenizer):
        """Text to ids by a tokenizer, or None for the closed vocabulary."""
        if tokenizer is None:
            return None
        names = (names for t in self.themes for names in (THEMES[t].places, THEMES[t].kinds))
        return reader(tokenizer, [word for words in names for word in words])

    def _draw(self, draw, split, mode, ops, ids=None):
        cell = dict(mode=mode, ops=ops, level=draw.choice(self.levels), theme=draw.choice(self.themes))
        return draw_until(draw_problem, draw, self, split, ids=ids, **cell)

    def _encode(self, problem, ids):
        text = self.join(problem.question, problem.context)
        if ids:
            end = f" {problem.answer}"
            if self.solution:
                return ids(text), ids(" Solution:"), ids(f" {problem.solution} Answer:{end}")
            return ids(text), ids(" Answer:"), ids(end)
        index = _index(self.vocab)
        targets = [index[word] for word in target_words(self, problem)]
        cue = index["<solution>" if self.solution else "<answer>"]
        return [index[word] for word in WORDS.findall(text)], [cue], targets


@lru_cache
def _index(vocab):
    return {word: i for i, word in enumerate(vocab)}
