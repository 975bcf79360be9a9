"""Which optimizer takes which parameter, and how the learning rate changes."""

import torch

from .muon import Muon

OUTER = ("embedding.", "head.")  # matrices that Muon leaves to AdamW
SLOTS = ("momentum_buffer",), ("step", "exp_avg", "exp_avg_sq")  # what Muon and AdamW keep of a parameter


def make_optimizers(model, train):
    """Muon for the hidden matrices, AdamW for embeddings, head, norms, biases, filters and decay rates.

    What needs no gradient when this is called is left out.  Low-rank differences go to AdamW: an orthogonal
    step is made for a whole matrix, and neither of their two factors is one.

    Chapter: 10_training
    """
    matrices, rest = [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        hidden = p.ndim == 2 and not name.startswith(OUTER) and not name.endswith("conv.weight")
        hidden = hidden and ".lora_" not in name
        (matrices if hidden else rest).append(p)
    decayed, plain = [p for p in rest if p.ndim == 2], [p for p in rest if p.ndim != 2]
    muon = Muon([{"params": matrices}], lr=train.muon_lr, momentum=0.95, weight_decay=train.weight_decay)
    groups = [{"params": decayed, "weight_decay": train.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=train.adamw_lr, betas=(0.9, 0.95), fused=True)
    return muon, adamw


def schedule(step, train):
    """Factor on Muon's learning rate at a step: it warms up, stays at 1, and decays."""
    up = (step + 1) / train.warmup if train.warmup else 1.0
    down = (train.steps - step) / train.decay if train.decay else 1.0
    return min(1.0, up, down)
