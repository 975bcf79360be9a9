"""A run from start to record: checkpoints that resume bit for bit, one JSON file at the end."""

import shlex
from functools import partial
from pathlib import Path

import torch

from . import processes, records
from . import threads as cpu
from .checkpoints import load_checkpoint, save_checkpoint, steps_done
from .checks import integer
from .evaluation import held_out
from .experiments import get
from .training import Trainer


def make_record(trainer, status, command, commit, dirty):
    """The run record of what has been done so far."""
    e, final = trainer.experiment, {}
    try:
        for split, suffix in (("test", ""), ("train", "_train_split")) if status[:6] != "failed" else ():
            scores = trainer.evaluate(held_out(e.task, 8 * e.train.eval_batch, trainer.seed, split))
            final |= {name + suffix: score for name, score in scores.items()}
    except FloatingPointError as error:
        status, final = f"failed: {error}", {}
    on_gpu = trainer.device.type == "cuda"
    device = torch.cuda.get_device_name(trainer.device) if on_gpu else records.processor()
    device = f"{trainer.world} x {device}" if trainer.world > 1 else device
    record = dict(preset=e.name, passes=trainer.passes, seed=trainer.seed, config=e.config())
    record |= dict(config_hash=e.config_hash(), command=command, commit=commit, dirty=dirty)
    record |= dict(data_hash=trainer.data_hash, versions=records.versions(), device=device)
    record |= dict(dtype=trainer.precision, seconds=round(trainer.seconds, 2), peak_bytes=trainer.peak_bytes)
    record |= dict(tokens=trainer.step * e.train.batch * e.task.length, curve=trainer.curve)
    return record | dict(chance=e.task.chance(), final=final, status=status)


@processes.joined()
def run(experiment, passes, seed=0, device="auto", out=None, *, resume=False, overwrite=False,
        stop_after=None, keep=None, micro_batches=None, threads=None, progress=True):  # fmt: skip
    """Train one preset with one N and one seed, and write its record.

    Under torchrun several processes train it together, data-parallel: ``torchrun --nproc-per-node 2 -m
    sleeplib run ...``; they must see the same files.  A run may go on with another number of processes.  With
    ``train.shard`` each keeps only a part of the weights and of the optimizers' memory.

    Parameters
    ----------
    experiment, passes, seed, device, micro_batches
        As :class:`Trainer` takes them.
    out : path_like, optional
        Folder of the records.  If absent, ``data/results`` of the checkout that sleeplib lies in; where
        sleeplib is installed, ``sleeplib-results`` in the current folder.
    resume : bool
        Go on from the run's checkpoint, if there is one; the record of a finished run is returned as it is.
    overwrite : bool
        Train again although there is a finished record, or a run that was stopped.  A finished record stands
        until the new run has come to an end, even if that is divergence.
    stop_after : int, optional
        Stop after that many more steps; the checkpoint stays for the next call.
    keep : path_like, optional
        Folder for the trained model of a finished run, in half precision: ``<preset>/N<passes>-seed<seed>``.
    threads : int, optional
        For PyTorch, while the run lasts.  If absent, as many as the checkpoint says; without one, on a CPU,
        as many as help on a few sequences, unless the environment sets one (see :mod:`sleeplib.threads`).
    progress : bool
        Show a progress bar in a terminal or notebook.

    Returns
    -------
    dict
        The record, also after Ctrl-C; its ``status`` says what happened.

    Raises
    ------
    ValueError, OSError
        Before the first step: an argument does not fit, `out` or `keep` cannot be written, a checkpoint is
        damaged or of another run, or something stands in the way: a finished record, a record of another
        configuration, or the checkpoint of a run that was stopped.

    Chapter: 11_rule110
    """
    experiment = get(experiment)
    passes, seed = integer("passes", passes, 1), integer("seed", seed, 0, 2**64 - 1)
    stop_after = stop_after if stop_after is None else integer("stop_after", stop_after, 1)
    threads = threads if threads is None else integer("threads", threads, 1)
    path = records.record_path(experiment.name, passes, seed, out)
    checkpoint = path.with_suffix(".safetensors")
    kept = None if keep is None else Path(keep) / path.parent.name / path.stem
    if (old := _standing(path, experiment, overwrite)) is not None:
        ways = "resume=True (--resume) returns it, overwrite=True (--overwrite) trains anew"
        if not resume:
            raise ValueError(f"out: {path} is the record of a finished run; load_records reads it, {ways}")
        if kept is not None and not kept.exists():
            raise ValueError(f"keep: {path} is finished and {kept} was not kept; overwrite=True trains anew")
        # A later run that is to replace this one goes on by resume and overwrite together.
        if processes.rank() == 0 and not 0 < steps_done(checkpoint) < experiment.train.steps:
            checkpoint.unlink(missing_ok=True)
        return old
    if not (resume or overwrite) and (steps := steps_done(checkpoint)):
        ways = "resume=True (--resume) goes on, overwrite=True (--overwrite) trains anew"
        raise ValueError(f"out: {checkpoint} is a run that was stopped after step {steps}; {ways}")
    commit = records.commit()  # of the code that runs, not of what is edited meanwhile
    trainer = Trainer(experiment, passes, seed, device, micro_batches)
    found = load_checkpoint(trainer, checkpoint) if resume and checkpoint.exists() else {}
    for name, folder in (("out", path.parent), ("keep", kept)):
        if folder is not None:
            records.check_writable(name, folder)
    command = f"torchrun --nproc-per-node {trainer.world} -m " * (trainer.world > 1)
    command += f"sleeplib run {experiment.name} --passes {passes} --seed {seed} --device {device}"
    parts = trainer.micro_batches  # also those that were chosen: another machine would choose others
    command += f" --micro-batches {parts}" * (micro_batches is not None or parts > 1)
    command += f" --threads {threads}" * (threads is not None)
    command += "".join(f" --set {shlex.quote(change)}" for change in experiment.changes())
    # Thread counts are tried by one process: where weights lie in parts, a call waits for all processes.
    probe = trainer.probe if trainer.device.type == "cpu" and not trainer.sharded else None
    with cpu.chosen(threads or found.get("threads"), probe) as choice:
        status = trainer.run(stop_after, partial(_save, trainer, checkpoint), progress, choice.step_took)
        record = make_record(trainer, status, command, *commit)
    done = record["status"] == "done"
    model = trainer.whole_model() if done and kept else None
    if trainer.rank > 0:  # the first process writes
        return record
    ended = done or record["status"].startswith("failed")
    if (old := _standing(path, experiment, overwrite and ended)) is not None:
        record = record if overwrite else old  # without overwrite another process was quicker
    else:
        if done and kept:
            model.half().save(kept)
        records.save_record(record, out)
    if done:  # what it holds is safe elsewhere by now
        checkpoint.unlink(missing_ok=True)
    return record


def _save(trainer, checkpoint):
    """Write a checkpoint.  If that fails at the end of training, go on: the record is what counts."""
    try:
        save_checkpoint(trainer, checkpoint)
    except OSError:
        if trainer.step < trainer.experiment.train.steps:
            raise


def _standing(path, experiment, overwrite):
    """The finished record at `path` that must stay, or None; ValueError if it has another configuration."""
    if not path.exists():
        return None
    old = records.load_record(path)
    if (other := old["config_hash"]) != experiment.config_hash():
        raise ValueError(f"out: {path} is the record of another configuration ({other}); choose another out")
    return old if old["status"] == "done" and not overwrite else None
