"""A solver of problems in words: it knows their English and shares nothing with the generator."""

from fractions import Fraction


def solve_text(text):
    """Answer a problem of GSM-Infinite from its text alone.

    Parameters
    ----------
    text : str
        The question and the sentences of the context, in any order.

    Returns
    -------
    int

    Raises
    ------
    ValueError
        If a sentence cannot be read or the text does not settle the answer.

    Notes
    -----
    Sentences that the answer does not need are read, but never worked out.

    Chapter: 13_gsm_infinite
    """
    asked, unknown, known, defined = None, None, {}, {}
    for words in _sentences(text):
        subject, rest = _parameter(words[2:] if words[0] == "What" else words)
        if words[0] == "What":
            asked = subject
        elif rest[0] == "exists":
            unknown = subject
        elif rest[0] != "equals" or len(rest) < 2:
            raise ValueError(f"text: cannot read {' '.join(words)!r}")
        elif len(rest) == 2 and rest[1].isdecimal():
            known[subject] = int(rest[1])
        else:
            defined[subject] = _expression(rest[1:])
    if asked is None:
        raise ValueError("text: it asks no question")
    facts = _Facts(unknown, known, defined)
    if unknown is None:
        base, slope = facts.value(asked)
    else:
        # the given value is that of a total, or of a parameter that another sentence defines as well
        given = [p for p in known if p[0] == "total" or p in defined or p == unknown]
        if len(given) != 1:
            raise ValueError(f"text: {len(given)} values are given for one unknown")
        base, slope = facts.value(given[0])
        if slope == 0:
            raise ValueError("text: the given value does not depend on the unknown")
        x = (known[given[0]] - base) / slope
        base, slope = facts.value(asked)
        base += slope * x
    if base.denominator != 1:
        raise ValueError(f"text: the answer {base} is not a whole number")
    return int(base)


def _sentences(text):
    for mark in ".?,":
        text = text.replace(mark, f" {mark} ")
    words = []
    for word in text.split():
        if word not in (".", "?"):
            words.append(word)
        elif words:
            yield words
            words = []
    if words:
        raise ValueError(f"text: it ends inside a sentence, {' '.join(words)!r}")


def _parameter(words):
    """Read one parameter from the front; return it and the words after it."""
    match words:
        case [_, "number", "of", kind, things, "in", place, *rest]:
            return ("count", things, kind, place), rest
        case [_, "average", "number", "of", parts, "per", kind, thing, "in", place, *rest]:
            return ("average", parts, kind, place, thing), rest
        case [_, "total", "number", "of", noun, "in", place, *rest]:
            return ("total", noun, place), rest
    raise ValueError(f"text: cannot read {' '.join(words)!r} as a number of something")


def _expression(words):
    """Read the right side of a definition: (operation, number or None, parameters)."""
    if len(words) > 2 and words[0].isdecimal():
        start, operation = (3, "more") if words[1:3] == ["more", "than"] else (2, words[1])
        subject, rest = _parameter(words[start:])
        if operation in ("more", "times") and not rest:
            return operation, int(words[0]), [subject]
    elif words[:3] == ["the", "sum", "of"]:
        subjects, rest = [], [",", *words[3:]]
        while rest and rest[0] in (",", "and"):
            subject, rest = _parameter(rest[1:])
            subjects.append(subject)
        if not rest:
            return "sum", None, subjects
    else:
        subject, rest = _parameter(words)
        if not rest:
            return "sum", None, [subject]
        other, end = _parameter(rest[1:])
        if rest[0] == "minus" and not end:
            return "minus", None, [subject, other]
    raise ValueError(f"text: cannot read {' '.join(words)!r}")


class _Facts:
    """Values as base + slope * unknown, worked out when they are asked for."""

    def __init__(self, unknown, known, defined):
        self.unknown, self.known, self.defined = unknown, known, defined
        self.found, self.under_way = {}, set()

    def value(self, p):
        if p not in self.found:
            if p in self.under_way:
                raise ValueError(f"text: {p} depends on itself")
            self.under_way.add(p)
            self.found[p] = self.work_out(p)
        return self.found[p]

    def work_out(self, p):
        if p == self.unknown:
            return Fraction(0), Fraction(1)
        if p in self.defined:
            operation, number, subjects = self.defined[p]
            (base, slope), *others = (self.value(s) for s in subjects)
            if operation == "more":
                return base + number, slope
            if operation == "times":
                return base * number, slope * number
            sign = -1 if operation == "minus" else 1
            return base + sign * sum(b for b, _ in others), slope + sign * sum(s for _, s in others)
        if p[0] == "total":
            return self.total(*p[1:])
        if p in self.known:
            return Fraction(self.known[p]), Fraction(0)
        raise ValueError(f"text: nothing says what {p} is")

    def total(self, noun, place):
        """Sum over a place of counts, or of counts times averages, whichever the noun names."""
        named = dict.fromkeys([*self.known, *self.defined, self.unknown])
        counts = [p for p in named if p and p[0] == "count" and p[1] == noun and p[3] == place]
        terms = [self.value(p) for p in counts]
        for p in named:
            if p and p[0] == "average" and p[1] == noun and p[3] == place:
                (a, b), (c, d) = self.value(p), self.value(("count", p[4] + "s", p[2], place))
                if b and d:
                    raise ValueError(f"text: {p} times its count is not linear in the unknown")
                terms.append((a * c, a * d + b * c))
        if not terms:
            raise ValueError(f"text: nothing says how many {noun} are in {place}")
        return sum(b for b, _ in terms), sum(s for _, s in terms)
