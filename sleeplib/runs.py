"""A run from start to record: checkpoints that resume to the bit, one JSON file at the end."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as pack

from . import records
from .training import Trainer, evaluate, held_out


def save_checkpoint(trainer, path):
    """Write everything a later call needs to go on to the bit: one safetensors file, no pickle."""
    tensors = {f"model.{k}": v for k, v in trainer.model.state_dict().items()}
    for number, optimizer in enumerate(trainer.optimizers):
        for index, slots in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{index}.{slot}": v for slot, v in slots.items()}
    tensors["losses"] = trainer.losses
    notes = dict(
        run=trainer.identity(),
        step=trainer.step,
        curve=trainer.curve,
        seconds=trainer.seconds,
        peak_bytes=trainer.peak_bytes,
    )
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    records.write_atomically(path, pack(tensors, metadata={"sleeplib": json.dumps(notes)}))


def load_checkpoint(trainer, path):
    """Go on where :func:`save_checkpoint` stopped.

    Raises
    ------
    ValueError
        If the file is damaged or belongs to another run.
    """
    try:
        with safe_open(path, framework="pt") as file:
            notes = json.loads((file.metadata() or {})["sleeplib"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"checkpoint: {path} is damaged, or no checkpoint of a run ({error})") from error
    if notes["run"] != trainer.identity():
        odd = [k for k, v in trainer.identity().items() if notes["run"].get(k) != v]
        raise ValueError(f"checkpoint: {path} belongs to another run (differs in {', '.join(odd)})")
    trainer.model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
    for number, optimizer in enumerate(trainer.optimizers):
        state = {}
        for key, value in tensors.items():
            if key.startswith(f"optimizer.{number}."):
                _, _, index, slot = key.split(".")
                state.setdefault(int(index), {})[slot] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    trainer.losses = tensors["losses"].to(trainer.device)
    trainer.step, trainer.curve = notes["step"], notes["curve"]
    trainer.seconds, trainer.peak_bytes = notes["seconds"], notes["peak_bytes"]


def make_record(trainer, status, command, commit, dirty):
    """The run record of what has been done so far."""
    experiment, train = trainer.experiment, trainer.experiment.train
    final = {}
    if not status.startswith("failed"):
        for split, suffix in (("test", ""), ("train", "_train_split")):
            batch = held_out(experiment.task, 8 * train.eval_batch, trainer.seed, split)
            options = dict(passes=trainer.passes, eviction=train.eviction_at(train.steps))
            scores = evaluate(trainer.model, experiment.task, batch, **options)
            final |= {name + suffix: score for name, score in scores.items()}
    cuda = trainer.device.type == "cuda"
    return dict(
        preset=experiment.name,
        passes=trainer.passes,
        seed=trainer.seed,
        config=experiment.config(),
        config_hash=experiment.config_hash(),
        command=command,
        commit=commit,
        dirty=dirty,
        data_hash=trainer.data_hash,
        versions=records.versions(),
        device=torch.cuda.get_device_name(trainer.device) if cuda else records.processor(),
        dtype=train.precision,
        seconds=round(trainer.seconds, 2),
        peak_bytes=trainer.peak_bytes,
        tokens=trainer.step * train.batch * experiment.task.length,
        curve=trainer.curve,
        chance=experiment.task.chance(),
        final=final,
        status=status,
    )


def run(
    experiment,
    passes,
    seed=0,
    device="auto",
    out=None,
    *,
    resume=False,
    stop_after=None,
    keep=None,
    pieces=1,
    progress=True,
):
    """Train one preset with one N and one seed, and write its record.

    Parameters
    ----------
    experiment : Experiment
    passes : int
        N.
    seed : int
    device : str
        "auto", "cpu" or "cuda".
    out : path_like, optional
        Folder of the records, ``data/results`` if absent.
    resume : bool
        Go on from the run's checkpoint, if there is one.
    stop_after : int, optional
        Stop after that many steps more; the checkpoint stays for the next call.
    keep : path_like, optional
        Folder for the trained model of a finished run, in half precision: ``<preset>/N<passes>-seed<seed>``.
    pieces : int
        Parts in which a batch is read, where all of it does not fit into memory.
    progress : bool
        Show a progress bar on a terminal.

    Returns
    -------
    dict
        The record, also after Ctrl-C; its ``status`` says what happened.

    Raises
    ------
    ValueError
        If an argument does not fit, a checkpoint is damaged or foreign, or a finished record of another
        configuration stands in the way.

    Notes
    -----
    Chapter: 11_rule110
    """
    wanted = (("passes", passes, 1), ("seed", seed, 0), ("stop_after", stop_after, 1), ("pieces", pieces, 1))
    for name, value, low in wanted:
        if value is None and name == "stop_after":
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ValueError(f"{name} must be an int of at least {low}; got {value!r}")
    path = records.record_path(experiment.name, passes, seed, out)
    if path.exists() and (old := records.load_record(path))["config_hash"] != experiment.config_hash():
        raise ValueError(
            f"out: {path} is the record of another configuration ({old['config_hash']}); choose another out"
        )
    checkpoint = path.with_suffix(".safetensors")
    commit = records.commit()  # of the code that runs, not of what is edited meanwhile
    trainer = Trainer(experiment, passes, seed, device, pieces)
    if resume and checkpoint.exists():
        load_checkpoint(trainer, checkpoint)
    command = f"sleeplib run {experiment.name} --passes {passes} --seed {seed} --device {device}"
    command += f" --pieces {pieces}" * (pieces > 1)
    command += "".join(f" --set {change}" for change in experiment.changes())
    status = trainer.run(stop_after, lambda: save_checkpoint(trainer, checkpoint), progress)
    record = make_record(trainer, status, command, *commit)
    records.save_record(record, out)
    if status == "done":
        checkpoint.unlink(missing_ok=True)
        if keep is not None:
            trainer.model.half().save(Path(keep) / path.parent.name / path.stem)
    return record
