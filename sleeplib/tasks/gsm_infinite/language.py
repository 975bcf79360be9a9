"""The words of GSM-Infinite: three themes of our own, parameters as phrases, formulas as sentences."""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

CONSTANTS = (1, 2, 3, 4)
WORDS = re.compile(r"<\w+>|\w+|[^\w\s]")  # words, numbers and marks, as the closed vocabulary has them


@dataclass(frozen=True)
class Theme:
    """Names of one world: places hold kinds of a thing, and each thing holds parts."""

    thing: str
    part: str
    places: tuple[str, ...]
    kinds: tuple[str, ...]
    noise_places: tuple[str, ...]
    noise_kinds: tuple[str, ...]


def _theme(thing, part, places, kinds, noise_places, noise_kinds):
    return Theme(thing, part, *(tuple(names.split()) for names in (places, kinds, noise_places, noise_kinds)))


THEMES = {
    "harbor": _theme(
        "boat",
        "sailor",
        "Alderport Brinemouth Corvane Dunhaven Eastquay Farholm Gullbay Harwick",
        "red blue green white yellow black grey brown",
        "Ironpier Jettymoor Kelpwater Lowtide Mastfield Netherport Oarstead Pebblecove Quaymoor Reefgate "
        "Saltbury Tidewell Underwharf Vesselford Wavecrest Anchorby Buoyton Crabness Driftwood Eelbrook "
        "Fogstrand Heronbay Inletham Keelhaven",
        "striped spotted wooden narrow silver golden purple orange round long copper painted folding covered "
        "rented borrowed foreign speckled polished rusty heavy light tall square",
    ),
    "orchard": _theme(
        "tree",
        "nest",
        "Thornhill Meadowby Rookley Sunslope Millcroft Fernside Oxgarth Hazelden",
        "pear plum cherry walnut fig quince almond lemon",
        "Ashrow Barleymow Cloverset Daleside Elmfold Frostacre Greenbank Hedgeway Ivyknoll Juniperlea "
        "Larkrise Mossfield Northglebe Owlpasture Primrose Ridgecroft Stonewall Turfmoor Upland Vinehurst "
        "Willowbed Yarrowdale Brackenhill Copsewood",
        "olive peach apricot medlar mulberry chestnut hazelnut lime mango papaya banana coconut pecan guava "
        "lychee date cocoa cashew pistachio tamarind rowan elder persimmon grapefruit",
    ),
    "library": _theme(
        "book",
        "picture",
        "Archway Bellhouse Candleton Dovecote Everly Foxhall Gablewood Hallmere",
        "travel history music chess garden science art law",
        "Inkwell Jasperhall Kingsroom Lanternby Marbleton Novelgate Oakdesk Parchment Quillford Readerby "
        "Scrollham Tomehouse Upperhall Vellumgate Westreading Bookend Coverdale Deskmoor Folioton Glossary "
        "Indexham Leafhurst Margins Pageworth",
        "poetry cooking sailing physics ballet pottery railway fashion weather insect fossil castle theatre "
        "medicine algebra geology puzzle drama comet riddle magic football knitting volcano",
    ),
}


class Node(NamedTuple):
    """A parameter: the count or average of a kind in a place, or a place's total of things or parts."""

    what: str  # "count" | "average" (instance), "things" | "parts" (abstract)
    place: str
    kind: str = ""


class Formula(NamedTuple):
    """How a parameter follows from a constant and other parameters."""

    form: str  # "constant", "copy", "more", "times", "minus", "sum"; for abstract ones "things", "parts"
    constant: int | None
    needs: tuple[Node, ...]


@lru_cache(maxsize=1 << 16)
def phrase(theme, node):
    """A parameter in words, such as "the number of red boats in Corvane"."""
    thing, part = THEMES[theme].thing, THEMES[theme].part
    what, place, kind = node
    if what == "count":
        return f"the number of {kind} {thing}s in {place}"
    if what == "average":
        return f"the average number of {part}s per {kind} {thing} in {place}"
    return f"the total number of {thing if what == 'things' else part}s in {place}"


def sentence(theme, node, formula):
    """The sentence that defines a parameter."""
    form, constant, needs = formula
    names = [phrase(theme, n) for n in needs]
    if form == "constant":
        value = str(constant)
    elif form == "copy":
        value = names[0]
    elif form == "more":
        value = f"{constant} more than {names[0]}"
    elif form == "times":
        value = f"{constant} times {names[0]}"
    elif form == "minus":
        value = f"{names[0]} minus {names[1]}"
    else:
        value = f"the sum of {', '.join(names[:-1])} and {names[-1]}"
    return f"T{phrase(theme, node)[1:]} equals {value}."


def hidden(theme, node):
    """The sentence that stands in for a hidden constant."""
    return f"T{phrase(theme, node)[1:]} exists and is greater than 0."


def question(theme, node):
    """The sentence that asks for a parameter."""
    return f"What is {phrase(theme, node)}?"


@lru_cache
def vocabulary(themes, levels, modes, places, kinds, noise, max_value, solution):
    """The closed vocabulary: marks, the words that these settings can produce, the numbers 0..max_value."""
    texts = ["The the number of in equals more than times minus sum and total What is , . ?"]
    if "hard" in levels:
        texts.append("average per")
    if "reverse" in modes:
        texts.append("exists and is greater than")
    if solution:
        texts.append("<solution> = + - * ( ) x so")
    for theme in map(THEMES.get, themes):
        texts.append(f"{theme.thing}s")
        if "hard" in levels:
            texts.append(f"{theme.thing} {theme.part}s")
        pools = (theme.places[:places], theme.kinds[:kinds])
        pools += (theme.noise_places[: noise[0]], theme.noise_kinds[: noise[1]]) if all(noise) else ()
        texts.extend(" ".join(names) for names in pools)
    words = " ".join(texts).split()
    return tuple(dict.fromkeys(["<pad>", "<answer>", *words, *map(str, range(max_value + 1))]))


def trace(theme, formulas, forms, query=None, value=None):
    """The solution in words: one line for each parameter, in an order in which they can be worked out.

    With a hidden constant ``x`` the lines carry linear forms, and the last solves ``form = value``.
    """
    lines = []
    for node, (form, constant, needs) in formulas.items():
        terms = [_inside(forms[n]) for n in needs]
        if form == "parts":
            terms = [f"{a} * {b}" for a, b in zip(terms[::2], terms[1::2])]
        elif form in ("more", "times"):
            terms.insert(0, str(constant))
        mark = {"minus": " - ", "times": " * "}.get(form, " + ")
        steps = [mark.join(terms)] if len(terms) > 1 or form == "parts" else []
        steps.append(str(forms[node]))
        lines.append(f"T{phrase(theme, node)[1:]} = {' = '.join(steps)}.")
    if query is not None:
        form = forms[query]
        lines.append(f"{form} = {value}, so x = {(value - form.base) // form.slope}.")
    return " ".join(lines)


def _inside(form):
    """A linear form as a factor or term."""
    text = str(form)
    return f"( {text} )" if " " in text else text
