"""The numbers behind a problem: the structure graph, and a query grown to an exact op count."""

from dataclasses import dataclass

from .language import CONSTANTS, Formula, Node

# (form, parameters it needs); constants and "c more than", "c times" bring a random constant of their own
SHAPES = (
    ("constant", 0),
    ("constant", 0),
    ("copy", 1),
    ("more", 1),
    ("more", 1),
    ("times", 1),
    ("times", 1),
    ("minus", 2),
    ("sum", 2),
    ("sum", 2),
    ("sum", 3),
    ("sum", 4),
)
RANDOM = ("constant", "more", "times")  # forms with a random constant, which counts as one edge
TRIES = 12  # formulas tried for one parameter before the whole draw is given up


@dataclass(frozen=True)
class Linear:
    """base + slope * x, where x is the hidden constant."""

    base: int
    slope: int

    def __add__(self, other):
        other = other if isinstance(other, Linear) else Linear(other, 0)
        return Linear(self.base + other.base, self.slope + other.slope)

    __radd__ = __add__

    def __mul__(self, other):
        other = other if isinstance(other, Linear) else Linear(other, 0)
        if self.slope and other.slope:
            raise ArithmeticError("x times x")
        return Linear(self.base * other.base, self.base * other.slope + self.slope * other.base)

    __rmul__ = __mul__

    def __sub__(self, other):
        return self + -1 * other

    def __rsub__(self, other):
        return other + -1 * self

    def __str__(self):
        if not self.slope:
            return str(self.base)
        text = {1: "x", -1: "- x"}.get(self.slope) or f"{'- ' * (self.slope < 0)}{abs(self.slope)} x"
        return text + (f" {'+' if self.base > 0 else '-'} {abs(self.base)}" if self.base else "")


@dataclass(frozen=True)
class Core:
    """What a problem asks and all that its answer needs, in an order in which it can be worked out."""

    query: Node
    formulas: dict  # Node -> Formula
    values: dict  # Node -> int, of everything that was drawn
    instances: list  # of Node: the structure graph
    abstract: dict  # Node -> what it sums
    hidden: Node | None = None  # reverse mode: the constant that is asked for
    forms: dict | None = None  # reverse mode: Node -> int or Linear


def degree(formula):
    """Operations of one formula: its edges."""
    return len(formula.needs) + (formula.form in RANDOM)


def evaluate(formula, values):
    """The value of a formula, from numbers or linear forms."""
    form, constant, needs = formula
    if form == "constant":
        return constant
    given = [values[n] for n in needs]
    if form == "copy":
        return given[0]
    if form == "more":
        return constant + given[0]
    if form == "times":
        return constant * given[0]
    if form == "minus":
        return given[0] - given[1]
    if form == "parts":
        return sum(a * b for a, b in zip(given[::2], given[1::2]))
    return sum(given)


def draw_structure(draw, places, kinds):
    """A random bipartite graph: for each place the kinds that it holds, at least one."""
    kinds = draw.sample(kinds[1], draw.randint(kinds[0], len(kinds[1])))
    places = draw.sample(places[1], draw.randint(places[0], len(places[1])))
    return {place: tuple(draw.sample(kinds, draw.randint(1, len(kinds)))) for place in places}


def parameters(structure, level):
    """Instance parameters, and abstract ones with what they need."""
    whats = ("count", "average") if level == "hard" else ("count",)
    instances = [Node(what, p, k) for p, kinds in structure.items() for k in kinds for what in whats]
    abstract = {}
    for place, kinds in structure.items():
        abstract[Node("things", place)] = tuple(Node("count", place, k) for k in kinds)
        if level == "hard":
            abstract[Node("parts", place)] = tuple(Node(what, place, k) for k in kinds for what in whats)
    return instances, abstract


