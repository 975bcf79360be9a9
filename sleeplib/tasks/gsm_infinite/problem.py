"""From numbers to text: a bare problem in core names, then distractors up to the wanted length."""

import random
import zlib
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from .graph import Core, draw_constant, draw_core, draw_formula, evaluate
from .language import THEMES, WORDS, Formula, Node, hidden, question, sentence, trace

HELD_OUT = 8  # one bare problem in HELD_OUT belongs to the test split
TRIES = 5000  # draws for one problem before its settings are called impossible
REASONS = {
    "ops": "ops: {ops} operations do not fit into a structure of places={task.places}, kinds={task.kinds}",
    "mode": "ops: {ops} operations in reverse mode leave no constant to hide",
    "max_value": "max_value={task.max_value} is too small for {ops} operations",
    "tokens": "tokens={task.tokens} is too short for a problem of {ops} operations, or too narrow to hit",
    "split": "split={split!r} is empty: places={task.places}, kinds={task.kinds} make too few problems",
    "noise": "tokens={task.tokens} is too long for the names of noise={task.noise}, or too narrow to hit",
}


@dataclass(frozen=True)
class Problem:
    """A problem in words.

    Parameters
    ----------
    context : str
        Sentences in random order, with a space between them.
    question : str
    answer : int
    solution : str
        The steps, one sentence a parameter, in an order in which they can be worked out.
    ops : int
        Edges of the graph that the query hangs on.
    mode : {"forward", "reverse"}
    level : {"medium", "hard"}
    theme : str
    distractors : tuple of str
        The sentences of the context that are about other names.

    Notes
    -----
    Chapter: 13_gsm_infinite
    """

    context: str
    question: str
    answer: int
    solution: str
    ops: int
    mode: str
    level: str
    theme: str
    distractors: tuple[str, ...]

    def without_distractors(self):
        """The context that is left when the distractors are deleted, a str."""
        context = f"{self.context} "
        for text in self.distractors:
            context = context.replace(f"{text} ", "", 1)
        return context.strip()


@dataclass
class Bare:
    """A problem before its distractors: what is asked, and every sentence in core names."""

    theme: str
    core: Core
    question: str
    sentences: list
    size: int  # tokens
    target: int  # tokens wanted
    values: dict
    known: list  # parameters that distractors may depend on

    @property
    def answer(self):
        """The number that is asked for."""
        return self.values[self.core.hidden or self.core.query]

    @property
    def solution(self):
        """The steps to the answer, in words."""
        core = self.core
        given = (core.query, core.values[core.query]) if core.hidden else ()
        return trace(self.theme, core.formulas, core.forms or core.values, *given)


def count_words(text):
    """Tokens of a text in the closed vocabulary."""
    return len(WORDS.findall(text))


def draw_bare(draw, task, split, *, mode, ops, level, theme, count):
    """Draw a bare problem; return it, or the name of the setting that this draw did not meet."""
    names = THEMES[theme]
    pools = (task.places[0], names.places[: task.places[1]]), (task.kinds[0], names.kinds[: task.kinds[1]])
    core = draw_core(draw, ops, mode, level, *pools, task.max_value)
    if isinstance(core, str):
        return core
    asked = question(theme, core.hidden or core.query)
    told = [
        hidden(theme, node) if node == core.hidden else sentence(theme, node, formula)
        for node, formula in core.formulas.items()
        if node.what in ("count", "average")
    ]
    if core.hidden:
        told.append(sentence(theme, core.query, Formula("constant", core.values[core.query], ())))
    size = count(asked) + sum(map(count, told))
    target = draw.randint(*task.tokens)
    if size > task.tokens[1]:
        return "tokens"
    values, known = dict(core.values), list(core.values)
    left = [n for n in core.instances if n not in values]
    for node in draw.sample(left, len(left)):
        formula, value = draw_formula(draw, (known,), values, task.max_value)
        text = sentence(theme, node, formula)
        tokens = count(text)
        if size + tokens > target:
            continue  # a smaller structure then
        size += tokens
        told.append(text)
        values[node] = value
        known.append(node)
        for total in (Node("things", node.place), Node("parts", node.place)):
            needs = core.abstract.get(total, ())
            if needs and total not in values and all(n in values for n in needs):
                value = evaluate(Formula(total.what, None, needs), values)
                if value <= task.max_value:
                    values[total] = value
                    known.append(total)
    if split is not None:
        bare = zlib.crc32(" ".join([asked, *sorted(told)]).encode())
        if (bare % HELD_OUT == 0) != (split == "test"):
            return "split"
    return Bare(theme, core, asked, told, size, target, values, known)


