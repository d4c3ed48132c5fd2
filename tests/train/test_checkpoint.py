"""Law 4: a checkpoint exists or it does not; and what exists is whole, or is known not to be."""

import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mae_dist.engine import Snapshot
from mae_dist.engine.world import World
from mae_dist.errors import UserError
from mae_dist.evaluate.checkpoints import newest_of, trained
from mae_dist.train.checkpoint import Checkpoints, committed, problems, read_meta, share_name, step_of, surplus

ALONE = World(0, 1, torch.device("cpu"))


def snapshot(step: int, rank: int = 0, size: int = 1) -> Snapshot:
    return Snapshot({"w": torch.full((9,), float(step))} if rank == 0 else {}, {"m": torch.ones(3)}, rank, size, "")


def commit(checkpoints: Checkpoints, step: int, patience: float = 0.2, **meta) -> None:
    checkpoints.write_share(step, snapshot(step, 0, checkpoints.world.size))
    checkpoints.commit(step, meta, threading.Event(), patience)
    checkpoints.retire()


def steps(root: Path) -> list[int]:
    return [step_of(path) for path in committed(root)]


def test_the_newest_is_found_by_looking(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", ALONE, keep=9)
    assert checkpoints.newest() is None
    for step in (5, 1000, 20):
        commit(checkpoints, step, k=step)
    newest = checkpoints.newest()
    assert newest and step_of(newest) == 1000
    meta = read_meta(newest)
    assert (meta["step"], meta["k"]) == (1000, 1000)
    assert {"meta.json", *meta["files"]} == {path.name for path in newest.iterdir()}
    assert all(meta["files"][path.name]["bytes"] == path.stat().st_size for path in newest.glob("*.safetensors"))


def test_what_was_not_committed_is_no_checkpoint_and_is_swept(tmp_path):
    checkpoints = Checkpoints(tmp_path, ALONE, keep=9)
    commit(checkpoints, 1)
    checkpoints.write_share(2, snapshot(2))  # and killed before the rename
    (tmp_path / ".old-step-00000000").mkdir()  # killed while deleting
    assert steps(tmp_path) == [1]
    again = Checkpoints(tmp_path, ALONE, keep=9)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    commit(again, 2)
    assert steps(tmp_path) == [1, 2]


def attempts(root: Path, size: int) -> list[Checkpoints]:
    """The ranks of one attempt, in this process."""
    ranks = [Checkpoints(root, ALONE, keep=9) for _ in range(size)]
    for rank, made in enumerate(ranks):
        made.world, made.attempt = World(rank, size, ALONE.device), ranks[0].attempt
    return ranks


@pytest.mark.parametrize("before", [1, 2, 3])
def test_a_rank_of_a_dead_attempt_adds_nothing_to_this_one(tmp_path, before):
    """Its files come late, under the same names, also from another world size: no commit is made of them."""
    dead, alive = attempts(tmp_path, before), attempts(tmp_path, 2)
    for rank in range(before):
        dead[rank].write_share(8, snapshot(8, rank, before))
    alive[0].write_share(8, snapshot(8, 0, 2))
    with pytest.raises(OSError, match="no files from rank 1 after 0 s"):
        alive[0].commit(8, {}, threading.Event(), patience=0.1)
    assert steps(tmp_path) == []
    alive[1].write_share(8, snapshot(8, 1, 2))
    alive[0].commit(8, {}, threading.Event(), patience=0.1)
    assert problems(committed(tmp_path)[0]) == []
    assert sorted(read_meta(committed(tmp_path)[0])["files"]) == [
        "model.safetensors", "optimizer-00000-of-00002.safetensors", "optimizer-00001-of-00002.safetensors"
    ]  # fmt: skip
    Checkpoints(tmp_path, ALONE, keep=9)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000008"]


def test_a_rank_that_cannot_write_is_heard_at_once(tmp_path):
    ranks = attempts(tmp_path, 3)
    ranks[0].write_share(4, snapshot(4, 0, 3))
    ranks[1].write_share(4, snapshot(4, 1, 3))
    ranks[1].discard(4, "no space")
    assert not list(ranks[0].aside(4).glob("*00001-of-00003*"))
    with pytest.raises(OSError, match="rank 1: no space"):
        ranks[0].commit(4, {}, threading.Event(), patience=60)  # rank 2 is still silent
    assert share_name(1) in {path.name for path in ranks[0].aside(4).iterdir()}
    ranks[0].discard(4)
    assert list(tmp_path.iterdir()) == []


@given(st.sets(st.integers(1, 300), max_size=30), st.integers(1, 8), st.none() | st.integers(1, 40))
def test_retention_keeps_the_last_n_and_the_multiples_and_nothing_else(found, keep, every):
    rising = sorted(found)
    gone = set(surplus(rising, keep, every))
    kept = [step for step in rising if step not in gone]
    assert gone <= found
    assert kept[-keep:] == rising[-keep:]  # so never the last
    assert all(step not in gone for step in found if every and step % every == 0)
    assert all(every and step % every == 0 for step in kept[:-keep])
    assert surplus(kept, keep, every) == []  # once is enough


@settings(max_examples=25)
@given(st.integers(1, 4), st.none() | st.integers(1, 6), st.lists(st.integers(1, 3), min_size=1, max_size=8))
def test_retention_as_a_run_goes_on_counts_committed_ones_only(tmp_path_factory, keep, every, gaps):
    """A law of what is on disk: deleting as one goes leaves what deleting once at the end would."""
    root = tmp_path_factory.mktemp("c")
    checkpoints, step, saved = Checkpoints(root, ALONE, keep, every), 0, []
    (root / "step-99").mkdir()  # not a name that a commit gives
    (root / ".damaged-step-00000001").mkdir()
    for gap in gaps:
        step += gap
        saved.append(step)
        commit(checkpoints, step)
        assert steps(root)[-1] == step
    expected = [s for i, s in enumerate(saved) if i >= len(saved) - keep or (every and s % every == 0)]
    assert steps(root) == expected
    assert {path.name for path in root.iterdir()} - {path.name for path in committed(root)} == {
        "step-99", ".damaged-step-00000001"
    }  # fmt: skip
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("two")
    checkpoints = Checkpoints(root, ALONE, keep=9)
    for step in (4, 8):
        commit(checkpoints, step)
    return root


@settings(max_examples=40)
@given(st.data())
def test_a_changed_bit_anywhere_is_found_and_the_one_before_is_used(two, tmp_path_factory, data):
    root = tmp_path_factory.mktemp("damaged") / "c"
    shutil.copytree(two, root)
    newest = committed(root)[-1]
    path = data.draw(st.sampled_from(sorted(newest.iterdir())))
    content = bytearray(path.read_bytes())
    at, bit = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7))
    content[at] ^= 1 << bit
    path.write_bytes(content)
    if path.name == "meta.json":
        try:
            if json.loads(bytes(content)) == read_meta(two / newest.name):
                return  # one white space for another
        except ValueError:
            pass
    chosen = Checkpoints(root, ALONE, keep=9).newest()
    assert chosen and step_of(chosen) == 4
    assert sorted(p.name for p in root.iterdir()) == [".damaged-step-00000008", "step-00000004"]
    assert (root / ".damaged-step-00000008" / path.name).read_bytes() == content  # set aside as it is


