"""The recurrences of the book, each written several times and tested against its slowest form.

==========  ==============================================================================
backend     what it is
==========  ==============================================================================
reference   Numba loops, forward and analytic backward (CPU); reads like the equations
chunked     the WY form in PyTorch, any device; matrix products instead of a token loop
fla         flash-linear-attention's Triton kernels (CUDA, optional)
auto        reference for small states on the CPU, chunked for the rest
==========  ==============================================================================
"""

import math

import torch

from . import chunked, fla, reference
from .attention import rotate_pairs, softmax_attention
from .convolution import causal_convolution, with_context
from .gate import swiglu
from .norm import rms_norm, unit, unit_heads

__all__ = [
    "causal_convolution",
    "gated_delta_rule",
    "gated_hebbian_rule",
    "rms_norm",
    "rotate_pairs",
    "softmax_attention",
    "swiglu",
    "unit",
    "unit_heads",
    "with_context",
]

BACKENDS = ("auto", "reference", "chunked", "fla")
SMALL_STATE = 4096  # K * V up to which the loop beats matrix products on a CPU (python -m sleeplib bench)


def gated_delta_rule(q, k, v, *, g, beta, initial_state=None, scale=None, backend="auto", validate=None):
    r"""Gated delta rule: decay the memory, read it, write the error, read the answer.

    .. math:: S_t = \alpha_t S_{t-1} (I - \beta_t k_t k_t^\top) + \beta_t v_t k_t^\top,
              \qquad o_t = S_t q_t

    (the paper's letters; here the state is stored key-first, so the code computes ``o = scale * S.T @ q``).

    Parameters
    ----------
    q, k : torch.Tensor, shape (B, T, H, K)
        Queries and keys.  Keys are expected to have norm at most 1, else writes may overshoot.
    v : torch.Tensor, shape (B, T, H, V)
        Values.
    g : torch.Tensor, shape (B, T, H)
        Log decay, ``alpha = exp(g)``; at most 0, ``-inf`` allowed.
    beta : torch.Tensor, shape (B, T, H)
        Writing strength, usually in (0, 1).
    initial_state : torch.Tensor, shape (B, H, K, V), optional
        The fast weight before the first token; zeros if absent.
    scale : float, optional
        Factor on the output, ``K ** -0.5`` if absent.
    backend : {"auto", "reference", "chunked", "fla"}
        Which implementation runs; all are differentiable in every tensor.
    validate : bool, optional
        Check the values of `g` too.  Defaults to True on the CPU and False elsewhere, where it costs a sync.

    Returns
    -------
    o : torch.Tensor, shape (B, T, H, V)
        Outputs, in the dtype of `v`.
    S : torch.Tensor, shape (B, H, K, V)
        The fast weight after the last token: float64 for float64 inputs, else float32.

    Raises
    ------
    ValueError
        On a shape that does not fit, an unknown backend, or `g` that is positive or NaN.
    TypeError
        On an argument that is not a floating-point tensor, or on mixed dtypes.

    Notes
    -----
    Equation (3) of the paper with the delta-rule correction of its section 3.1.

    Chapter: 04_delta_rule
    """
    return _dispatch(q, k, v, g, beta, initial_state, scale, backend, validate, delta=True)


def gated_hebbian_rule(q, k, v, *, g, beta, initial_state=None, scale=None, backend="auto", validate=None):
    r"""Gated Hebbian rule, equation (3): write without reading first.

    .. math:: S_t = \alpha_t S_{t-1} + \beta_t v_t k_t^\top, \qquad o_t = S_t q_t

    Arguments, shapes, results and errors are those of :func:`gated_delta_rule`.

    Parameters
    ----------
    q, k : torch.Tensor, shape (B, T, H, K)
    v : torch.Tensor, shape (B, T, H, V)
    g, beta : torch.Tensor, shape (B, T, H)
    initial_state : torch.Tensor, shape (B, H, K, V), optional
    scale : float, optional
    backend : {"auto", "reference", "chunked", "fla"}
    validate : bool, optional

    Returns
    -------
    o : torch.Tensor, shape (B, T, H, V)
    S : torch.Tensor, shape (B, H, K, V)

    Notes
    -----
    Chapter: 03_fast_weights
    """
    return _dispatch(q, k, v, g, beta, initial_state, scale, backend, validate, delta=False)