def grow(draw, ops, instances, abstract):
    """Formulas of a random query and of all that it needs, whose degrees sum to `ops`; None if it fails.

    Each parameter that waits for its formula has one operation set aside for it.  A formula only needs
    parameters that have no formula yet, so in reverse the formulas are in topological order.
    """
    query = draw.choice(list(abstract) if draw.random() < 0.5 else instances)
    formulas, waiting = {}, []
    left = _claim([query], formulas, waiting, abstract, ops)
    while left is not None and waiting:
        node = waiting.pop(draw.randrange(len(waiting)))
        free = [n for n in instances if n not in formulas and n != node]
        free += [
            n
            for n, needs in abstract.items()
            if n not in formulas and node not in needs and not any(m in formulas for m in needs)
        ]
        for _ in range(TRIES):
            form, count = draw.choice(SHAPES)
            if count > len(free) or degree(Formula(form, None, (None,) * count)) - 1 > left:
                continue
            needs = draw.sample(free, count)
            trial = {node: Formula(form, draw.choice(CONSTANTS) if form in RANDOM else None, tuple(needs))}
            then = list(waiting)
            rest = _claim(needs, trial, then, abstract, left - degree(trial[node]) + 1)
            if rest is not None and (then or not rest):
                formulas |= trial
                waiting, left = then, rest
                break
        else:
            return None
    if left != 0:
        return None
    return query, dict(reversed(formulas.items()))


def _claim(nodes, formulas, waiting, abstract, left):
    """Put parameters on the waiting list, abstract ones by what they need; return what is left, or None."""
    for node in nodes:
        if node in abstract:
            formulas[node] = Formula(node.what, None, abstract[node])
            left -= len(abstract[node])
        for n in abstract.get(node, (node,)):
            if n not in waiting:
                waiting.append(n)
                left -= 1
    return left if left >= 0 else None


def draw_core(draw, ops, mode, level, places, kinds, max_value):
    """A query with everything that it needs, or the name of the setting that this draw did not meet."""
    graph = parameters(draw_structure(draw, places, kinds), level)
    grown = grow(draw, ops, *graph)
    if grown is None:
        return "ops"
    query, formulas = grown
    values = {}
    for node, formula in formulas.items():
        if formula.form == "minus" and values[formula.needs[0]] < values[formula.needs[1]]:
            formulas[node] = formula = formula._replace(needs=formula.needs[::-1])
        values[node] = evaluate(formula, values)
        if not 0 <= values[node] <= max_value:
            return "max_value"
    if mode == "forward":
        return Core(query, formulas, values, *graph)
    leaves = [n for n, formula in formulas.items() if formula.form == "constant"]
    for leaf in draw.sample(leaves, len(leaves)):
        forms = hide(leaf, formulas)
        if forms and forms[query] and all(abs(n) <= max_value for n in _numbers(forms)):
            return Core(query, formulas, values, *graph, leaf, forms)
    return "mode"


def hide(leaf, formulas):
    """Linear forms of all parameters with x for one leaf; None unless all are linear, the last with an x."""
    forms = {}
    try:
        for node, formula in formulas.items():
            forms[node] = Linear(0, 1) if node == leaf else evaluate(formula, forms)
    except ArithmeticError:
        return None
    last = forms[node]
    return forms if isinstance(last, Linear) and last.slope else None


def _numbers(forms):
    """The numbers that linear forms are written with."""
    return [n for f in forms.values() for n in ((f.base, f.slope) if isinstance(f, Linear) else (f,))]


def draw_formula(draw, pools, values, max_value):
    """A formula and its value for a parameter that nothing asks for, from at most 4 that are already known.

    `pools` are lists of known parameters; each dependency comes from a random list.
    """
    for _ in range(TRIES):
        form, count = SHAPES[int(draw.random() * len(SHAPES))]
        needs = {}
        for _ in range(count):
            pool = pools[int(draw.random() * len(pools))]
            if pool:
                needs[pool[int(draw.random() * len(pool))]] = True
        if len(needs) < count:
            continue
        needs = tuple(needs)
        if form == "minus" and values[needs[0]] < values[needs[1]]:
            needs = needs[::-1]
        constant = CONSTANTS[int(draw.random() * len(CONSTANTS))] if form in RANDOM else None
        formula = Formula(form, constant, needs)
        value = evaluate(formula, values)
        if value <= max_value:
            return formula, value
    return draw_constant(draw)


def draw_constant(draw):
    """The shortest formula: a constant."""
    constant = draw.choice(CONSTANTS)
    return Formula("constant", constant, ()), constant
