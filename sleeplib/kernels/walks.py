"""The two computations that the tasks ask for, as loops: a cellular automaton and a walk on a graph."""

import numpy as np
from numba import njit

# new cell = RULE[4 * left + 2 * self + right]; read from 111 down to 000 it spells 01101110 = 110
RULE_110 = np.array([0, 1, 1, 1, 0, 1, 1, 0], dtype=np.uint8)


@njit(cache=True, nogil=True)
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
    ValueError
        If `cells` is not one row of zeros and ones, or `steps` is negative.

    Notes
    -----
    Chapter: 11_rule110
    """
    cells = np.asarray(cells)
    if cells.ndim != 1 or cells.size == 0 or not np.isin(cells, (0, 1)).all():
        raise ValueError(f"cells must be one row of zeros and ones; got shape {cells.shape}")
    if steps < 0:
        raise ValueError(f"steps must be at least 0; got {steps}")
    out = np.empty((steps + 1, cells.size), dtype=np.uint8)
    _history(cells.astype(np.uint8), steps, RULE_110, out)
    return out


@njit(cache=True, nogil=True)
def rule110_rollout(rows, width, steps):
    """Roll many rings of up to 63 cells at once, each packed into one integer (bit i = cell i).

    With bit i the cell itself, a rotation by one brings each neighbour into place, and Rule 110 is
    ``(self or right) and not (left and self and right)`` on all cells together.

    Parameters
    ----------
    rows : numpy.ndarray of uint64, shape (n,)
        The rings.
    width : int
        Cells in a ring, 1 to 63.
    steps : int
        How many steps to roll.

    Returns
    -------
    numpy.ndarray of uint64, shape (n,)

    Notes
    -----
    Chapter: 11_rule110
    """
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


@njit(cache=True, nogil=True)
def khop_walk(successor, start, hops):
    """Follow a directed graph in which every node has one successor.

    Parameters
    ----------
    successor : numpy.ndarray of int64, shape (n,)
        ``successor[i]`` is the node after node i.
    start : numpy.ndarray of int64, shape (m,)
        Where the walks start.
    hops : numpy.ndarray of int64, shape (m,)
        How many edges each walk follows.

    Returns
    -------
    numpy.ndarray of int64, shape (m,)
        Where the walks end.

    Notes
    -----
    Chapter: 12_depo
    """
    out = np.empty_like(start)
    for m in range(start.size):
        node = start[m]
        for _ in range(hops[m]):
            node = successor[node]
        out[m] = node
    return out
