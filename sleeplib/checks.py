"""Arguments that do not fit are refused in words that name them."""

import math
import numbers
import operator

import torch

LARGEST = 2**31 - 1  # no size, number of passes or of tokens is beyond it


class Unfit(TypeError, ValueError):
    """A value of the wrong type: callers that expect either kind of error are right."""


def integer(name, value, low=None, high=None, hint=""):
    """Return `value`, NumPy's too, as an int; refuse what is none (True is none) or out of range, by name."""
    limits = "" if low is None else f" of at least {low}" if high is None else f" in {low} .. {high}"
    high = LARGEST if high is None else high
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise Unfit(f"{name} must be an int{limits}; got {value!r}{hint}")
    if low is not None and number < low or number > high:
        raise ValueError(f"{name} must be an int{limits}; got {number}{hint}")
    return number


def real(name, value, above=-math.inf):
    """Return `value` as a float; refuse what is no number, not finite or not above `above`, by name."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise Unfit(f"{name} must be a number; got {value!r}")
    if not above < value < math.inf:
        raise ValueError(f"{name} must be finite and above {above:g}; got {value!r}")
    return float(value)


def _kind(x):
    return f"{x.dtype}, {x.layout}" if isinstance(x, torch.Tensor) else type(x).__name__


def float_tensor(name, x, shape):
    """Refuse what is no dense float tensor of this shape, a letter standing for any size of at least 1."""
    if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.layout is not torch.strided:
        raise TypeError(f"{name} must be a floating-point tensor; got {_kind(x)}")
    fits = len(shape) == x.ndim and all(n == m or m and type(n) is str for n, m in zip(shape, x.shape))
    if not fits:
        raise ValueError(f"{name} must have shape ({', '.join(map(str, shape))}); got {tuple(x.shape)}")


def token_tensor(name, x, vocab_size, ignored=None):
    """Refuse what is no int64 tensor (B, T) of tokens, or `ignored`; a GPU is not made to wait for that."""
    if not isinstance(x, torch.Tensor) or x.dtype != torch.int64 or x.layout is not torch.strided:
        raise TypeError(f"{name} must be an int64 tensor; got {_kind(x)}")
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"{name} must have shape (B, T), neither of them 0; got {tuple(x.shape)}")
    readable = x.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and not bool((((x >= 0) & (x < vocab_size)) | (x == ignored if ignored else False)).all()):
        also = f"be {ignored} or " if ignored else ""
        raise ValueError(f"{name} must {also}lie in 0 .. {vocab_size - 1}; got {x.min()} .. {x.max()}")
