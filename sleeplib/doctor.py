"""What this machine has, and whether sleeplib works on it."""

import json
from importlib import import_module

import torch

from . import records
from .kernels import gated_delta_rule


def examine():
    """Yield a text on each thing examined, and whether it is as it should be."""
    yield json.dumps(records.versions() | {"processor": records.processor()}, indent=1), True
    cuda = torch.cuda.is_available()
    yield f"cuda: {torch.cuda.get_device_name() if cuda else 'none, the CPU is used'}", True
    for name in ("fla", "triton", "transformers", "ipywidgets", "seaborn"):
        try:
            import_module(name)
            yield f"{name}: found", True
        except ImportError:
            yield f"{name}: not installed (optional)", True
    try:
        records.check_writable("records", records.results_dir())
        yield f"records go to {records.results_dir()}", True
    except OSError as error:
        yield str(error), False
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 9, 2, 4, generator=generator) for _ in range(3))
    g, beta = -torch.rand(2, 9, 2, generator=generator), torch.rand(2, 9, 2, generator=generator)
    k = k / k.norm(dim=-1, keepdim=True)
    slow = gated_delta_rule(q, k, v, g=g, beta=beta, backend="reference")[0]
    for device in ["cpu"] + ["cuda"] * cuda:
        tensors = dict(g=g.to(device), beta=beta.to(device))
        fast = gated_delta_rule(*(x.to(device) for x in (q, k, v)), **tensors, backend="chunked")[0].cpu()
        error = (slow - fast).abs().max().item()
        good = error < 1e-4
        yield f"chunked on {device} against the reference: {'ok' if good else f'off by {error}'}", good
