"""A bad number on one rank alone, in its images or in its loss: no rank moves, in the engines that torch has.

All engines and precisions: test_parity.py, which is slow.
"""

import pytest

from tests.engine.test_parity import launch

pytestmark = pytest.mark.dist


def test_a_bad_number_on_one_rank_moves_nothing_on_any(tmp_path):
    found = launch("skips", tmp_path, 2, ["ddp", "fsdp"])
    assert len(found) == 6
    for label, (flags, kept, moved, agreed) in found.items():
        assert flags == [1, 1, 1, 1, 0, 0] and kept and moved and agreed, label
