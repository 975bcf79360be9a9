"""Several processes on one run, as torchrun starts them: which one this is, and what all must agree on."""

import os
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


@contextmanager
def joined():
    """Join the processes that torchrun has started, for a `with` block; do nothing where it started none.

    On CUDA each process takes the GPU of its number on this machine, so that "cuda" means that GPU.
    """
    if _started() == 1 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        if (local := int(os.environ["LOCAL_RANK"])) >= (count := torch.cuda.device_count()):
            raise ValueError(f"process {local} of this machine has no GPU: there are {count}")
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def first():
    """Whether this process speaks for all: it is the only one, or number 0 (known even before they join)."""
    return _started() == 1 or os.environ["RANK"] == "0"


def rank():
    """Number of this process among all, from 0."""
    return dist.get_rank() if _together() else 0


def world():
    """How many processes there are."""
    return dist.get_world_size() if _together() else 1


def agreed(number):
    """The largest of the numbers that the processes bring: what one has noted, all then know."""
    if not _together():
        return number
    dist.all_reduce(found := torch.tensor(number), dist.ReduceOp.MAX)
    return int(found)


def summed(value):
    """A tensor summed over the processes."""
    if _together():
        dist.all_reduce(value)
    return value


def in_step(model, loss):
    """`loss`, a function of inputs and labels, with gradients in the `model` that are means over processes.

    PyTorch's DistributedDataParallel wraps a module whose forward is all of Algorithm 1: its hooks see each
    parameter once a step, however often the passes use it.  Alone, it is the plain module.
    """
    module = _Loss(model, loss)
    if not _together() or any(map(_in_parts, model.parameters())):
        return module
    return DistributedDataParallel(module)


def shard(model, device):
    """Keep only this process's part of each weight of a :class:`Sleepable`, on `device`, by PyTorch's FSDP2.

    A block is put together when it is called, the embedding and the readout once a step; the gradients that
    come out are means over processes, and also in parts.  All processes must have made the same model, on the
    CPU: FSDP2 moves one block after the other and keeps its part, so no device ever holds them all.
    """
    from torch.distributed.device_mesh import init_device_mesh  # not in every build of PyTorch
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (world(),))
    for block in model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for name in ("embed", "readout"):  # sleep calls these, not forward
        register_fsdp_forward_method(model, name)


def whole(x):
    """A tensor put together from its parts at all processes, which must all ask; any other as it is."""
    return x.full_tensor() if _in_parts(x) else x


def gathered(tensors):
    """A dict of tensors, whole, at the first process; an empty one at the others.  All must ask.

    Those in parts are put together one after the other and go to the CPU, so that a device holds one of them
    at a time; any other is as it is.
    """
    found = {}
    for name, x in tensors.items():
        x = whole(x).cpu() if _in_parts(x) else x
        if rank() == 0:
            found[name] = x
    return found


def part(x, like):
    """The rows of a whole tensor x that this process keeps of `like`; all of x unless `like` is in parts."""
    if not _in_parts(like):
        return x
    from torch.distributed.tensor import DTensor

    rows = -(-len(x) // world())  # FSDP2 shares out rows as chunk does: the last get fewer, or none
    own = x[rank() * rows : (rank() + 1) * rows].to(like.device, copy=True)  # a view would keep all of x
    options = dict(shape=x.shape, stride=x.stride(), run_check=False)
    return DTensor.from_local(own, like.device_mesh, like.placements, **options)


def _in_parts(x):
    """Whether a tensor is a DTensor."""
    return hasattr(x, "full_tensor")


class _Loss(nn.Module):
    """A module that holds the model and has the loss as its forward."""

    def __init__(self, model, loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, inputs, labels):
        return self.loss(inputs, labels)

    def no_sync(self):
        """Put nothing off: here either nobody waits for other processes, or every call does."""
        return nullcontext()


def _started():
    """How many processes torchrun has started; 1 where it has not."""
    together = dist.is_available() and dist.is_torchelastic_launched()
    return int(os.environ["WORLD_SIZE"]) if together else 1


def _together():
    return dist.is_available() and dist.is_initialized()
