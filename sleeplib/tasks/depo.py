"""Depo: read the edges of a cycle in random order, then say which node lies k hops after another."""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from ..checks import integer
from .base import IGNORE, Batch, ContextTask, check_batch_request, check_pair

HELD_OUT = 8  # one cycle in HELD_OUT belongs to the test split
TRIES = 2000  # cycles drawn in a row with none in the wanted split, before that split is found empty
SCARCE = 0.02  # least chance of hitting a name that is left over when the last node draws
SAMPLE, BUDGET = 4096, 2**19  # cycles that chance is estimated from, and nodes that it may draw


@dataclass(frozen=True)
class Depo(ContextTask):
    """The k-hop task of section 6.2, after Depo1 of Physics of Language Models, part 4.1.

    A directed cycle is shown as its edges, source then destination, shuffled; padding on the left fills the
    context.  Then come queries.  With the cycle n1 -> n3 -> n2 -> n1, names of one token and a query for two
    hops from n3::

        context   <pad> <pad> N2 N1 N3 N2 N1 N3
        query     <2> N3 <answer> N1              n3 -> n2 -> n1
        label      .  .   N1      .

    A name is a word: tokens ``n..``, each of which says that more follows, then one ``N..`` that ends it.
    Only the answer's tokens are labels, each at the position before its own.

    Parameters
    ----------
    nodes : int
        Most nodes of a cycle, N.  In training a cycle has n of them, from `fewest` to N, with probability
        proportional to ``1 / (n + sqrt(N))``; at test it has N.
    hops : int
        Most hops K.  In training k is uniform on 1 .. K; at test a power of two.
    letters : int
        How many tokens there are to go on in a name, and as many again to end one.
    word : (int, int)
        Fewest and most tokens of a name; the number is drawn evenly.
    queries : int
        Queries in a sequence, with distinct starts: ``min(n, queries)`` of them.
    windows : int
        How many windows the context is cut into.
    fewest : int
        Fewest nodes of a cycle in training.

    Notes
    -----
    Our readings: no token marks the beginning, ``<answer>`` itself is not a label, and names are those of
    Depo1.  Queries that do not fit into one window go on in the next; no query is split.  A hash of its
    edges says whether a cycle is held out: one in eight is.

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
        low, high = check_pair("word", self.word)
        if not 1 <= low <= high <= 4:
            raise ValueError(f"word must be (fewest, most) tokens, 1 to 4; got {self.word!r}")
        object.__setattr__(self, "word", (low, high))
        limits = (("nodes", 3, 1000), ("hops", 1, 1000), ("letters", 1, 1000), ("queries", 1, 1000))
        for name, least, most in (*limits, ("windows", 1, 1000), ("fewest", 3, self.nodes)):
            object.__setattr__(self, name, integer(name, getattr(self, name), least, most))
        names = sum(self.letters**size for size in range(low, high + 1))
        # Names are drawn until they differ, which needs some that are left over, of the shortest kind too.
        left = names - self.nodes + 1
        if left < 1 or left < SCARCE * (high - low + 1) * self.letters**high:
            raise ValueError(f"letters: {self.letters} give {names} names for {self.nodes} nodes: too few")
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
        count = check_batch_request(count, rng, split)
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
        """Draw cycles of one split or both: sizes (B,), names (B, nodes, tokens), lengths (B, nodes)."""
        found, missing, vain = [], count, 0
        while missing > 0:
            share = {"test": 1 / HELD_OUT, "train": 1 - 1 / HELD_OUT}.get(split, 1)
            n = int(missing / share * 1.1) + 8
            sizes = np.full(n, self.nodes)
            if split == "train":
                choice = np.arange(self.fewest, self.nodes + 1)
                weight = 1 / (choice + math.sqrt(self.nodes))
                sizes = rng.choice(choice, n, p=weight / weight.sum())
            ids, lengths = self._names(n, rng)
            mine = _in_split(ids, sizes, split) if split else np.ones(n, dtype=bool)
            found.append([x[mine][:missing] for x in (sizes, ids, lengths)])
            missing -= found[-1][0].size
            vain = 0 if mine.any() else vain + n
            if vain > TRIES:
                few = f"{self.letters} give {self.nodes} nodes so few cycles"
                raise ValueError(f"letters: {few} that split={split!r} is empty")
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
        rows = np.arange(count)  # those in which two nodes may share a name
        while True:
            keys = ids[rows] * (high + 1) + lengths[rows]
            order = keys.argsort(axis=1, kind="stable")
            ordered = np.take_along_axis(keys, order, axis=1)
            again = np.zeros_like(keys, dtype=bool)
            np.put_along_axis(again, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
            if not again.any():
                return ids, lengths
            row, node = again.nonzero()
            ids[rows[row], node], lengths[rows[row], node] = draw(row.size)
            rows = rows[again.any(axis=1)]

    def solve(self, inputs):
        """Answer from the visible tokens alone: read the edges, walk, word by word.

        Parameters
        ----------
        inputs : torch.Tensor of int64, shape (B, T)

        Returns
        -------
        torch.Tensor of int64, shape (B, T)
            Labels, -100 where nothing is asked.

        Raises
        ------
        TypeError, ValueError
            If `inputs` are not tokens of this task, or a row does not read as one of its sequences.
        """
        inputs = self._check_inputs(inputs)
        labels = torch.full_like(inputs, IGNORE)
        number = {text: i for i, text in enumerate(self.vocab)}
        for row, tokens in enumerate(inputs.tolist()):
            try:
                for position, part in self._answers([self.vocab[token] for token in tokens]):
                    labels[row, position] = number[part]
            except (KeyError, IndexError, ValueError):
                raise ValueError(f"inputs: row {row} does not read as edges and queries of Depo") from None
        return labels

    def _answers(self, texts):
        """Positions of labels in one row, and what should be answered there."""
        names, name = [], ()
        for text in texts[: self.context]:
            if text != "<pad>":
                name += (text,)
                if text[0] == "N":
                    names, name = [*names, name], ()
        successor = dict(zip(names[::2], names[1::2], strict=True))
        if not names or "<answer>" not in texts:
            raise ValueError("nothing is told or asked")
        hops, start = 0, ()
        for position, text in enumerate(texts[self.context :], self.context):
            if text == "<answer>":
                for _ in range(hops):
                    start = successor[start]
                yield from enumerate(start, position)
            elif text[0] == "<" and text != "<pad>":
                hops, start = int(text[1:-1]), ()
            else:
                start += (text,)

    def chance(self):
        """Score on the test split of a guess among the nodes: not the start, unless k hops end there.

        Returns
        -------
        dict of str to float
            ``loss``, ``token``, ``exact``, and ``loss/<k>``, ``exact/<k>`` for each k asked at test.
            ``token`` is counted on a fixed sample: 4,096 cycles, fewer above 128 nodes.
        """
        return dict(_chance(self))


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
    rng, count = np.random.default_rng(12), min(SAMPLE, BUDGET // task.nodes)
    # The split says nothing about the names, and drawing only held-out rings takes eight times as long.
    _, words, lengths = task._cycles(count, rng, "test" if count == SAMPLE else None)
    n, rows = task.nodes, np.arange(count)
    size = float(lengths.mean())  # labels an answer
    other = words[rows, rng.integers(1, n, count)]  # node 0 stands for the goal, guess another or itself
    real = np.arange(task.word[1]) < lengths[:, :1]
    miss = ((other == words[:, 0]) & real).sum() / real.sum()
    powers = [2**power for power in range(task.hops.bit_length())]
    known = {k: float(k % n == 0) for k in powers}  # the walk ends where it began
    right = {k: known[k] + (1 - known[k]) / (n - 1) for k in powers}
    mean, nats = sum(right.values()) / len(powers), math.log(n - 1) / size
    result = {
        "loss": nats * (1 - sum(known.values()) / len(powers)),
        "token": mean + (1 - mean) * float(miss),
        "exact": mean ** min(n, task.queries),
    }
    for k in powers:
        result |= {f"loss/{k}": nats * (1 - known[k]), f"exact/{k}": right[k]}
    return result
