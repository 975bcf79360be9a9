"""Muon, with all matrices of one shape orthogonalised together."""

import math

import torch

from . import processes
from .device import multiplies_bfloat16


class Muon(torch.optim.Muon):
    """:class:`torch.optim.Muon`, with the same numbers, state and options, in fewer and larger products.

    A small model has dozens of small matrices of few shapes, and PyTorch takes them one by one, 15 products
    each.  The update is that of Keller Jordan's Muon: momentum, made orthogonal by `ns_steps` Newton-Schulz
    steps in bfloat16, times ``sqrt(max(1, rows / columns))``, or ``0.2 * sqrt(max(rows, columns))`` if
    `adjust_lr_fn` is "match_rms_adamw".  If a matrix lies in parts at several processes, each process
    puts the whole momentum together and keeps its part of the update.

    Chapter: 10_training
    """

    @torch.no_grad()
    def step(self, closure=None):
        """Perform a single optimization step; return the loss of `closure`, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(tuple(p.shape), []).append(p)
            for (rows, columns), matrices in shapes.items():
                grads = [p.grad for p in matrices]
                for p in matrices:
                    if "momentum_buffer" not in self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                ahead = momenta = [self.state[p]["momentum_buffer"] for p in matrices]
                torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
                if group["nesterov"]:
                    ahead = torch._foreach_lerp(grads, momenta, group["momentum"])
                options = (group[name] for name in ("ns_coefficients", "ns_steps", "eps"))
                update = orthogonalise(torch.stack([processes.whole(x) for x in ahead]), *options)
                factor = math.sqrt(max(1, rows / columns))
                if group["adjust_lr_fn"] == "match_rms_adamw":
                    factor = 0.2 * math.sqrt(max(rows, columns))
                update *= -group["lr"] * factor
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                update = update.to(matrices[0].dtype).unbind()
                torch._foreach_add_(matrices, [processes.part(x, p) for x, p in zip(update, matrices)])
        return loss


def orthogonalise(x, coefficients, steps, eps):
    """Take Newton-Schulz steps on each matrix of x (n, rows, columns): singular values near 1, in bfloat16.

    A CPU without instructions for bfloat16 takes 50 times as long for such a product as for one in float32.
    There the products are in float32 and their results are rounded to bfloat16: the same numbers, except for
    the order of sums.
    """
    a, b, c = coefficients
    native = multiplies_bfloat16(x.device)

    def fit(x):
        return x.bfloat16() if native else x.bfloat16().float()

    tall = x.shape[1] > x.shape[2]
    x = (x.mT if tall else x).bfloat16()
    x = fit(x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps))
    for _ in range(steps):
        gram = fit(x @ x.mT)
        x = fit(torch.baddbmm(x, fit(torch.baddbmm(gram, gram, gram, beta=b, alpha=c)), x, beta=a))
    return (x.mT if tall else x).bfloat16()
