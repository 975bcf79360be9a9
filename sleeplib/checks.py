"""Arguments that do not fit are refused in words that name them."""

import math
import numbers
import operator


class Unfit(TypeError, ValueError):
    """A value of the wrong type: callers that expect either kind of error are right."""


def integer(name, value, low=None, high=None, hint=""):
    """Return `value` as an int, NumPy's included; raise an error that names the argument if it does not fit.

    Raises
    ------
    Unfit
        If `value` is no integer; True and False are none.
    ValueError
        If it lies below `low` or above `high`.
    """
    limits = "" if low is None else f" of at least {low}" if high is None else f" in {low} .. {high}"
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise Unfit(f"{name} must be an int{limits}; got {value!r}{hint}")
    if low is not None and number < low or high is not None and number > high:
        raise ValueError(f"{name} must be an int{limits}; got {number}{hint}")
    return number


def real(name, value, above=-math.inf):
    """Return `value` as a finite float above `above`; raise an error that names the argument if it is none.

    Raises
    ------
    Unfit
        If `value` is no real number.
    ValueError
        If it is NaN, infinite, or not above `above`.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise Unfit(f"{name} must be a number; got {value!r}")
    if not above < value < math.inf:
        raise ValueError(f"{name} must be finite and above {above:g}; got {value!r}")
    return float(value)
