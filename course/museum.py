"""The bug museum: faults planted in sleeplib, and what a visitor's tests make of them.

The faults are those that keep the tests of this book honest (tests/mutants.py).  A visitor brings test
functions ``test_something(sl, seed)``: `sl` is sleeplib, with or without a fault, `seed` an integer that the
test must make its inputs from.  As under pytest, a test objects by raising an error.
"""

import random
import sys
import traceback
from contextlib import nullcontext
from pathlib import Path

import sleeplib as sl

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import mutants

ROOMS = {
    "rule": (
        "decays_after_the_write",
        "reference_forgets_the_first_decay",
        "reference_has_a_wrong_gradient",
        "chunked_decays_too_much",
        "chunked_cuts_the_last_state",
    ),
    "nap": (
        "re_embeds_every_pass",
        "adds_the_embedding_every_pass",
        "resets_S_between_passes",
        "detaches_S_between_passes",
        "detaches_h_between_passes",
        "a_pass_sees_the_keys_of_the_pass_before",
        "an_unlooped_block_runs_N_times",
        "skips_the_last_write",
        "sleeps_only_once",
        "sleeps_one_pass_too_many",
    ),
    "eviction": (
        "leaks_keys_over_hard_eviction",
        "leaks_the_convolution_context",
        "forgets_S_at_eviction",
        "detaches_S_at_eviction",
        "slides_one_key_too_few",
        "slides_one_key_too_many",
    ),
    "algorithm": (
        "labels_off_by_one",
        "sees_the_question_before_it_sleeps",
        "sleeps_N_times_on_prediction",
        "starts_over_at_every_call",
    ),
    "stream": (
        "wakes_N_times",
        "a_nap_adds_N_passes",
        "a_nap_sees_its_window_twice",
        "never_naps",
        "naps_a_token_late",
        "hoards_what_it_read",
        "counts_bytes_without_the_open_window",
        "keeps_all_logits_alive",
    ),
    "data": ("rolls_rule_124", "rolls_one_step_too_few"),
}
FAULTS = tuple(fault for room in ROOMS.values() for fault in room)

# Right code must be let through as it is, and wrapped in every place where a fault may sit.
RIGHT = {"sleeplib": nullcontext, "sleeplib, wrapped": mutants.honest_scaffold}


def objection(test, seed):
    """The error that a test raises on the implementation that is in place; None if it accepts."""
    try:
        test(sl, seed)
    except Exception as error:
        return error
    return None


def visit(tests, seed, faults=FAULTS):
    """Show right and wrong implementations to every test, in an order that the seed draws.

    Parameters
    ----------
    tests : dict of str to callable
        By name; each takes ``(sl, seed)``.
    seed : int
        The instructor's.  The seeds that the tests get are drawn from it.
    faults : sequence of str
        Names in tests/mutants.py.

    Returns
    -------
    caught : dict of str to str or None
        For each fault a test that objected to it, one that lets right code through; None if there is none.
    struck : dict of str to str
        The tests that do not count, each with what went wrong on right code.
    """
    draw = random.Random(seed)
    showings = [(name, context) for name, context in RIGHT.items() for _ in range(2)]
    showings += [(fault, mutants.MUTANTS[fault][0]) for fault in faults]
    draw.shuffle(showings)
    struck, objected = {}, {fault: [] for fault in faults}
    for shown, context in showings:
        number = draw.randrange(2**31)
        for name, test in tests.items():
            if name in struck:
                continue
            with context():
                error = objection(test, number)
            if shown in RIGHT and error is not None:
                where = traceback.extract_tb(error.__traceback__)[-1].lineno
                struck[name] = f"{shown}: {type(error).__name__} in line {where}: {error}"[:300]
            elif error is not None:
                objected[shown].append(name)
    caught = {f: next((n for n in names if n not in struck), None) for f, names in objected.items()}
    return caught, struck
