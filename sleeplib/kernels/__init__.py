"""The recurrences of the book, each written several times and tested against its slowest form.

==========  ==============================================================================
backend     what it is
==========  ==============================================================================
reference   Numba loops, forward and analytic backward (CPU); reads like the equations
chunked     the WY form in PyTorch, any device; matrix products instead of a token loop
wy          the same with loops between the products and an analytic backward (CPU, Numba on)
fla         flash-linear-attention's Triton kernels (CUDA, optional)
auto        reference for small states or few tokens on the CPU, wy for others, chunked elsewhere
==========  ==============================================================================

``naive.py`` holds the plain PyTorch that every kernel here is a faster form of.  After ``use_numba(False)``
it runs in place of the loops: "reference" is then its token loop, on any device, and "auto" and "wy" are
"chunked".  An argument that does not fit is refused by name everywhere (ValueError, TypeError), before memory
is touched.
"""

from contextlib import nullcontext

import torch

from ..checks import check_tensor, finite_number
from . import chunked, fla, reference, wy
from .attention import apply_rotary, softmax_attention
from .convolution import causal_convolution, prepend_context
from .gate import swiglu
from .jit import compiled, plain, use_numba
from .norm import l2_normalize, rms_norm, split_heads

__all__ = ["apply_rotary", "causal_convolution", "compiled", "gated_delta_rule", "gated_hebbian_rule"]
__all__ += ["l2_normalize", "prepend_context", "rms_norm", "softmax_attention", "split_heads", "swiglu"]
__all__ += ["use_numba"]

BACKENDS = ("auto", "reference", "chunked", "wy", "fla")
SMALL_STATE = 4096  # K * V up to which the loop beats matrix products on a CPU (python -m sleeplib bench)
FEW_TOKENS = 8  # and tokens up to which it does so for any state


def gated_delta_rule(q, k, v, *, g, beta, initial_state=None, scale=None, backend="auto", validate=None):
    r"""Gated delta rule: decay the memory, read it, write the error, read the answer.

    .. math:: S_t = \alpha_t S_{t-1} (I - \beta_t k_t k_t^\top) + \beta_t v_t k_t^\top,
              \qquad o_t = S_t q_t

    This is equation (3) of the paper, in its letters, with the delta-rule correction of its section 3.1; here
    the state is stored key-first, so the code computes ``o = scale * S.T @ q``.  Raises ValueError on a shape
    that does not fit, an unknown backend, or `g` that is positive or NaN; TypeError on an argument that is
    not a dense floating-point tensor, or on float64 mixed with other precisions.

    Parameters
    ----------
    q, k, v : torch.Tensor, shapes (B, T, H, K), (B, T, H, K) and (B, T, H, V)
        Queries, keys and values.  Keys are expected to have norm at most 1, else writes may overshoot.
    g, beta : torch.Tensor, shape (B, T, H)
        Log decay g, at most 0, ``-inf`` allowed: ``alpha = exp(g)``; writing strength, usually in (0, 1).
    initial_state : torch.Tensor, shape (B, H, K, V), optional
        The fast weight before the first token; zeros if absent.
    scale : float, optional
        Factor on the output, ``K ** -0.5`` if absent.
    backend : {"auto", "reference", "chunked", "wy", "fla"}
        Which implementation runs; all are differentiable in every tensor.
    validate : bool, optional
        Check the values of `g` too.  Done by default on the CPU, unless traced; elsewhere it costs a sync.

    Returns
    -------
    o : torch.Tensor, shape (B, T, H, V)
        Outputs, in the dtype of `v`.
    S : torch.Tensor, shape (B, H, K, V)
        The fast weight after the last token: float64 for float64 inputs, else float32.

    Notes
    -----
    Chapter: 04_delta_rule
    """
    return _dispatch(q, k, v, g, beta, initial_state, scale, backend, validate, delta=True)


def gated_hebbian_rule(q, k, v, *, g, beta, initial_state=None, scale=None, backend="auto", validate=None):
    r"""Gated Hebbian rule, equation (3): write without reading first.

    .. math:: S_t = \alpha_t S_{t-1} + \beta_t v_t k_t^\top, \qquad o_t = S_t q_t

    Arguments, shapes, results and errors are those of :func:`gated_delta_rule`.

    Chapter: 03_fast_weights
    """
    return _dispatch(q, k, v, g, beta, initial_state, scale, backend, validate, delta=False)


def _dispatch(q, k, v, g, beta, S, scale, backend, validate, delta):
    _check(q, k, v, g, beta, S, backend)
    (B, T, H, K), V = q.shape, v.shape[3]
    scale = finite_number("scale", scale, K**-0.5)
    if plain(g) if validate is None else validate:
        if not bool((g <= 0).all()):
            raise ValueError("g: log decays must be at most 0 and not NaN (alpha = exp(g) lies in [0, 1])")
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    S = q.new_zeros(B, H, K, V, dtype=wide) if S is None else S.to(wide)
    # Under autocast the products of a recurrence would lose the state's precision, pass by pass.
    kind = q.device.type
    known = kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind)  # asking stops a compiler
    with torch.autocast(kind, enabled=False) if known else nullcontext():
        if backend == "fla":
            o, S = fla.recurrence(q, k, v, g, beta, S, scale, delta)
        else:
            inputs = *(x.to(wide) for x in (q, k, v, g, beta)), S
            if backend == "auto":
                small = K * V <= SMALL_STATE or T <= FEW_TOKENS
                backend = ("reference" if small else "wy") if compiled(*inputs) else "chunked"
            if backend in ("reference", "wy") and kind != "cpu" and use_numba.on:
                raise ValueError(f"backend={backend!r} runs on the CPU only; q is on {q.device}")
            run = dict(reference=reference, chunked=chunked, wy=wy)[backend].recurrence
            o, S = run(*inputs, scale, delta)
    return o.to(v.dtype), S


def _check(q, k, v, g, beta, S, backend):
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    check_tensor("q", q, ("B", "T", "H", "K"), empty=False)
    check_tensor("v", v, (*q.shape[:3], "V"), like=q, empty=False)
    (B, T, H, K), V = q.shape, v.shape[3]
    for name, x, shape in (("k", k, q.shape), ("g", g, (B, T, H)), ("beta", beta, (B, T, H))):
        check_tensor(name, x, shape, like=q)
    if S is not None:
        check_tensor("initial_state", S, (B, H, K, V), like=q)
        if (S.dtype == torch.float64) != (v.dtype == torch.float64):
            raise TypeError(f"initial_state is {S.dtype}, v is {v.dtype}: float64 goes with float64 only")
    # float64 is for proofs: a float32 argument among float64 ones would quietly spoil them.
    dtypes = dict(q=q.dtype, k=k.dtype, v=v.dtype, g=g.dtype, beta=beta.dtype)
    odd = [name for name, dtype in dtypes.items() if dtype != torch.float64]
    if odd and len(odd) < len(dtypes):
        raise TypeError(f"{odd[0]} is {dtypes[odd[0]]} among float64 arguments: use one precision")
