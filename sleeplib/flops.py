"""What a model costs: operations and memory of a training step, bytes carried on, parameters."""

import dataclasses
import weakref
from functools import lru_cache
from importlib.util import find_spec

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .algorithm import awake_chunks, sleep_forward
from .checks import integer
from .experiments import get
from .kernels import use_numba
from .model import ModelConfig

# The share of its prediction that a step's peak takes: on an H200 it was .63 and .66 where a step is captured
# and fused; where it is not, the allocator wastes some.
CAPTURED, EAGER = 0.75, 1.1


def training_flops(experiment, passes):
    """Floating-point operations of one training step: three times the products of a forward pass.

    A token costs two operations for each matrix entry in each pass; attention adds its scores and sums, a
    fast weight its read, its write and its output.  Norms, gates and convolutions are left out, and so is
    what follows the last write before a window is dropped.  `experiment` is an Experiment or a preset's name,
    `passes` is N; windows with labels are read once.  For a rival of sleep, or a pretrained model,
    :func:`counted_flops` counts what is computed.

    Chapter: 11_rule110
    """
    experiment = get(experiment)
    if type(experiment.model) is not ModelConfig:
        return counted_flops(experiment, passes)
    model, task = experiment.model, experiment.task
    first, last = model.loop or (0, len(model.pattern) - 1)
    D, H, K, V = model.d_model, model.num_heads, model.K, model.V
    mlp, end = 6 * D * model.hidden, len(model.pattern) - 1
    awake = awake_chunks(task.batch(1, np.random.default_rng(0)).labels, task.window)
    total = 0
    for index, asked in enumerate(awake):
        tokens = min(task.window, task.length - index * task.window)
        asleep = not asked and tokens == task.window
        for i, kind in enumerate(model.pattern):
            if kind == "a":
                write, read = 6 * D * D, 2 * D * D + 2 * D * (tokens + 1)
            else:
                write, read = 2 * D * H * (2 * K + 2 * V + 2) + 6 * H * K * V, 2 * D * H * V
            repeats = passes if first <= i <= last and asleep else 1
            total += repeats * tokens * (write + read + mlp)
            if asleep and i == end:  # after the last write nobody reads
                total -= tokens * (read + mlp)
        total += asked * tokens * 2 * D * model.vocab_size
    return 3.0 * experiment.train.batch * total


def counted_flops(experiment, passes):
    """Floating-point operations of one training step, as PyTorch's own counter of matrix products has them.

    One sequence is counted, in plain PyTorch (a compiled loop shows no products), and multiplied by the batch
    size.

    Chapter: 15_argument
    """
    experiment = get(experiment)
    return experiment.train.batch * _counted(experiment.task, experiment.model, passes)


@lru_cache
def _counted(task, config, passes):
    from torch.utils.flop_counter import FlopCounterMode  # loads half of PyTorch's compiler

    model, batch = _fresh(task, config)
    with use_numba(False), FlopCounterMode(display=False) as counter:
        sleep_forward(model, *batch[:2], window=task.window, passes=passes).loss.backward()
    return float(counter.get_total_flops())


def carried_bytes(experiment, passes):
    """Bytes that a model carries from the last window of the context to the question, for one sequence.

    Chapter: 15_argument
    """
    experiment = get(experiment)
    task = experiment.task
    model, batch = _fresh(task, experiment.model)
    begin = awake_chunks(batch.labels, task.window).index(True) * task.window
    before = (x[:, :begin] for x in batch[:2])
    with torch.no_grad():
        out = sleep_forward(model, *before, window=task.window, passes=passes, return_logits=False)
    return out.state.clone().nbytes()


def parameters(experiment):
    """How many parameters a model has.

    Chapter: 15_argument
    """
    return sum(p.numel() for p in _fresh(get(experiment).task, get(experiment).model)[0].parameters())


def training_bytes(experiment, passes, batch=None, precision=None, world=1):
    """Predicted peak memory of one training step on a GPU, in bytes, when nothing is captured or fused.

    The step is followed on tensors without numbers (device "meta"), where the code takes the branches that it
    takes on a GPU, and the bytes alive at a time are counted.  To these are added 16 bytes a parameter: for
    weights, gradients and what the optimizers keep.  It takes a second or two on one core,
    whatever the batch.

    Parameters
    ----------
    experiment : Experiment or str
        Or a preset's name.
    passes : int
        N.
    batch : int, optional
        Sequences at a time; those of the experiment's training if absent.
    precision : {"float32", "bfloat16"}, optional
        What products are computed in; the experiment's if absent.
    world : int
        Processes that share weights, gradients and what the optimizers keep, see :func:`processes.shard`.
        To a process' share is then added what is put together at a time: embedding, readout and two blocks.
        This part was not measured.

    Returns
    -------
    int
        Without what kernels need for themselves, and what the allocator of a GPU wastes.

    Raises
    ------
    ValueError
        If an argument does not fit.

    Notes
    -----
    This decides how a batch is divided, and errs on the safe side: gradients are counted twice, and 12 of the
    16 bytes would do for what Muon moves.  :func:`step_bytes`, for tables of what pretrained models cost,
    counts them as they are.

    Chapter: 10_training
    """
    experiment = get(experiment)
    task, train = experiment.task, experiment.train
    batch = train.batch if batch is None else integer("batch", batch, 1)
    precision = train.precision if precision is None else precision
    if precision not in ("float32", "bfloat16"):
        raise ValueError(f"precision must be float32 or bfloat16; got {precision!r}")
    options = integer("passes", passes, 1), batch, precision, train.checkpoint
    options += train.eviction_at(train.steps), integer("world", world, 1)
    return _followed(task, experiment.model, *options)