@pytest.mark.parametrize("name", ["meta.json", "model.safetensors", "optimizer-00000-of-00001.safetensors"])
@pytest.mark.parametrize("how", ["cut", "empty", "deleted", "longer"])
def test_the_damaged_file_is_named(two, tmp_path, capsys, name, how):
    root = tmp_path / "c"
    shutil.copytree(two, root)
    path = committed(root)[-1] / name
    content = path.read_bytes()
    if how == "deleted":
        path.unlink()
    else:
        path.write_bytes({"cut": content[:-3], "empty": b"", "longer": content + b"x"}[how])
    chosen = Checkpoints(root, ALONE, keep=9).newest()
    assert chosen and step_of(chosen) == 4
    said = capsys.readouterr().err
    assert f"damaged checkpoint: {path}: " in said
    assert "set aside as .damaged-step-00000008; going on from step-00000004" in said
    if name != "meta.json":
        assert {"deleted": "missing"}.get(how, f" bytes, {len(content)} were written") in said


def test_a_run_with_damaged_checkpoints_alone_does_not_start_from_zero(two, tmp_path):
    root = tmp_path / "c"
    shutil.copytree(two, root)
    for path in committed(root):
        (path / "meta.json").unlink()
    for _ in range(2):  # also the second time, when all are set aside
        with pytest.raises(UserError, match="only damaged checkpoints"):
            Checkpoints(root, ALONE, keep=9).newest()
    assert sorted(p.name for p in root.iterdir()) == [".damaged-step-00000004", ".damaged-step-00000008"]


def test_the_same_step_may_be_damaged_twice(two, tmp_path):
    root = tmp_path / "c"
    shutil.copytree(two, root)
    for _ in range(2):
        checkpoints = Checkpoints(root, ALONE, keep=9)
        (root / "step-00000008" / "model.safetensors").write_bytes(b"")
        chosen = checkpoints.newest()
        assert chosen and step_of(chosen) == 4
        commit(checkpoints, 8)
    assert sorted(p.name for p in root.glob(".*")) == [".damaged-step-00000008", ".damaged-step-00000008-1"]


def test_a_damaged_checkpoint_is_not_evaluated(two, tmp_path):
    root = tmp_path / "run" / "checkpoints"
    shutil.copytree(two, root)
    weights = root / "step-00000008" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    for given_path in (tmp_path / "run", weights.parent):
        with pytest.raises(UserError, match=r"model\.safetensors: not the bytes .*; use another: step-00000004"):
            trained(newest_of(given_path), None)  # type: ignore[arg-type]
    (weights.parent / "meta.json").unlink()
    with pytest.raises(UserError, match=r"meta\.json: missing"):
        trained(newest_of(weights.parent), None)  # type: ignore[arg-type]


def test_only_a_committed_name_has_a_step(tmp_path):
    with pytest.raises(ValueError):
        step_of(tmp_path / "step-99")
