"""Law 4: a checkpoint exists or it does not."""

import pytest
import torch

from mae_dist.engine.world import World
from mae_dist.train.checkpoint import Checkpoints, committed, read_meta, step_of

ALONE = World(0, 1, torch.device("cpu"))


def writer(directory):
    path = directory / "weights"
    path.write_text("w")
    return [path]


def test_the_newest_is_found_by_looking(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", ALONE, keep=9)
    assert checkpoints.newest() is None
    for step in (5, 1000, 20):
        checkpoints.save(step, writer, {"k": step})
    newest = checkpoints.newest()
    assert newest and step_of(newest) == 1000
    assert read_meta(newest) == {"step": 1000, "k": 1000}


def test_a_save_that_dies_leaves_no_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path, ALONE, keep=9)
    checkpoints.save(1, writer, {})

    def dies(directory):
        writer(directory)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoints.save(2, dies, {})
    assert [step_of(path) for path in committed(tmp_path)] == [1]
    again = Checkpoints(tmp_path, ALONE, keep=9)  # sweeps the leftover
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    again.save(2, writer, {})
    assert [step_of(path) for path in committed(tmp_path)] == [1, 2]


def test_retention_keeps_the_last_and_counts_committed_ones_only(tmp_path):
    checkpoints = Checkpoints(tmp_path, ALONE, keep=2)
    (tmp_path / "step-99").mkdir()  # not a name that a commit gives
    for step in range(1, 6):
        checkpoints.save(step, writer, {})
        assert step_of(committed(tmp_path)[-1]) == step
    assert [step_of(path) for path in committed(tmp_path)] == [4, 5]
    assert Checkpoints(tmp_path, ALONE, keep=1).newest() is not None
    with pytest.raises(ValueError):
        step_of(tmp_path / "step-99")
