"""The one visible training loop: Muon and AdamW, the same data for every N, resumable bit for bit."""

import hashlib
import math
import os
import signal
import time
from contextlib import contextmanager, nullcontext, suppress

import numpy as np
import torch
from tqdm.auto import tqdm

from . import device as machine
from . import processes
from .algorithm import awake_chunks, sleep_forward
from .checks import integer
from .evaluation import evaluate, held_out
from .experiments import get
from .finetune import start_from
from .flops import fitting_parts
from .kernels import use_numba
from .optimizers import SLOTS, make_optimizers, schedule
from .tasks import TASKS, stream
from .tasks.base import IGNORE
from .tasks.check import check_task
from .threads import cores

DATA = 0  # the stream of random numbers of training data; it does not depend on N


def training_batch(task, train, seed, step):
    """The batch of one step: a function of the seed and the step alone, so every N sees the same."""
    return task.batch(train.batch, np.random.default_rng([seed, DATA, step]), split="train")


def data_hash(*batches):
    """Sixteen hex digits that stand for the tokens and labels of some batches."""
    tokens = [x.numpy().astype("<i8").tobytes() for batch in batches for x in (batch.inputs, batch.labels)]
    return hashlib.sha256(b"".join(tokens)).hexdigest()[:16]


class Trainer:
    """A run that can stop after any step and go on later as if it had not.

    Parameters
    ----------
    experiment : Experiment or str
        Or a preset's name.
    passes, seed : int
        N; the seed of the weights and of the data, below 2**64.
    device : str
        "auto", "cpu", "cuda", or one CUDA device.
    micro_batches : int, optional
        Parts in which a batch is read, one after the other, where all of it does not fit into memory.  The
        gradient is that of the whole batch but for rounding; no part is captured as a CUDA graph.  If absent,
        1 on a CPU, and on a GPU as few as fit into its free memory by :func:`fitting_parts`; but no fewer
        than in the checkpoint that a run goes on from.

    Notes
    -----
    If torchrun has started several processes (:mod:`sleeplib.processes`), each reads its part of every batch,
    and all take the same step, that of the whole batch but for rounding.

    Attributes
    ----------
    model : HybridLM
    step : int
    curve : list of dict
        Step, tokens, training loss since the previous entry, held-out metrics.

    Chapter: 11_rule110
    """

    def __init__(self, experiment, passes, seed, device="auto", micro_batches=None):
        self.experiment = experiment = get(experiment)
        task, train = experiment.task, experiment.train
        self.passes, self.seed = integer("passes", passes, 1), integer("seed", seed, 0, 2**64 - 1)
        self.rank, self.world = processes.rank(), processes.world()
        if self.world > train.batch:
            raise ValueError(f"train.batch is {train.batch}; {self.world} processes cannot share it")
        self.parts_given = micro_batches is not None
        if self.parts_given:
            micro_batches = integer("micro_batches", micro_batches, 1, train.batch)
        self.device = machine.find_device(device)
        if type(task) not in TASKS.values():
            check_task(task)
        if task.vocab_size != (found := experiment.model.vocab_size):
            raise ValueError(f"model.vocab_size is {found}; the task has {task.vocab_size} tokens")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            self.model = experiment.model.build()
        if train.start is not None:
            start_from(self.model, train.start.replace("{seed}", str(self.seed)))
        self.sharded = train.shard and self.world > 1
        if self.sharded:
            if self.device.type == "cpu":  # a loop reads weights in place, so they could not be freed
                use_numba(False)
            processes.shard(self.model, self.device)
        else:
            self.model.to(self.device)
        self.optimizers = make_optimizers(self.model, train)
        self.step, self.curve, self.seconds, self.peak_bytes = 0, [], 0.0, 0
        self.losses = torch.zeros(2, dtype=torch.float64, device=self.device)  # sum and count, this entry's
        first = training_batch(task, train, self.seed, 0)
        self.awake = awake_chunks(first.labels, task.window)
        few = max(1, 1024 // task.length)
        self.sample = first.inputs[:few], first.labels[:few]
        self.test = held_out(task, train.eval_batch, self.seed)
        self.data_hash = data_hash(first, self.test)
        low = train.precision == "bfloat16" and machine.multiplies_bfloat16(self.device)
        self.precision = "bfloat16" if low else "float32"  # the one that runs, not the one asked for
        self.micro_batches = micro_batches if self.parts_given else self.fitting_parts()
        self.workers = 0 if self.device.type == "cpu" else min(4, len(cores()))
        self.batches = self.drawn = None  # batches drawn ahead, and the step that the next one is for
        self.graph = self.captured = None  # a captured step, and its eviction and what it trains
        self.in_step, self.trains = processes.in_step(self.model, self.loss), "all"
        self.frozen = []  # parameters whose gradient is thrown away

    def fitting_parts(self):
        """In how many parts a batch is read if nobody says: the same number in all processes."""
        if self.device.type != "cuda":
            return 1
        options, parts = (machine.free_bytes(self.device), self.precision, self.world), 1
        with suppress(RuntimeError):  # a model of your own may need numbers: try the whole batch
            parts = fitting_parts(self.experiment, self.passes, *options) or self.experiment.train.batch
        return processes.agreed(parts)

    def train_step(self, measure=False):
        """Take one step: draw, loss and gradient, clip, update; measure where it is due, if asked."""
        train, (muon, adamw) = self.experiment.train, self.optimizers
        batch = self.next_batch()
        if self.trains != train.trains_at(self.step):
            self.trains = train.trains_at(self.step)
            if self.sharded:  # which weights get a gradient is fixed once: what else comes is thrown away
                self.frozen = self.rest() if self.trains == "fast" else []
            else:
                self.model.learn(self.trains)
            self.in_step = processes.in_step(self.model, self.loss)
        with self.diverging():
            loss = self.forward_backward(batch)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), train.clip, foreach=True)
        muon.param_groups[0]["lr"] = train.muon_lr * schedule(self.step, train)
        muon.step()
        adamw.step()
        self.losses += torch.stack((loss.double(), torch.ones_like(loss, dtype=torch.float64)))
        self.step += 1
        if measure and (self.step % train.eval_every == 0 or self.step == train.steps):
            self.measure()

    def rest(self):
        """The parameters that a step of "fast" leaves alone."""
        fast = set(map(id, self.model.fast_parameters()))
        return [p for p in self.model.parameters() if id(p) not in fast]

    def next_batch(self):
        """What :func:`training_batch` draws for the step in hand, ahead of time where there are workers."""
        if self.drawn != self.step:  # at the start, and when a checkpoint was loaded
            if self.device.type == "cpu":
                machine.tune_malloc()
            task, count = self.experiment.task, self.experiment.train.batch
            self.batches = stream(task, count, (self.seed, DATA), start=self.step, workers=self.workers)
        self.drawn = self.step + 1
        return next(self.batches)

    def forward_backward(self, batch):
        """Leave the gradient of one batch in the parameters; return the loss, still on the device."""
        train = self.experiment.train
        if train.graph and self.device.type == "cuda" and self.micro_batches == self.world == 1:
            stage = train.eviction_at(self.step), self.trains
            if self.graph is None or self.captured != stage:
                self.graph, self.captured = None, stage  # first let go of its memory
                with machine.compiled_blocks(self.model):
                    own = [p for p in self.model.parameters() if p.requires_grad]
                    self.graph = machine.CapturedStep(self.loss, own, batch, self.device)
            return self.graph(batch)
        self.model.zero_grad()
        total, asked = 0.0, (batch.labels != IGNORE).sum().item()
        own = (x.tensor_split(self.world)[self.rank] for x in (batch.inputs, batch.labels))
        parts = list(zip(*(x.chunk(self.micro_batches) for x in own)))
        for i, (inputs, labels) in enumerate(parts, 1):
            share = (labels != IGNORE).sum().item() / asked  # of the labels of the whole batch
            wait = self.world > 1 and i < len(parts)
            with self.in_step.no_sync() if wait else nullcontext():
                loss = self.in_step(inputs.to(self.device), labels.to(self.device)) * share
                (loss * self.world).backward()  # gradients become means over processes
            total = total + loss.detach()
        for p in self.frozen:
            p.grad = None
        return processes.summed(total)

    def loss(self, inputs, labels):
        """Mean cross-entropy of Algorithm 1 on a batch."""
        train, low = self.experiment.train, self.precision == "bfloat16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16) if low else nullcontext():
            options = dict(window=self.experiment.task.window, passes=self.passes, awake=self.awake)
            options |= dict(eviction=train.eviction_at(self.step), checkpoint=train.checkpoint)
            options["truncate"] = train.truncate
            return sleep_forward(self.model, inputs, labels, return_logits=False, **options).loss

    def probe(self):
        """Loss and gradient of a few sequences, thrown away: on them numbers of threads are tried."""
        with suppress(ValueError):  # what is wrong with the model, the loop will say
            self.loss(*(x.to(self.device) for x in self.sample)).backward()
        self.model.zero_grad()

    def measure(self):
        """Add an entry to the curve; raise FloatingPointError if a loss is not finite."""
        task, train = self.experiment.task, self.experiment.train
        total, count = self.losses.tolist()
        self.losses.zero_()
        self.demand_finite("loss is", total)
        entry = dict(step=self.step, tokens=self.step * train.batch * task.length, loss=total / count)
        self.curve.append(entry | dict(metrics=self.evaluate(self.test)))

    def evaluate(self, batch):
        """Score on held-out data, with the eviction that training ends with.

        On a GPU it takes four times as many sequences at a time as a part of a training step, but at most
        256: nothing has to be kept for a backward pass.
        """
        task, train = self.experiment.task, self.experiment.train
        with self.diverging():
            last = train.eviction_at(train.steps)
            part = -(-train.batch // (self.world * self.micro_batches))
            options = {} if self.device.type == "cpu" else dict(chunk=min(256, 4 * part))
            scores = evaluate(self.model, task, batch, passes=self.passes, eviction=last, **options)
        self.demand_finite("held-out scores are", *scores.values())
        return scores

    def demand_finite(self, what, *values):
        """Raise FloatingPointError unless all values are finite."""
        if not all(map(math.isfinite, values)):
            raise FloatingPointError(f"{what} not finite near step {self.step}")

    @contextmanager
    def diverging(self):
        """Take what a kernel refuses after the first step for divergence: on the CPU it refuses a NaN."""
        try:
            yield
        except ValueError as error:
            if not self.step:
                raise
            finite = all(bool(p.isfinite().all()) for p in self.model.parameters())
            what = f"an activation was refused ({error})" if finite else "weights are not finite"
            raise FloatingPointError(f"{what} near step {self.step}") from error

    def run(self, stop_after=None, save=None, progress=True, step_took=None):
        """Train to the end, or for `stop_after` steps more; return "done" or what stopped it.

        Ctrl-C and SIGTERM stop after the current step, a second one at once and without a checkpoint.  `save`
        is called without arguments every ``save_every`` steps and at the end of the call, unless the run has
        failed; `step_took` is called after each step with its seconds.
        """
        train = self.experiment.train
        more = train.steps if stop_after is None else integer("stop_after", stop_after, 1)
        end = min(train.steps, self.step + more)
        name = f"{self.experiment.name} N={self.passes} seed={self.seed}"
        quiet = not progress or self.rank > 0 or "TQDM_DISABLE" in os.environ
        bar = tqdm(total=train.steps, initial=self.step, desc=name, disable=quiet or None)
        began, status, noticed = time.perf_counter(), None, 0
        with machine.deferred_interrupt() as noted:
            try:
                while self.step < end and not (noticed := processes.agreed(noted[0] if noted else 0)):
                    start = time.perf_counter()
                    self.train_step(measure=True)
                    if step_took:
                        step_took(time.perf_counter() - start)
                    if self.curve:
                        scores = self.curve[-1]["metrics"]
                        bar.set_postfix(loss=scores["loss"], exact=scores["exact"], refresh=False)
                    bar.update()
                    if save and self.step % train.save_every == 0 and self.step < end:
                        began = self._clock(began)
                        save()
                self.demand_finite("loss is", *self.losses.tolist())
                if self.step < train.steps:
                    how = {0: "stopped", signal.SIGTERM: "terminated"}.get(noticed, "interrupted")
                    status = f"{how} after step {self.step}"
            except FloatingPointError as error:
                status = f"failed: {error}"
            finally:
                bar.close()
                self.batches = self.drawn = None  # workers end here
            self._clock(began)
            if save and not (status or "").startswith("failed"):
                save()
        return status or "done"

    def _clock(self, began):
        self.seconds += (now := time.perf_counter()) - began
        self.peak_bytes = max(self.peak_bytes, machine.peak_bytes(self.device))
        return now

    def whole_model(self):
        """The model; if it lies in parts, all must ask: the first gets a copy on the CPU, the others None."""
        if not self.sharded:
            return self.model
        weights = processes.gathered(self.model.state_dict())
        if self.rank > 0:
            return None
        model = self.experiment.model.build()
        model.load_state_dict(weights)
        return model

    def identity(self):
        """What must be the same for a checkpoint to fit."""
        own = dict(preset=self.experiment.name, passes=self.passes, seed=self.seed, precision=self.precision)
        return own | dict(config_hash=self.experiment.config_hash(), data_hash=self.data_hash)

    def snapshot(self):
        """Everything that a later call needs to go on bit for bit: tensors by name, and plain notes.

        If there are several processes, all must ask; each gets the tensors that :func:`gathered` gives it.
        """
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()} | {"losses": self.losses}
        for number, optimizer in enumerate(self.optimizers):
            for index, slots in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{number}.{index}.{slot}": v for slot, v in slots.items()}
        notes = dict(run=self.identity(), threads=torch.get_num_threads(), step=self.step, curve=self.curve)
        notes |= dict(seconds=self.seconds, peak_bytes=self.peak_bytes, micro_batches=self.micro_batches)
        return processes.gathered(tensors), notes

    def restore(self, tensors, notes):
        """Go on where a :meth:`snapshot` was taken; ValueError, with nothing changed, if it does not fit."""
        own = self.identity()
        found = {"precision": self.precision} | notes["run"]  # older checkpoints do not say
        if odd := [k for k in own if found.get(k) != own[k]]:
            raise ValueError(f"belongs to another run (differs in {', '.join(odd)})")
        step = integer("step", notes["step"], 0, self.experiment.train.steps)
        model = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        wanted = {k: v.shape for k, v in model.items()} | {"losses": (2,)}
        states = [{}, {}]
        frozen = sum(self.experiment.train.trains_at(i) == "fast" for i in range(step))
        later, counts = set(map(id, self.rest())), {}
        for number, optimizer in enumerate(self.optimizers):
            for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
                if not (count := step - frozen if id(p) in later else step):
                    continue
                counts[f"optimizer.{number}.{i}.step"] = count
                names = {slot: f"optimizer.{number}.{i}.{slot}" for slot in SLOTS[number]}
                wanted |= {name: () if slot == "step" else p.shape for slot, name in names.items()}
                states[number][i] = {slot: (tensors.get(name), p) for slot, name in names.items()}
        odd = wanted.keys() - tensors.keys() | {k for k, v in tensors.items() if v.shape != wanted.get(k)}
        if odd := odd | {k for k, v in tensors.items() if k.endswith(".step") and v != counts.get(k)}:
            raise ValueError(f"does not fit this run at step {step}: {', '.join(sorted(odd)[:3])}")
        self.model.load_state_dict({k[6:]: processes.part(tensors[k], v) for k, v in model.items()})
        for optimizer, state in zip(self.optimizers, states):
            for slots in state.values():
                slots |= {k: processes.part(v, p) if v.ndim else v for k, (v, p) in slots.items()}
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        self.losses, self.step, self.curve = tensors["losses"].to(self.device), step, notes["curve"]
        self.seconds, self.peak_bytes = notes["seconds"], notes["peak_bytes"]
        if not self.parts_given:  # with fewer parts, sums would be rounded differently
            self.micro_batches = max(self.micro_batches, notes.get("micro_batches", 1))