def add_distractors(draw, task, bare, *, level, count):
    """Sentences in other names up to the wanted length; they may need core parameters, never the reverse."""
    theme, names = bare.theme, THEMES[bare.theme]
    whats = ("count", "average") if level == "hard" else ("count",)
    places, kinds = names.noise_places[: task.noise[0]], names.noise_kinds[: task.noise[1]]
    nodes = [Node(what, p, k) for p in places for k in kinds for what in whats]
    draw.shuffle(nodes)
    size, values, fresh, texts = bare.size, dict(bare.values), [], []
    pools = (bare.known, fresh)
    for node in nodes:
        if size >= bare.target:
            break
        formula, value = draw_formula(draw, pools, values, task.max_value)
        text = sentence(theme, node, formula)
        tokens = count(text)
        if size + tokens > task.tokens[1]:
            formula, value = draw_constant(draw)
            text = sentence(theme, node, formula)
            tokens = count(text)
            if size + tokens > task.tokens[1]:
                break
        size += tokens
        texts.append(text)
        values[node] = value
        fresh.append(node)
    return texts, size


def draw_problem(draw, task, split, *, mode, ops, level, theme, count):
    """Draw a whole problem; return it, or the name of the setting that this draw did not meet.

    `count` maps a text to its number of tokens.
    """
    bare = draw_bare(draw, task, split, mode=mode, ops=ops, level=level, theme=theme, count=count)
    if isinstance(bare, str):
        return bare
    distractors, size = add_distractors(draw, task, bare, level=level, count=count)
    if size < task.tokens[0]:
        return "noise"
    sentences = bare.sentences + distractors
    draw.shuffle(sentences)
    asked = bare.question, bare.answer, bare.solution
    return Problem(" ".join(sentences), *asked, ops, mode, level, theme, tuple(distractors))


def draw_until(draw_one, draw, task, split, *, ids=None, tries=TRIES, ops, **cell):
    """Call `draw_one` until it meets the settings.

    `ids` turns text into tokens, by default those of the closed vocabulary.

    Raises
    ------
    ValueError
        After `tries` draws, naming the setting that comes last in ``REASONS`` among those that stopped one.
    """
    count = (lambda text: len(ids(f" {text}"))) if ids else count_words
    reasons = Counter()
    for _ in range(tries):
        found = draw_one(draw, task, split, ops=ops, count=count, **cell)
        if ids and isinstance(found, Problem):  # the tokens of the sentences may not quite add up
            size = len(ids(task.join(found.question, found.context)))
            found = found if task.tokens[0] <= size <= task.tokens[1] else "noise"
        if not isinstance(found, str):
            return found
        reasons[found] += 1
    reason = next(r for r in reversed(REASONS) if reasons[r])
    raise ValueError(REASONS[reason].format(task=task, ops=ops, split=split))


@lru_cache
def check_possible(task):
    """Draw one problem of each mode, level and op count; raise ValueError if one cannot be had."""
    draw = random.Random(0)
    for level, mode, ops in product(task.levels, task.modes, range(task.ops[0], task.ops[1] + 1)):
        cell = dict(mode=mode, ops=ops, level=level, theme=task.themes[0])
        draw_until(draw_problem, draw, task, None, tries=1000, **cell)
