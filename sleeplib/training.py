"""The one visible training loop: Muon and AdamW, the same data for every N, resumable to the bit."""

import hashlib
import math
import os
import signal
import threading
import time
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from tqdm import tqdm

from .algorithm import awake_chunks, sleep_forward
from .device import CapturedStep, find_device, hold_on_to_memory, peak_bytes
from .model import HybridLM
from .muon import Muon
from .tasks import stream
from .tasks.base import IGNORE

DATA, TEST = 0, 1  # streams of random numbers; neither depends on N


def make_optimizers(model, train):
    """Muon for the hidden matrices, AdamW for embeddings, head, norms, biases, filters and decay rates.

    Parameters
    ----------
    model : HybridLM
    train : TrainConfig

    Returns
    -------
    tuple of torch.optim.Optimizer
        Muon, AdamW.

    Notes
    -----
    Muon's update is scaled by ``sqrt(max(1, rows / columns))``.

    Chapter: 11_rule110
    """
    matrices, rest = [], []
    for name, p in model.named_parameters():
        hidden = p.ndim == 2 and name.startswith("layers.") and not name.endswith("conv.weight")
        (matrices if hidden else rest).append(p)
    decayed = [p for p in rest if p.ndim == 2]
    plain = [p for p in rest if p.ndim != 2]
    muon = Muon(
        matrices,
        lr=train.muon_lr,
        momentum=0.95,
        nesterov=True,
        ns_steps=5,
        weight_decay=train.weight_decay,
        adjust_lr_fn="original",
    )
    groups = [{"params": decayed, "weight_decay": train.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=train.adamw_lr, betas=(0.9, 0.95), fused=True)
    return muon, adamw


def schedule(step, train):
    """Factor on Muon's learning rate at a step: warm up, stay, decay."""
    up = (step + 1) / train.warmup if train.warmup else 1.0
    down = (train.steps - step) / train.decay if train.decay else 1.0
    return min(1.0, up, down)


def training_flops(experiment, passes):
    """Floating-point operations of one training step: three times the products of a forward pass.

    A token costs two operations a matrix entry and pass; attention adds its scores and sums, a fast weight
    its read, its write and its output.  Norms, gates and convolutions are left out, and so is what follows
    the last write before a window is dropped.

    Parameters
    ----------
    experiment : Experiment
    passes : int
        N; windows with labels are read once.

    Returns
    -------
    float

    Notes
    -----
    Chapter: 11_rule110
    """
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


def training_batch(task, train, seed, step):
    """The batch of one step: a function of the seed and the step alone, so every N sees the same."""
    return task.batch(train.batch, np.random.default_rng([seed, DATA, step]), split="train")


def held_out(task, count, seed, split="test"):
    """Sequences for scoring, drawn once a seed; `split` "train" gives new ones from the training split."""
    return task.batch(count, np.random.default_rng([seed, TEST]), split=split)


@torch.no_grad()
def evaluate(model, task, batch, *, passes, eviction="hard", chunk=256):
    """Score a model on a batch, asleep and awake as in training.

    Parameters
    ----------
    model : HybridLM
    task : Rule110
        Any task of :mod:`sleeplib.tasks`.
    batch : Batch
    passes : int
        N; need not be the N of training.
    eviction : {"hard", "keys", "sliding"}
    chunk : int
        Sequences at a time.

    Returns
    -------
    dict of str to float
        See the task's ``score``.

    Notes
    -----
    What lies before the first question is read without logits, and only the logits of labels are kept: at
    3,301 tokens of 1,160 words those of all positions would take 15 MB a sequence.

    Chapter: 11_rule110
    """
    device = model.head.weight.device
    options = dict(window=task.window, passes=passes, eviction=eviction)
    awake = awake_chunks(batch.labels, task.window)
    begin = awake.index(True) * task.window
    logits = []
    for inputs, labels in zip(batch.inputs.to(device).split(chunk), batch.labels.split(chunk), strict=True):
        state = None
        if begin:
            before = inputs[:, :begin], labels[:, :begin]
            state = sleep_forward(model, *before, return_logits=False, **options).state
        inputs, labels = inputs[:, begin:], labels[:, begin:]
        out = sleep_forward(model, inputs, labels, state=state, **options)
        logits.append(out.logits[(labels != IGNORE).to(device)].float().cpu())
    return task.score(torch.cat(logits), batch)


def data_hash(*batches):
    """Sixteen hex digits of the tokens and labels of some batches."""
    digest = hashlib.sha256()
    for batch in batches:
        for x in (batch.inputs, batch.labels):
            digest.update(x.numpy().astype("<i8").tobytes())
    return digest.hexdigest()[:16]


@contextmanager
def ctrl_c_noted():
    """Note the first Ctrl-C in the list that is yielded, so no step is cut in two; a second one raises."""
    pressed = []

    def note(number, frame):
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    if threading.current_thread() is not threading.main_thread():  # signals go to the main thread only
        yield pressed
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


class Trainer:
    """A run that can stop after any step and go on later as if it had not.

    Parameters
    ----------
    experiment : Experiment
    passes : int
        N.
    seed : int
        Of the weights and of the data.
    device : str
        "auto", "cpu", "cuda", or one CUDA device.
    pieces : int
        Parts in which a batch is read, one after the other, where all of it does not fit into memory.  The
        gradient is that of the whole batch but for rounding; no part is captured as a CUDA graph.

    Attributes
    ----------
    model : HybridLM
    step : int
        Steps done.
    curve : list of dict
        Step, tokens, training loss since the entry before, held-out metrics.

    Notes
    -----
    Chapter: 11_rule110
    """

    def __init__(self, experiment, passes, seed, device="auto", pieces=1):
        self.experiment, self.passes, self.seed, self.pieces = experiment, passes, seed, pieces
        self.device = find_device(device)
        if self.device.type == "cpu":
            hold_on_to_memory()
        task, train = experiment.task, experiment.train
        if task.vocab_size != experiment.model.vocab_size:
            raise ValueError(
                f"model.vocab_size is {experiment.model.vocab_size}; the task has {task.vocab_size} tokens"
            )
        torch.manual_seed(seed)
        self.model = HybridLM(experiment.model).to(self.device)
        self.optimizers = make_optimizers(self.model, train)
        self.step, self.curve, self.seconds, self.peak_bytes = 0, [], 0.0, 0
        self.losses = torch.zeros(
            2, dtype=torch.float64, device=self.device
        )  # sum and count since the last entry
        first = training_batch(task, train, seed, 0)
        self.awake = awake_chunks(first.labels, task.window)
        self.test = held_out(task, train.eval_batch, seed)
        self.data_hash = data_hash(first, self.test)
        self.workers = 0 if self.device.type == "cpu" else min(4, os.cpu_count() or 1)
        self.batches, self.drawn = None, None  # batches drawn ahead, and the step that the next one is for
        self.graph, self.captured = None, None  # a captured step, and its eviction

    def loss(self, inputs, labels):
        """Mean cross-entropy of Algorithm 1 on a batch."""
        train = self.experiment.train
        capable = self.device.type == "cpu" or torch.cuda.get_device_capability(self.device)[0] >= 8
        low = train.precision == "bfloat16" and capable
        with torch.autocast(self.device.type, dtype=torch.bfloat16) if low else nullcontext():
            return sleep_forward(
                self.model,
                inputs,
                labels,
                window=self.experiment.task.window,
                passes=self.passes,
                eviction=train.eviction_at(self.step),
                checkpoint=train.checkpoint,
                return_logits=False,
                awake=self.awake,
            ).loss

    def forward_backward(self, batch):
        """Leave the gradient of one batch in the parameters; return the loss, still on the device."""
        train = self.experiment.train
        if train.graph and self.device.type == "cuda" and self.pieces == 1:
            if self.graph is None or self.captured != train.eviction_at(self.step):
                self.graph = None  # let go of the old one's memory first
                self.graph, self.captured = CapturedStep(self, batch), train.eviction_at(self.step)
            return self.graph(batch)
        for p in self.model.parameters():
            p.grad = None
        total, asked = 0.0, (batch.labels != IGNORE).sum().item()
        for inputs, labels in zip(batch.inputs.chunk(self.pieces), batch.labels.chunk(self.pieces)):
            share = (labels != IGNORE).sum().item() / asked
            loss = self.loss(inputs.to(self.device), labels.to(self.device)) * share
            loss.backward()
            total = total + loss.detach()
        return total

    def next_batch(self):
        """What :func:`training_batch` draws for the step in hand, ahead of time where there are workers."""
        if self.drawn != self.step:  # at the start, and when a checkpoint was loaded
            task, count = self.experiment.task, self.experiment.train.batch
            self.batches = stream(task, count, (self.seed, DATA), start=self.step, workers=self.workers)
        self.drawn = self.step + 1
        return next(self.batches)

    def train_step(self):
        """One optimizer step on the next batch."""
        train = self.experiment.train
        loss = self.forward_backward(self.next_batch())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), train.clip, foreach=True)
        muon, adamw = self.optimizers
        muon.param_groups[0]["lr"] = train.muon_lr * schedule(self.step, train)
        muon.step()
        adamw.step()
        self.losses += torch.stack((loss.double(), torch.ones_like(loss, dtype=torch.float64)))
        self.step += 1

    def measure(self):
        """Add an entry to the curve; raise FloatingPointError if the loss is not finite."""
        task, train = self.experiment.task, self.experiment.train
        total, count = self.losses.tolist()
        self.losses.zero_()
        if not math.isfinite(total):
            raise FloatingPointError(f"loss is not finite near step {self.step}")
        eviction = train.eviction_at(train.steps)
        metrics = evaluate(self.model, task, self.test, passes=self.passes, eviction=eviction)
        self.curve.append(
            {
                "step": self.step,
                "tokens": self.step * train.batch * task.length,
                "loss": total / count,
                "metrics": metrics,
            }
        )

    def run(self, stop_after=None, save=None, progress=True):
        """Train to the end, or for `stop_after` steps more; return "done" or what stopped it.

        Ctrl-C stops after the step in hand, a second one at once and without a checkpoint.  `save` is called
        without arguments every ``save_every`` steps and at the end of the call.
        """
        train = self.experiment.train
        end = train.steps if stop_after is None else min(train.steps, self.step + stop_after)
        name = f"{self.experiment.name} N={self.passes} seed={self.seed}"
        bar = tqdm(total=train.steps, initial=self.step, desc=name, disable=None if progress else True)
        began = time.perf_counter()
        status = None
        with ctrl_c_noted() as pressed:
            try:
                while self.step < end and not pressed:
                    self.train_step()
                    if self.step % train.eval_every == 0 or self.step == train.steps:
                        self.measure()
                        bar.set_postfix(
                            loss=f"{self.curve[-1]['loss']:.3f}",
                            exact=f"{self.curve[-1]['metrics']['exact']:.3f}",
                        )
                    bar.update()
                    if save and self.step % train.save_every == 0 and self.step < end:
                        began = self._clock(began)
                        save()
                if pressed and self.step < train.steps:
                    status = f"interrupted after step {self.step}"
            except FloatingPointError as error:
                status = f"failed: {error}"
            except ValueError:  # a NaN weight first shows as a NaN decay, which the kernels refuse on the CPU
                if all(bool(p.isfinite().all()) for p in self.model.parameters()):
                    raise
                status = f"failed: weights are not finite near step {self.step}"
            finally:
                bar.close()
                self.batches = self.drawn = None  # workers end here
            self._clock(began)
            if save and not (status or "").startswith("failed"):
                save()
        return status or ("done" if self.step == train.steps else f"stopped after step {self.step}")

    def _clock(self, began):
        now = time.perf_counter()
        self.seconds += now - began
        self.peak_bytes = max(self.peak_bytes, peak_bytes(self.device))
        return now

    def identity(self):
        """What must be the same for a checkpoint to fit."""
        return dict(
            preset=self.experiment.name,
            passes=self.passes,
            seed=self.seed,
            config_hash=self.experiment.config_hash(),
            data_hash=self.data_hash,
        )
