"""Any tokenizer as a function from text to ids, checked before it is trusted."""

from .language import CONSTANTS


def reader(tokenizer, words):
    """Turn a tokenizer into a function from text to a list of int.

    Parameters
    ----------
    tokenizer : object
        With ``encode(text)``, as in transformers, tokenizers, sentencepiece and tiktoken, or a callable.
    words : iterable of str
        Names that must differ in tokens, as the constants must.

    Raises
    ------
    TypeError
        If it cannot encode text into a list of int.
    ValueError
        If two words or numbers come out the same, so that a problem could not be read from the tokens.
    """
    encode = getattr(tokenizer, "encode", tokenizer)
    if not callable(encode):
        raise TypeError(f"tokenizer must have encode(text) or be callable; got {type(tokenizer).__name__}")

    def ids(text):
        out = encode(text, **options)
        if hasattr(out, "keys"):  # what a transformers tokenizer returns when it is called
            out = out["input_ids"]
        return list(getattr(out, "ids", out))

    options = {"add_special_tokens": False}
    try:
        ids("1")
    except TypeError:
        options = {}
    try:
        sample = ids("The number of ships equals 1.")
    except (TypeError, KeyError) as error:
        raise TypeError(f"tokenizer must encode text into a list of int; it raised {error!r}") from None
    if not sample or any(isinstance(i, bool) or not hasattr(i, "__index__") for i in sample):
        raise TypeError(f"tokenizer must encode text into a list of int; it returned {sample[:3]!r}")
    seen = {}
    for word in [*map(str, CONSTANTS), *words]:
        other = seen.setdefault(tuple(ids(f" {word}")), word)
        if other != word:
            raise ValueError(
                f"tokenizer must tell names and numbers apart; {other!r} and {word!r} are the same"
            )
    return ids


def padding(tokenizer, alone=False):
    """The id of padding: the tokenizer's own, or its end of text, or 0, which is ours.

    With `alone`, where an end of text is to be read too: the tokenizer's own if it is not the end, or None.
    """
    ids = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    own, end = (i if isinstance(i, int) else None for i in ids)
    if alone:
        return own if own != end else None
    return next((i for i in (own, end) if i is not None), 0)