def fitting_parts(experiment, passes, free, precision, world=1):
    """The smallest number of parts, a power of two, in which a batch fits into `free` bytes of a GPU.

    At most one part a sequence; None if not even that fits.  A part needs its :func:`training_bytes`, of a
    process' share, times CAPTURED where the step is captured and fused, else EAGER.  With ``train.shard``
    the `world` processes share the weights too.

    Chapter: 11_rule110
    """
    experiment = get(experiment)
    train = experiment.train
    share = -(-train.batch // world)
    captured = train.graph and world == 1 and find_spec("triton") is not None

    def bytes_in(parts):
        return training_bytes(experiment, passes, -(-share // parts), precision, world if train.shard else 1)

    if (CAPTURED if captured else EAGER) * (whole := bytes_in(1)) <= free:
        return 1
    parts = 2
    while parts < 2 * share:
        # Half a batch takes half of its bytes or more: what that rules out need not be followed.
        if EAGER * whole / parts <= free and EAGER * bytes_in(parts) <= free:
            return min(parts, share)
        parts *= 2
    return None


@lru_cache(maxsize=256)
def _followed(task, config, passes, batch, precision, checkpoint, eviction, world):
    model, one = _fresh(task, config, backend="chunked", numbers=False)
    awake = awake_chunks(one.labels, task.window)
    inputs, labels = (x.expand(batch, -1).contiguous().to("meta") for x in (one.inputs, one.labels))
    options = dict(window=task.window, passes=passes, eviction=eviction, checkpoint=checkpoint)
    return followed_bytes(model, inputs, labels, awake, precision, **options) + _own(model, world)


def _own(model, world):
    """Bytes of the weights and of all that training adds, at one of `world` processes that share them."""

    def size(module, learning):  # of what does not learn, the weight alone
        return sum(
            p.numel() * (learning if p.requires_grad else p.element_size()) for p in module.parameters()
        )

    share = -(-size(model, 16) // world)  # weight, gradient, and two numbers of an optimizer in float32
    if world == 1:
        return share
    blocks = [size(block, 8) for block in model.layers]  # whole: weight and gradient
    return share + size(model, 8) - sum(blocks) + 2 * max(blocks)  # one in use, the next on its way


def followed_bytes(model, inputs, labels, awake, precision="float32", **options):
    """The most bytes alive at a time, besides the parameters, in a step followed on device "meta".

    `options` are those of :func:`sleep_forward`; gradients are counted as they arise.

    Chapter: 16_pretrained
    """
    cuda, names = _AsOnCuda(precision == "bfloat16"), ("consolidate", "predict")
    for name in names:  # also where recomputation calls them again
        setattr(model, name, cuda.around(getattr(model, name)))
    model.zero_grad()
    try:
        with LiveBytes() as live:
            out = sleep_forward(model, inputs, labels, awake=awake, return_logits=False, **options)
            out.loss.backward()
    finally:
        model.zero_grad()
        for name in names:
            delattr(model, name)
    return live.peak


class LiveBytes(TorchDispatchMode):
    """Count the bytes of tensors that are made within `with` and are alive at the same time.

    Two tensors on one storage count once; what was there before does not count.

    Attributes
    ----------
    now, peak : int

    Chapter: 10_training
    """

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.sizes = 0, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in _tensors((args, kwargs))}
        out = function(*args, **kwargs or {})
        for x in _tensors(out):
            storage = x.untyped_storage()
            if (key := storage._cdata) not in given and key not in self.sizes:
                self.sizes[key] = storage.nbytes()
                self.now += self.sizes[key]
                weakref.finalize(storage, self._gone, key)
        self.peak = max(self.peak, self.now)  # what the operation read is alive as well
        return out

    def _gone(self, key):
        self.now -= self.sizes.pop(key)


def _tensors(x):
    """Every tensor among the arguments or results of an operation."""
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, (tuple, list)):
        for part in x:
            yield from _tensors(part)
    elif isinstance(x, dict):
        yield from _tensors(tuple(x.values()))


class _AsOnCuda(TorchFunctionMode):
    """On device "meta" make what a GPU would: products in bfloat16 if `low`, attention in one operation.

    There is no autocast for "meta".  This one does what CUDA's does to a model's products: a leaf is cast
    once, everything else each time.
    """

    def __init__(self, low):
        super().__init__()
        self.low, self.cast = low, {}

    def around(self, function):
        """The same function, called within this mode."""

        def inside(*args, **kwargs):
            with self:
                return function(*args, **kwargs)

        return inside

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.linear:
            return F.linear(*map(self._lower, args), **kwargs)
        if function is F.scaled_dot_product_attention:
            q, k, v = map(self._lower, args)
            mask, causal = kwargs["attn_mask"], kwargs["is_causal"]
            # It makes what CUDA's kernels make: the output, and a number a query for the backward pass.
            flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            mask = None if mask is None else q.new_zeros(mask.shape)
            return flash(q, k, v, 0.0, causal, attn_mask=mask)[0]
        return function(*args, **kwargs)

    def _lower(self, x):
        if not self.low or x is None or x.dtype != torch.float32:
            return x
        if not (x.is_leaf and x.requires_grad):
            return x.to(torch.bfloat16)
        if id(x) not in self.cast:
            self.cast[id(x)] = x.to(torch.bfloat16)
        return self.cast[id(x)]


def _fresh(task, config, backend="reference", numbers=True):
    """A new model, and one sequence; the global random state stays as it was.

    Without `numbers` it is made of its settings alone, on device "meta".
    """
    with torch.random.fork_rng(devices=[]):
        config = dataclasses.replace(config, backend=backend)
        model = config.build() if numbers else config.on_meta()
    return model, task.batch(1, np.random.default_rng(0))
