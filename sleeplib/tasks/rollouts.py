"""The computations that the tasks ask for, as loops: a cellular automaton and a walk on a graph."""

import numpy as np

from ..checks import integer
from ..kernels.jit import numba_kernel

# new cell = RULE[4 * left + 2 * self + right]; read from 111 down to 000 it spells 01101110 = 110
RULE_110 = np.array([0, 1, 1, 1, 0, 1, 1, 0], dtype=np.uint8)


def _integers(name, values, below, dtype):
    """Return integers 0 .. below - 1 as a contiguous array (n,) of `dtype`, or raise, naming the argument."""
    array = np.asarray(values)
    if array.ndim != 1 or array.dtype.kind not in "biu":
        raise ValueError(f"{name} must be one row of integers; got {array.dtype} of shape {array.shape}")
    if array.size and not 0 <= int(array.min()) <= int(array.max()) < below:
        raise ValueError(f"{name} must lie in 0 .. {below - 1}; got {array.min()} .. {array.max()}")
    return np.ascontiguousarray(array, dtype=dtype)


@numba_kernel
def _history(cells, steps, rule, out):
    width = cells.shape[0]
    out[0] = cells
    for t in range(steps):
        for i in range(width):
            left, right = out[t, (i - 1) % width], out[t, (i + 1) % width]
            out[t + 1, i] = rule[4 * left + 2 * out[t, i] + right]


def rule110_history(cells, steps):
    """Every row of a Rule 110 rollout on a ring, straight from the rule table.

    Parameters
    ----------
    cells : array_like of {0, 1}, shape (width,)
        The first row.
    steps : int
        How many steps to roll.

    Returns
    -------
    numpy.ndarray of uint8, shape (steps + 1, width)

    Raises
    ------
    ValueError, TypeError
        If `cells` is not one row of zeros and ones, or `steps` not an int of at least 0.

    Notes
    -----
    Chapter: 11_rule110
    """
    cells = _integers("cells", cells, 2, np.uint8)
    if cells.size == 0:
        raise ValueError("cells must be one row of zeros and ones; got none")
    out = np.empty((integer("steps", steps, 0) + 1, cells.size), dtype=np.uint8)
    _history(cells, len(out) - 1, RULE_110, out)
    return out


@numba_kernel
def _rollout(rows, width, steps):
    out = np.empty_like(rows)
    one, last = np.uint64(1), np.uint64(width - 1)
    ring = (one << np.uint64(width)) - one
    for n in range(rows.size):
        row = rows[n]
        for _ in range(steps):
            left = ((row << one) | (row >> last)) & ring
            right = (row >> one) | ((row & one) << last)
            row = (row | right) & ~(left & row & right)
        out[n] = row
    return out


def rule110_rollout(rows, width, steps):
    """Roll many rings of up to 63 cells at once, each packed into one integer (bit i = cell i).

    With bit i the cell itself, a rotation by one brings each neighbour into place, and Rule 110 is
    ``(self or right) and not (left and self and right)`` on all cells together.

    Parameters
    ----------
    rows : array_like of int, shape (n,)
        The rings, each below ``2 ** width``.
    width : int
        Cells in a ring, 1 to 63.
    steps : int
        How many steps to roll.

    Returns
    -------
    numpy.ndarray of uint64, shape (n,)

    Raises
    ------
    ValueError, TypeError
        If an argument is not of this kind; the message names it.

    Notes
    -----
    Chapter: 11_rule110
    """
    width, steps = integer("width", width, 1, 63), integer("steps", steps, 0)
    return _rollout(_integers("rows", rows, 2**width, np.uint64), width, steps)


@numba_kernel
def _walk(successor, start, hops):
    out = np.empty_like(start)
    for m in range(start.size):
        node = start[m]
        for _ in range(hops[m]):
            node = successor[node]
        out[m] = node
    return out


def khop_walk(successor, start, hops):
    """Follow a directed graph in which every node has one successor.

    Parameters
    ----------
    successor : array_like of int, shape (n,)
        ``successor[i]`` is the node after node i.
    start : array_like of int, shape (m,)
        Where the walks start.
    hops : array_like of int, shape (m,)
        How many edges each walk follows.

    Returns
    -------
    numpy.ndarray of int64, shape (m,)
        Where the walks end.

    Raises
    ------
    ValueError
        If an argument is not one row of integers, a node does not exist, or `hops` is negative or not as long
        as `start`.

    Notes
    -----
    Chapter: 12_depo
    """
    nodes = np.size(successor)
    successor = _integers("successor", successor, nodes, np.int64)
    start = _integers("start", start, nodes, np.int64)
    hops = _integers("hops", hops, 2**63, np.int64)
    if hops.shape != start.shape:
        raise ValueError(f"hops must have the shape of start, {start.shape}; got {hops.shape}")
    return _walk(successor, start, hops)
