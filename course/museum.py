"""The bug museum: rooms of planted faults, which a student's judge must tell from right code.

The faults are those that keep the tests of this book honest (tests/mutants.py).  A judge is a function that
gets an implementation (some functions that take and return plain data) and raises AssertionError if it
finds it wrong.  So a fault stays on this side: a judge that runs elsewhere sees only what the functions
return.  The implementation is the `Machine` of course/src/a7_museum.md; here a fault is planted in it.
"""

import random
import sys
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import mutants

# Right code must be let through, both as it is and wrapped in every place where a fault may sit.
RIGHT = (nullcontext, mutants.honest_scaffold)
# How often each is shown: a judge that objects by chance would have to be lucky each time.
TIMES = 2
ROOMS = {
    "rule": "decays_after_the_write reference_forgets_the_first_decay reference_has_a_wrong_gradient "
    "chunked_decays_too_much chunked_cuts_the_last_state",
    "nap": "re_embeds_every_pass adds_the_embedding_every_pass resets_S_between_passes skips_the_last_write "
    "a_pass_sees_the_keys_of_the_pass_before an_unlooped_block_runs_N_times detaches_S_between_passes "
    "detaches_h_between_passes",
    "eviction": "leaks_keys_over_hard_eviction leaks_the_convolution_context forgets_S_at_eviction "
    "detaches_S_at_eviction slides_one_key_too_few a_query_sees_one_key_too_many",
    "algorithm": "labels_off_by_one sees_the_question_before_it_sleeps sleeps_N_times_on_prediction "
    "sleeps_only_once sleeps_one_pass_too_many starts_over_at_every_call",
    "stream": "wakes_N_times a_nap_adds_N_passes a_nap_sees_its_window_twice never_naps naps_a_token_late "
    "hoards_what_it_read counts_bytes_without_the_open_window keeps_all_logits_alive "
    "slides_one_key_too_many",
    "data": "rolls_rule_124 rolls_one_step_too_few",
}
ROOMS = {room: faults.split() for room, faults in ROOMS.items()}


def visit(judge, room, implementation, seed):
    """Show a judge a room, right code and faults, in an order drawn by the seed.

    ``implementation(room, context, seed, backend)`` gives what the judge gets; `context` plants the fault,
    and in the room "rule" `backend` says in which code.  Returns {fault: None where it was found, else a
    sentence}.  A judge that objects to right code counts as finding nothing: else one that rejects
    everything would find every fault.
    """
    draw = random.Random(int(seed))
    backends = ("reference", "chunked")
    showings = [(None, context, backend) for context in RIGHT for backend in backends]
    for fault in ROOMS[room]:
        backend = "chunked" if fault.startswith("chunked") else "reference"
        showings.append((fault, mutants.MUTANTS[fault][0], backend))
    showings *= TIMES
    draw.shuffle(showings)
    missed, wrong = {}, None
    for fault, context, backend in showings:
        try:
            judge(*implementation(room, context, draw.randrange(2**31), backend))
        except AssertionError as error:
            if fault is None:
                wrong = f"it objects to right code: {error}"
        except Exception as error:
            if fault is None:
                wrong = f"it breaks on right code: {type(error).__name__}: {error}"
            missed[fault] = f"it breaks: {type(error).__name__}: {error}"
        else:
            missed[fault] = "it lets this fault through"
        if wrong:
            break
    return {fault: wrong or missed.get(fault) for fault in ROOMS[room]}


def tour(room, implementation):
    """A function for the hidden checks of one room, ``expect(judge, rng, fault)``; the room is shown once."""
    seen = {}

    def expect(judge, rng, fault):
        if not seen:
            seen.update(visit(judge, room, implementation, rng.integers(2**31)))
        assert seen[fault] is None, seen[fault]

    return expect
