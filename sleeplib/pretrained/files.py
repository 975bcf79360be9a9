"""The files of a pretrained model: found, fetched, and looked at before anything is loaded."""

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .. import device as machine

SETTINGS = ["*.json", "*.txt", "*.model", "*.jinja"]
OFFERED = "a repository of huggingface.co, 'owner/name', or a folder"


def fetch(source, revision=None, trust_remote_code=False, weights=True):
    """Return the folder of a source, downloaded if it is a repository; an error says what to do."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    name = str(source)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or ".." in name:
        raise FileNotFoundError(f"source: there is no folder {name!r}; give {OFFERED} that exists")
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError as error:
        raise ImportError("source needs huggingface_hub: pip install 'sleeplib[pretrained]'") from error

    patterns = SETTINGS + ["*.safetensors"] * weights + ["*.py"] * trust_remote_code
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"source: {name} asks you to accept its terms; do so at huggingface.co/{name}, then "
            "`hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"revision: {name} has no {revision!r}") from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"source: huggingface.co has no {name!r}, or it is private (`hf auth login`); give {OFFERED}"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HfHubHTTPError,
            ConnectionError, TimeoutError) as error:  # fmt: skip
        raise ConnectionError(
            f"source: {name} is not on this machine and huggingface.co cannot be reached; where there is a "
            f"network run `hf download {name} --local-dir FOLDER`, and give that folder"
        ) from error


def read_json(file, what):
    """Read a JSON file; an error, which ends with `what`, if it is missing; one too if it is damaged."""
    if not file.is_file():
        raise FileNotFoundError(f"source: {file} is missing; {what}")
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"source: {file} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"source: {file} is damaged: it holds no settings")
    return found


def weight_files(folder):
    """The safetensors files of the original; FileNotFoundError if there are none, or one is missing."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        places = read_json(index, "").get("weight_map")
        if not isinstance(places, dict):
            raise ValueError(f"source: {index} is damaged: it does not say in which file a weight is")
        names = sorted(set(places.values()))
    else:
        names = ["model.safetensors"]
    if missing := [name for name in names if not (folder / name).is_file()]:
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
        why = "; its weights are pickled, and a pickle can run code: convert them to safetensors" * pickled
        raise FileNotFoundError(
            f"source: {folder / missing[0]} is missing{why or '; the download is not whole: repeat it'}"
        )
    return [folder / name for name in names]


def check_memory(folder, dtype, device):
    """Raise MemoryError unless the weights of a folder fit into a device's free memory."""
    numbers = 0
    for file in weight_files(folder):
        try:
            with safe_open(file, "pt") as weights:
                numbers += sum(torch.Size(weights.get_slice(k).get_shape()).numel() for k in weights.keys())
        except SafetensorError as error:
            raise ValueError(f"source: {file} is damaged: {error}; download it again") from error
    needed, free = numbers * dtype.itemsize, machine.free_bytes(device)
    if free is not None and needed > free:
        smaller = "dtype='bfloat16' takes half, or " if dtype != torch.bfloat16 else ""
        raise MemoryError(
            f"source: its {numbers / 1e9:.2f} billion weights take {needed / 2**30:.1f} GiB, {device} has "
            f"{free / 2**30:.1f} free; {smaller}choose a smaller model or another device"
        )
