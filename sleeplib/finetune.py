"""What fine-tuning adds to the training loop: weights that start from those of a trained model."""

from .model import HybridLM
from .records import data_dir


def start_from(model, folder):
    """Give a new :class:`HybridLM` the weights of a trained one; further blocks stay as they are.

    The new model's first block of each letter takes the weights of the trained one's first block of that
    letter, and so on.  So the hybrid ``agag`` can start from the transformer ``aa``: its fast-weight blocks
    are new, and each of them is the identity.

    Parameters
    ----------
    model : HybridLM
        Changed in place.
    folder : path_like
        A folder, or the name of a model that comes with the book, see :meth:`HybridLM.from_checkpoint`.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no such model, it is damaged or does not fit, or `model` is of another kind; the message
        names train.start.

    Chapter: 16_pretrained
    """
    if not isinstance(model, HybridLM):
        kind = type(model).__name__
        raise ValueError(f"train.start: {folder} holds a HybridLM, whose weights are none of a {kind}'s")
    try:
        kept = HybridLM.from_checkpoint(folder).to(model.dtype)
    except FileNotFoundError as error:
        hint = f"sleeplib run PRESET --keep {data_dir() / 'checkpoints'} makes one"
        raise FileNotFoundError(f"train.start: {error}; {hint}") from error
    except ValueError as error:
        raise ValueError(f"train.start: {error}") from error
    old, new, pairs = kept.config.pattern, model.config.pattern, []
    for letter in dict.fromkeys(old):
        places = [[i for i, kind in enumerate(pattern) if kind == letter] for pattern in (old, new)]
        if len(places[0]) > len(places[1]):
            raise ValueError(f"train.start: {folder} has blocks {old}, more than the model's {new} has")
        pairs += zip(*places)
    for name in ("num_heads", *["rope_base"] * ("a" in kept.config.pattern)):  # which no shape shows
        ours, theirs = getattr(model.config, name), getattr(kept.config, name)
        if ours != theirs:
            raise ValueError(f"train.start: {folder} has {name} {theirs!r}, not the model's {ours!r}")
    number = {f"layers.{i}.": f"layers.{j}." for i, j in pairs}
    weights = {}
    for name, x in kept.state_dict().items():
        block = next((prefix for prefix in number if name.startswith(prefix)), "")
        weights[number.get(block, "") + name.removeprefix(block)] = x
    own = {name: x.shape for name, x in model.state_dict().items()}
    if odd := [name for name, x in weights.items() if own.get(name) != x.shape]:  # before anything is copied
        wanted = f"not {tuple(own[odd[0]])}" if odd[0] in own else "which the model lacks"
        shapes = f"{tuple(weights[odd[0]].shape)}, {wanted}"
        raise ValueError(f"train.start: {folder} does not fit the model: {odd[0]} is {shapes}")
    model.load_state_dict(weights, strict=False)