def _dispatch(q, k, v, g, beta, S, scale, backend, validate, delta):
    _check(q, k, v, g, beta, S, scale, backend)
    B, _, H, K = q.shape
    V = v.shape[3]
    if validate if validate is not None else q.device.type == "cpu":
        if not bool((g <= 0).all()):
            raise ValueError("g: log decays must be at most 0 and not NaN (alpha = exp(g) lies in [0, 1])")
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    S = q.new_zeros(B, H, K, V, dtype=wide) if S is None else S.to(wide)
    scale = K**-0.5 if scale is None else scale
    if backend == "auto":
        backend = "reference" if q.device.type == "cpu" and K * V <= SMALL_STATE else "chunked"
    # Under autocast the products of a recurrence would lose the state's precision, pass by pass.
    with torch.autocast(q.device.type, enabled=False):
        if backend == "fla":
            o, S = fla.recurrence(q, k, v, g, beta, S, scale, delta)
        else:
            if backend == "reference" and q.device.type != "cpu":
                raise ValueError(f"backend='reference' runs on the CPU only; q is on {q.device}")
            run = reference.recurrence if backend == "reference" else chunked.recurrence
            o, S = run(*(x.to(wide) for x in (q, k, v, g, beta)), S, scale, delta)
    return o.to(v.dtype), S


def _check(q, k, v, g, beta, S, scale, backend):
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    tensors = dict(q=q, k=k, v=v, g=g, beta=beta)
    for name, x in tensors.items():
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
            raise TypeError(f"{name} must be a floating-point tensor; got {kind}")
    if q.ndim != 4 or min(q.shape) < 1:
        raise ValueError(f"q must have shape (B, T, H, K), none of them 0; got {tuple(q.shape)}")
    B, T, H, K = q.shape
    if v.ndim != 4 or v.shape[3] < 1:
        raise ValueError(f"v must have shape (B, T, H, V), V at least 1; got {tuple(v.shape)}")
    wanted = dict(k=(B, T, H, K), v=(B, T, H, v.shape[3]), g=(B, T, H), beta=(B, T, H))
    for name, shape in wanted.items():
        if tensors[name].shape != shape:
            raise ValueError(
                f"{name} must have shape {shape} to fit q {tuple(q.shape)}; got {tuple(tensors[name].shape)}"
            )
    for name, x in tensors.items():
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, q on {q.device}")
    # float64 is for proofs: a float32 argument among float64 ones would quietly spoil them.
    doubles = {name for name, x in tensors.items() if x.dtype == torch.float64}
    if S is not None:
        if not isinstance(S, torch.Tensor) or not S.is_floating_point():
            raise TypeError("initial_state must be a floating-point tensor or None")
        if S.shape != (B, H, K, v.shape[3]):
            raise ValueError(
                f"initial_state must have shape (B, H, K, V) = {(B, H, K, v.shape[3])}; got {tuple(S.shape)}"
            )
        if S.device != q.device:
            raise ValueError(f"initial_state is on {S.device}, q on {q.device}")
        if (S.dtype == torch.float64) != ("v" in doubles):
            raise TypeError(f"initial_state is {S.dtype}, v is {v.dtype}: float64 goes with float64 only")
    if doubles and len(doubles) < len(tensors):
        odd = next(name for name in tensors if name not in doubles)
        raise TypeError(f"{odd} is {tensors[odd].dtype} among float64 arguments: use one precision")
    if scale is not None and not (isinstance(scale, (int, float)) and math.isfinite(scale)):
        raise ValueError(f"scale must be a finite number or None; got {scale!r}")
