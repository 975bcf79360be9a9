"""An optional bridge to flash-linear-attention's Triton kernels on CUDA."""

from .chunked import LOWEST


def recurrence(q, k, v, g, beta, S, scale, delta):
    """Run fla's chunked kernels: o (B, T, H, V) and the last state (B, H, K, V), float32."""
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError as error:
        wanted = "flash-linear-attention and Triton: pip install flash-linear-attention"
        raise ImportError(f"backend='fla' needs {wanted}") from error
    if q.device.type != "cuda":
        raise ValueError(f"backend='fla' runs on CUDA only; q is on {q.device}")
    g = g.clamp(min=LOWEST)  # its kernels subtract running sums, and -inf minus -inf is NaN
    options = dict(g=g, scale=scale, initial_state=S, output_final_state=True)
    if delta:
        return chunk_gated_delta_rule(q, k, v, beta=beta, **options)
    return chunk_simple_gla(q, k, (v * beta.unsqueeze(-1)).to(v.dtype), **options)
