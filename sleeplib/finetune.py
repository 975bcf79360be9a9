"""What fine-tuning adds to the training loop: where weights start, and which of them are trained when."""

from .model import HybridLM


def start_from(model, folder):
    """Give a new :class:`HybridLM` the weights of a trained one; blocks that it lacks stay as they are.

    The first block of each letter takes the weights of the first of that letter, and so on.  So the hybrid
    ``agag`` can start from the transformer ``aa``: its fast-weight blocks are new, each of them the identity.

    Parameters
    ----------
    model : HybridLM
        Changed in place.
    folder : path_like
        A folder, or the name of a model that comes with the book, see :meth:`HybridLM.from_checkpoint`.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no such model, or it does not fit; the message names train.start.

    Chapter: 16_pretrained
    """
    try:
        kept = HybridLM.from_checkpoint(folder).to(model.dtype)
    except FileNotFoundError as error:
        hint = "sleeplib run PRESET --keep data/checkpoints makes one"
        raise FileNotFoundError(f"train.start: {error}; {hint}") from error
    old, new, pairs = kept.config.pattern, model.config.pattern, []
    for letter in dict.fromkeys(old):
        places = [[i for i, kind in enumerate(pattern) if kind == letter] for pattern in (old, new)]
        if len(places[0]) > len(places[1]):
            raise ValueError(f"train.start: {folder} has blocks {old}, more than the model's {new} has")
        pairs += zip(*places)
    number = {f"layers.{i}.": f"layers.{j}." for i, j in pairs}
    weights = {}
    for name, x in kept.state_dict().items():
        block = next((prefix for prefix in number if name.startswith(prefix)), "")
        weights[number.get(block, "") + name.removeprefix(block)] = x
    try:
        missing, _ = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise ValueError(f"train.start: {folder} does not fit the model: {error}") from error
    fresh = {i for i in range(len(new)) if i not in dict(pairs).values()}
    assert all(int(name.split(".")[1]) in fresh for name in missing)


def fast_parameters(model):
    """Parameters of the fast-weight layers: of each block with an S its mixer, and the norm before it.

    A block that has no ``mixer`` is one layer, and counts as a whole.

    Chapter: 16_pretrained
    """
    if hasattr(model, "fast_parameters"):  # a pretrained model knows what was inserted into it
        return model.fast_parameters()
    found = []
    for block, S in zip(model.layers, model.initial_state(1).fast_weights):
        if S is not None:
            parts = [getattr(block, name) for name in ("mixer_norm", "mixer") if hasattr(block, name)]
            found += [p for part in parts or [block] for p in part.parameters()]
    return found


def choose_trained(model, which):
    """Train "all" parameters of a model, or those of the "fast" weight layers alone; the rest is frozen.

    Section 6.4 of the paper trains inserted layers first.

    Chapter: 16_pretrained
    """
    if hasattr(model, "learn"):
        return model.learn(which)
    model.requires_grad_(which == "all")
    for p in fast_parameters(model):
        p.requires_grad_(True)
