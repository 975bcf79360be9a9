"""Depo: read the edges of a cycle in random order, then say which node lies k hops after another."""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from .base import IGNORE, Batch, check_batch_request, check_ints, score

HELD_OUT = 8  # one cycle in HELD_OUT belongs to the test split


@dataclass(frozen=True)
class Depo:
    """The k-hop task of section 6.2, after Depo1 of Physics of Language Models, part 4.1.

    A directed cycle is shown as its edges, source then destination, shuffled; padding on the left fills the
    context.  Then come queries.  With the cycle n1 -> n3 -> n2 -> n1 and names of one token, asked for
    two hops from n3::

        context   <pad> <pad> N2 N1 N3 N2 N1 N3
        query     <2> N3 <answer> N1              n3 -> n2 -> n1
        label      .  .   N1      .

    A name is a word: tokens ``n..`` that say more follows, then one ``N..`` that ends it.  Only the answer's
    tokens are labels, each at the position before its own.

    Parameters
    ----------
    nodes : int
        Most nodes of a cycle, N.  In training a cycle has n of them, from `fewest` to N, with probability
        proportional to ``1 / (n + sqrt(N))``; at test it has N.
    hops : int
        Most hops K.  In training k is uniform on 1 .. K; at test a power of two.
    letters : int
        Each token of a name is one of so many, twice: to go on, and to end.
    word : (int, int)
        Fewest and most tokens of a name; the number is drawn evenly.
    queries : int
        Queries in a sequence, with distinct starts: ``min(n, queries)`` of them.
    windows : int
        How many windows the context is torn into.
    fewest : int
        Fewest nodes of a cycle in training.

    Notes
    -----
    Our readings: no token marks the beginning, ``<answer>`` itself is not a label, and names are those of
    Depo1.  Queries that do not fit into one window go on in the next; none is torn.  A cycle is held out or
    not by a hash of its edges, one in eight.

    Chapter: 12_depo
    """

    nodes: int = 75
    hops: int = 16
    letters: int = 50
    word: tuple[int, int] = (1, 2)
    queries: int = 10
    windows: int = 4
    fewest: int = 3

    def __post_init__(self):
        low, high = check_ints("word", self.word, 2)
        if not 1 <= low <= high <= 4:
            raise ValueError(f"word must be (fewest, most) tokens, 1 to 4; got {self.word!r}")
        object.__setattr__(self, "word", (low, high))
        limits = (("nodes", 3, 1000), ("hops", 1, 1000), ("letters", 1, 1000), ("queries", 1, 1000))
        for name, least, most in (*limits, ("windows", 1, 1000), ("fewest", 3, self.nodes)):
            (value,) = check_ints(name, (getattr(self, name),), 1)
            if not least <= value <= most:
                raise ValueError(f"{name} must lie in {least} .. {most}; got {value}")
        names = sum(self.letters**size for size in range(low, high + 1))
        # Names are drawn until they differ, which needs some that are left over, of the shortest kind too.
        if names < self.nodes or low == high and self.letters**low < self.nodes:
            raise ValueError(f"letters: {self.letters} give {names} names for {self.nodes} nodes")
        if self.context % self.windows:
            raise ValueError(f"windows must divide {self.context} tokens of edges; got {self.windows}")
        if self.window < self._query:
            raise ValueError(
                f"windows: {self.windows} leave {self.window} tokens each; a query has up to {self._query}"
            )
        if len(self._chunks) > 1 and self.queries > self.fewest:
            raise ValueError(
                f"queries must be at most fewest = {self.fewest}, so that each cycle has as many, or fit "
                f"into a window of {self.window} tokens; got {self.queries} of {self._query} tokens"
            )

    @property
    def vocab(self):
        """The tokens: parts of names, hops, the mark before an answer, padding."""
        parts = [f"{kind}{i}" for kind in "nN" for i in range(self.letters)]
        return (*parts, *(f"<{k}>" for k in range(1, self.hops + 1)), "<answer>", "<pad>")

    @property
    def vocab_size(self):
        """How many tokens there are."""
        return 2 * self.letters + self.hops + 2

    @property
    def context(self):
        """Tokens of edges, padding included."""
        return 2 * self.nodes * self.word[1]

    @property
    def window(self):
        """L, tokens between naps."""
        return self.context // self.windows

    @property
    def length(self):
        """T, tokens in a sequence."""
        return self._chunks[-1][0] + self._chunks[-1][1] * self._query

    @property
    def _query(self):
        """Most tokens of one query."""
        return 2 + 2 * self.word[1]

    @property
    def _chunks(self):
        """Where each chunk of queries begins, and how many it holds."""
        room = max(1, self.window // self._query)
        counts = [min(room, self.queries - i) for i in range(0, self.queries, room)]
        return [(self.context + i * self.window, count) for i, count in enumerate(counts)]

    def batch(self, count, rng, split="train"):
        """Draw `count` sequences; the groups are hops k.

        Parameters
        ----------
        count : int
            B.
        rng : numpy.random.Generator
        split : {"train", "test"}

        Returns
        -------
        Batch
        """
        check_batch_request(count, rng, split)
        sizes, words, lengths = self._cycles(count, rng, split)
        nodes = np.arange(self.nodes)
        rows = np.arange(count)[:, None]
        answer, pad = self.vocab_size - 2, self.vocab_size - 1
        inputs = np.full((count, self.length), pad)
        labels, groups = np.full_like(inputs, IGNORE), np.full_like(inputs, IGNORE)
        shown = np.arange(self.word[1]) < lengths[..., None]  # (B, nodes, tokens): which tokens a name has

        # Node i leads to node i + 1: names are random already.  Edges are shown in random order.
        order = np.where(nodes < sizes[:, None], rng.random((count, self.nodes)), 2.0).argsort(axis=1)
        ends = np.stack((order, (order + 1) % sizes[:, None]), axis=2).reshape(count, -1)
        there = (nodes < sizes[:, None]).repeat(2, axis=1)[..., None] & shown[rows, ends]
        _place(inputs[:, : self.context], words[rows, ends], there, right=True)

        starts = np.where(nodes < sizes[:, None], rng.random((count, self.nodes)), 2.0).argsort(axis=1)
        hops = rng.integers(1, self.hops + 1, (count, self.queries))
        if split == "test":
            hops = 2 ** rng.integers(0, self.hops.bit_length(), (count, self.queries))
        first = 0
        for begin, room in self._chunks:
            some = slice(first, first + room)
            start = starts[:, some]
            goal = (start + hops[:, some]) % sizes[:, None]
            k = hops[:, some, None]
            mark = np.full_like(k, answer)
            tokens = np.concatenate(
                (2 * self.letters - 1 + k, words[rows, start], mark, words[rows, goal]), 2
            )
            always = np.ones_like(k, dtype=bool)
            there = np.concatenate((always, shown[rows, start], always, shown[rows, goal]), 2)
            there &= (np.arange(first, first + start.shape[1]) < sizes[:, None])[..., None]
            asked = np.where(np.arange(self._query) > self.word[1] + 1, tokens, IGNORE)
            part = slice(begin, begin + room * self._query)
            wanted, group = np.full_like(inputs[:, part], IGNORE), np.full_like(inputs[:, part], IGNORE)
            _place(inputs[:, part], tokens, there)
            _place(wanted, asked, there)
            _place(group, np.where(asked == IGNORE, IGNORE, k), there)
            # The answer's tokens are wanted one position before they are read.
            labels[:, begin : part.stop - 1], groups[:, begin : part.stop - 1] = wanted[:, 1:], group[:, 1:]
            first += room
        return Batch(*(torch.from_numpy(x) for x in (inputs, labels, groups)))

    def _cycles(self, count, rng, split):
        """Draw cycles of one split: sizes (B,), names (B, nodes, tokens) and their lengths (B, nodes)."""
        found, missing = [], count
        while missing > 0:
            share = 1 / HELD_OUT if split == "test" else 1 - 1 / HELD_OUT
            n = int(missing / share * 1.1) + 8
            sizes = np.full(n, self.nodes)
            if split == "train":
                choice = np.arange(self.fewest, self.nodes + 1)
                weight = 1 / (choice + math.sqrt(self.nodes))
                sizes = rng.choice(choice, n, p=weight / weight.sum())
            ids, lengths = self._names(n, rng)
            mine = _in_split(ids, sizes, split)
            found.append([x[mine][:missing] for x in (sizes, ids, lengths)])
            missing -= found[-1][0].size
        sizes, ids, lengths = (np.concatenate(x) for x in zip(*found))
        digits = (ids[..., None] // self.letters ** np.arange(self.word[1])) % self.letters
        last = np.arange(self.word[1]) == lengths[..., None] - 1
        return sizes, digits + self.letters * last, lengths

    def _names(self, count, rng):
        """Distinct names for the nodes of each row: numbers in base `letters` and lengths, (count, nodes)."""
        low, high = self.word

        def draw(shape):
            lengths = rng.integers(low, high + 1, shape)
            return rng.integers(0, self.letters**lengths), lengths

        ids, lengths = draw((count, self.nodes))
        while True:
            keys = ids * (high + 1) + lengths
            order = keys.argsort(axis=1, kind="stable")
            ordered = np.take_along_axis(keys, order, axis=1)
            again = np.zeros_like(keys, dtype=bool)
            np.put_along_axis(again, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
            if not again.any():
                return ids, lengths
            ids[again], lengths[again] = draw(int(again.sum()))

    def solve(self, inputs):
        """Answer from the visible tokens alone: read the edges, walk, word by word.

        Parameters
        ----------
        inputs : torch.Tensor of int64, shape (B, T)

        Returns
        -------
        torch.Tensor of int64, shape (B, T)
            Labels, -100 where nothing is asked.
        """
        inputs = torch.as_tensor(inputs)
        if inputs.ndim != 2 or inputs.shape[1] != self.length:
            raise ValueError(f"inputs must have shape (B, {self.length}); got {tuple(inputs.shape)}")
        labels = torch.full_like(inputs, IGNORE)
        number = {text: i for i, text in enumerate(self.vocab)}
        for row, tokens in enumerate(inputs.tolist()):
            texts = [self.vocab[token] for token in tokens]
            names, name = [], ()
            for text in texts[: self.context]:
                if text != "<pad>":
                    name += (text,)
                    if text[0] == "N":
                        names, name = [*names, name], ()
            successor = dict(zip(names[::2], names[1::2], strict=True))
            hops, start = 0, ()
            for position in range(self.context, self.length):
                text = texts[position]
                if text == "<answer>":
                    for _ in range(hops):
                        start = successor[start]
                    for offset, part in enumerate(start):
                        labels[row, position + offset] = number[part]
                elif text[0] == "<" and text != "<pad>":
                    hops, start = int(text[1:-1]), ()
                else:
                    start += (text,)
        return labels

    def chance(self):
        """Score on the test split of a guess among the cycle's nodes, the start left out.

        Returns
        -------
        dict of str to float
            ``loss``, ``token``, ``exact``, and ``loss/<k>``, ``exact/<k>`` for each k asked at test.
            ``token`` is counted on a fixed sample.
        """
        return dict(_chance(self))

    def score(self, logits, batch):
        """Score logits (B, T, vocab), or only those of labels (labels, vocab), on a batch.

        ``exact/<k>`` counts whole answers, ``loss/<k>`` tokens.
        """
        return score(logits, batch)


def _place(target, tokens, there, right=False):
    """Write the tokens that are there (B, ...) side by side into target (B, width), from one side."""
    there, tokens = there.reshape(len(target), -1), tokens.reshape(len(target), -1)
    position = there.cumsum(axis=1) - 1
    if right:
        position += target.shape[1] - there.sum(axis=1, keepdims=True)
    row = np.broadcast_to(np.arange(len(target))[:, None], there.shape)
    target[row[there], position[there]] = tokens[there]


def _in_split(ids, sizes, split):
    """Which cycles belong to a split, by a hash of their edges that does not see where a cycle begins."""
    nodes = np.arange(ids.shape[1])
    after = np.take_along_axis(ids, (nodes + 1) % sizes[:, None], axis=1)
    with np.errstate(over="ignore"):
        mixed = (
            (ids.astype(np.uint64) << np.uint64(32)) + after.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        )
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        total = np.where(nodes < sizes[:, None], mixed, np.uint64(0)).sum(axis=1, dtype=np.uint64)
    return ((total >> np.uint64(40)) % np.uint64(HELD_OUT) == 0) == (split == "test")


@lru_cache
def _chance(task):
    rng = np.random.default_rng(12)
    _, words, lengths = task._cycles(4096, rng, "test")
    n, rows = task.nodes, np.arange(4096)
    size = float(lengths.mean())  # labels an answer
    other = words[rows, rng.integers(1, n, 4096)]  # node 0 stands for the goal, guess another or itself
    real = np.arange(task.word[1]) < lengths[:, :1]
    miss = ((other == words[:, 0]) & real).sum() / real.sum()
    token = 1 / (n - 1) + (1 - 1 / (n - 1)) * float(miss)
    result = {"loss": math.log(n - 1) / size, "token": token, "exact": (n - 1.0) ** -min(n, task.queries)}
    for power in range(task.hops.bit_length()):
        k = 2**power
        known = k % n == 0  # the walk ends where it began
        result[f"loss/{k}"] = 0.0 if known else math.log(n - 1) / size
        result[f"exact/{k}"] = 1.0 if known else 1 / (n - 1)
    return result
