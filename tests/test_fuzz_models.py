"""A short run of the fuzzer of models, sleep, streams and tasks, and proof that it finds what it is for."""

from unittest.mock import patch

import fuzz_models
import pytest

import sleeplib as sl
from sleeplib import interface


def test_every_call_is_right_or_refused_by_name():
    counts, faults = fuzz_models.run(240, seed=0)
    assert not faults, "\n".join(faults)
    for name in fuzz_models.TARGETS:
        assert counts[name, "right"] and counts[name, "refused"], name


@pytest.mark.parametrize(
    "names, where, attribute, fault",
    [
        (["forward", "blocks"], sl.Sleepable, "check_state", lambda self, state, h: None),
        (["forward", "sleep"], interface, "token_tensor", lambda *args: None),
        (["readout"], sl.Sleepable, "check_h", lambda self, h: None),
    ],
    ids=["states are not checked", "tokens are not checked", "vectors are not checked"],
)
def test_the_fuzzer_finds_planted_faults(names, where, attribute, fault):
    with patch.object(where, attribute, fault):
        assert fuzz_models.run(300, seed=0, targets=names)[1]
