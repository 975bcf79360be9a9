"""Arguments that do not fit are refused in words that name them, before memory is touched."""

import math
import operator
from numbers import Real

import numpy as np
import torch

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LARGEST = 2**31 - 1  # no size, number of passes or of tokens is beyond it


class Unfit(TypeError, ValueError):
    """A value of the wrong type, raised so that callers may catch either kind of error."""


def integer(name, value, low=None, high=None, hint=""):
    """Return `value`, a NumPy integer too, as an int; raise if it is none (True is none) or out of range."""
    limits = "" if low is None else f" of at least {low}" if high is None else f" in {low} .. {high}"
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise Unfit(f"{name} must be an int{limits}; got {value!r}{hint}")
    if high is None and number > LARGEST:
        raise ValueError(f"{name} must be an int of at most {LARGEST}; got {number}{hint}")
    if low is not None and number < low or high is not None and number > high:
        raise ValueError(f"{name} must be an int{limits}; got {number}{hint}")
    return number


def block_range(name, value, depth):
    """Return `value` as (first, last), a range of blocks out of `depth`; raise unless it is one."""
    try:
        first, last = (integer(name, value[i], 0, depth - 1) for i in range(len(value)))
        integer(name, last, first)
    except (TypeError, ValueError, KeyError):
        wanted = f"(first, last), 0 <= first <= last < {depth}"
        raise ValueError(f"{name} must be {wanted}; got {value!r}") from None
    return first, last


def token_tensor(name, x, vocab_size, ignored=None):
    """Raise unless x is int64 (B, T) and, where it can be read without waiting, holds tokens or `ignored`."""
    if not isinstance(x, torch.Tensor) or x.dtype != torch.int64 or x.layout is not torch.strided:
        kind = f"{x.dtype}, {x.layout}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"{name} must be an int64 tensor; got {kind}")
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"{name} must have shape (B, T), neither of them 0; got {tuple(x.shape)}")
    readable = x.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and not bool((((x >= 0) & (x < vocab_size)) | (x == ignored if ignored else False)).all()):
        also = f"be {ignored} or " if ignored else ""
        raise ValueError(f"{name} must {also}lie in 0 .. {vocab_size - 1}; got {x.min()} .. {x.max()}")


def check_tensor(name, x, shape, like=None, empty=True):
    """Raise unless x is a dense float tensor of this shape; a string is any size, ... any number of axes."""
    if not isinstance(x, torch.Tensor) or x.dtype not in FLOATS:
        kind = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a floating-point tensor; got {kind}")
    if x.layout is not torch.strided or x.is_nested:
        raise TypeError(f"{name} must be a dense tensor; got {'nested' if x.is_nested else x.layout}")
    if x.shape != shape or not empty:  # most shapes are given in full, and every kernel comes through here
        known, sizes = (shape[1:], x.shape[1 - len(shape) :]) if shape[0] is ... else (shape, x.shape)
        odd = [n for n, m in zip(known, sizes) if n != m and type(n) is not str]
        if odd or len(known) != len(sizes) or not empty and 0 in sizes:
            wanted = ", ".join("..." if n is ... else str(n) for n in shape)
            rest = ", none of them 0" * (not empty)
            raise ValueError(f"{name} must have shape ({wanted}){rest}; got {tuple(x.shape)}")
    if like is not None and x.device != like.device:
        raise ValueError(f"{name} is on {x.device}, what it goes with on {like.device}")


def finite_number(name, x, default=None, least=-math.inf):
    """x, a Python or NumPy number or a 0-dimensional array or tensor, as a float; `default` for None."""
    if type(x) is float and least <= x and abs(x) < 1e308:
        return x
    if x is None and default is not None:
        return default
    value = x
    if isinstance(x, (np.generic, np.ndarray)) or type(x) is torch.Tensor and not x.requires_grad:
        value = x.tolist() if x.ndim == 0 and str(getattr(x, "device", "")) != "meta" else None
    known = isinstance(value, Real) and not isinstance(value, bool)
    if not known or not least <= value or not abs(value) < 2**1023:
        bound = f" of at least {least}" if least > -math.inf else " or None" * (default is not None)
        raise ValueError(f"{name} must be a finite number{bound}; got {x!r}")
    return float(value)
