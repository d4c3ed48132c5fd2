"""Saving beside the training: what the loop sees, what a full disk does, and what any kill leaves behind."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from mae_dist.engine import Snapshot, capture, state_bytes
from mae_dist.engine.base import ParamState
from mae_dist.engine.world import World
from mae_dist.errors import UserError
from mae_dist.track.journal import Journal
from mae_dist.train import saving
from mae_dist.train.checkpoint import Checkpoints, committed, problems, step_of, surplus
from mae_dist.train.saving import SaveFailed, Saver, undisturbed

ALONE = World(0, 1, torch.device("cpu"))


class Filled:
    """An engine whose every number is the step it is at."""

    optimizer_state = ("exp_avg", "exp_avg_sq")

    def __init__(self, world: World, numbers: int = 1000):
        self.world, self.step = world, 0
        self.shapes = dict.fromkeys("abcd", (numbers,))

    def gather(self, name):
        filled = torch.full(self.shapes[name], float(self.step))
        return ParamState(filled, {"exp_avg": filled, "exp_avg_sq": filled})

    def counters(self):
        return {"updates": torch.tensor(float(self.step))}


def steps(root: Path) -> list[int]:
    return [step_of(path) for path in committed(root)]


def metrics(journal: Path) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for record in map(json.loads, journal.read_text().splitlines()):
        for key, value in record["metrics"].items():
            found.setdefault(key, {})[record["step"]] = value
    return found


def saver_of(checkpoints, engine, **options):
    return Saver(checkpoints, partial(capture, engine), state_bytes(engine), **options)


@pytest.fixture
def saver(tmp_path):
    return saver_of(Checkpoints(tmp_path / "c", ALONE, 9), Filled(ALONE), journal=Journal(tmp_path / "journal.jsonl"))


def slow(monkeypatch, gate: threading.Event):
    """Writing begins when `gate` opens."""
    write = Snapshot.write
    monkeypatch.setattr(Snapshot, "write", lambda self, directory: (gate.wait(30), write(self, directory))[1])


def test_training_goes_on_while_a_snapshot_is_written(saver, tmp_path, monkeypatch):
    gate = threading.Event()
    slow(monkeypatch, gate)
    saver.take.args[0].step = 1
    saver.save(1, {}, wait=False)
    saver.take.args[0].step = 2  # later steps do not change what is written
    saver.report()
    assert steps(tmp_path / "c") == []
    gate.set()
    saver.save(2, {}, wait=True)
    assert steps(tmp_path / "c") == [1, 2]
    for path in committed(tmp_path / "c"):
        assert all((t == step_of(path)).all() for f in path.glob("*.safetensors") for t in load_file(f).values())
    found = metrics(tmp_path / "journal.jsonl")
    assert {key: sorted(values) for key, values in found.items()} == {
        "perf/save_stall_s": [1, 2], "perf/save_s": [1, 2], "perf/checkpoint_mb": [1, 2]
    }  # fmt: skip
    size = sum(f.stat().st_size for f in committed(tmp_path / "c")[-1].glob("*.safetensors"))
    assert found["perf/checkpoint_mb"][2] == size / 1e6


def test_without_background_a_save_is_there_when_it_returns(tmp_path):
    saver = saver_of(Checkpoints(tmp_path, ALONE, 9), Filled(ALONE), in_background=False)
    saver.save(1, {}, wait=False)
    assert steps(tmp_path) == [1]


def test_one_save_at_a_time(saver, tmp_path, monkeypatch):
    gate = threading.Event()
    slow(monkeypatch, gate)
    saver.save(1, {}, wait=False)
    threading.Timer(0.2, gate.set).start()
    saver.save(2, {}, wait=False)
    assert gate.is_set() and 1 in steps(tmp_path / "c")  # the second waited for the first
    saver.leave()
    assert steps(tmp_path / "c") == [1, 2]


def test_a_signal_during_a_save_is_acted_on_after_it(saver, tmp_path):
    """Also the second SIGINT, which interrupts: the checkpoint is whole first."""
    gather, came = saver.take.args[0].gather, []

    def interrupted(name):
        signal.raise_signal(signal.SIGINT)
        return gather(name)

    saver.take.args[0].gather = interrupted
    with pytest.raises(KeyboardInterrupt):
        saver.save(3, {}, wait=True)
    assert steps(tmp_path / "c") == [3]
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        with undisturbed():
            signal.raise_signal(signal.SIGTERM)
            assert came == []
        assert came == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_clock_asks_on_rank_0_alone(tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(saving.time, "monotonic", lambda: now)
    checkpoints = Checkpoints(tmp_path, ALONE, 9)
    worlds = [SimpleNamespace(world=World(rank, 2, ALONE.device)) for rank in range(2)]
    savers = [Saver(world, None, 0, minutes=2) for world in worlds]  # type: ignore[arg-type]
    assert [s.due for s in savers] == [False, False]
    now += 119
    assert [s.due for s in savers] == [False, False]
    now += 1
    assert [s.due for s in savers] == [True, False]
    assert not saver_of(checkpoints, Filled(ALONE)).due


def test_a_fault_of_ours_is_raised_in_the_loop(saver, monkeypatch):
    monkeypatch.setattr(Snapshot, "write", lambda self, directory: 1 / 0)
    saver.save(1, {}, wait=False)
    saver.write.join(30)
    with pytest.raises(ZeroDivisionError):
        saver.report()


def test_no_room_for_one_checkpoint_is_said_before_the_first_step(tmp_path):
    saver = saver_of(Checkpoints(tmp_path, ALONE, 9), Filled(ALONE, numbers=2**50))
    with pytest.raises(UserError, match=r"a checkpoint needs \d+ MB, \d+ MB are free; make room there"):
        saver.check_room()


@pytest.fixture
def small_disk(tmp_path):
    """8 MB."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs to mount a small disk (root)")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("checked", [True, False], ids=["before", "in the middle"])
def test_a_full_disk_costs_a_save_and_not_the_run(small_disk, tmp_path, monkeypatch, capfd, checked):
    """2.4 MB a checkpoint, 8 MB of disk, some of it taken: said, undone, tried again; the last one must not fail."""
    if not checked:  # another run takes the room meanwhile
        monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**40, 0, 2**40))
    monkeypatch.setattr(saving, "RETRY", 0.0)
    root, journal = small_disk / "c", Journal(tmp_path / "journal.jsonl")
    saver = saver_of(Checkpoints(root, ALONE, 2), Filled(ALONE, numbers=50_000), journal=journal)
    saver.save(1, {}, wait=True)
    assert not saver.due
    taken = small_disk / "taken"
    taken.write_bytes(bytes(4_500_000))
    saver.save(2, {}, wait=False)
    if saver.write:
        saver.write.join(30)
    saver.report()
    said = capfd.readouterr().err
    assert "warning: no checkpoint of step 2: " in said and str(root) in said and "make room there" in said
    assert ("a checkpoint needs 3 MB, " if checked else "No space left on device") in said
    assert [path.name for path in root.iterdir()] == ["step-00000001"]  # and the room is free again
    assert saver.due  # soon
    with pytest.raises(SaveFailed, match=r"the checkpoint of step 3 could not be saved: .*make room there"):
        saver.save(3, {}, wait=True)
    taken.unlink()
    saver.save(4, {}, wait=True)
    assert steps(root) == [1, 4] and not saver.due
    assert metrics(tmp_path / "journal.jsonl")["progress/failed_saves"] == {2: 1.0, 3: 2.0}
    assert [problems(path) for path in committed(root)] == [[], []]


# Two real ranks. The server has imported what they need, so that a rank starts in no time.

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["mae_dist.train.saving", "tests.train.test_saving"])


def start_two(target, *arguments) -> list:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ranks = [PROCESSES.Process(target=_rank, args=(rank, port, target, arguments)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    return ranks


def _rank(rank, port, target, arguments):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    world = World.join("cpu")
    target(world, *arguments)
    world.leave()


def _one_cannot_write(world, root, which):
    saver = saver_of(Checkpoints(root, world, 9), Filled(world))
    saver.save(1, {}, wait=True)
    if world.rank == which:
        write = Snapshot.write

        def full(self, directory):
            write(self, directory)
            raise OSError(28, "No space left on device", str(directory))

        def slowly(step, why=""):
            time.sleep(0.3)
            discard(step, why)

        discard, saver.checkpoints.discard = saver.checkpoints.discard, slowly
        Snapshot.write = full
    saver.save(2, {}, wait=False)  # goes on
    for step in (3, 4):
        try:
            saver.save(step, {}, wait=True)
            raise AssertionError("nobody knew")
        except SaveFailed as error:
            (root / f"said-{step}-{world.rank}").write_text(str(error))
    if world.rank == which:
        Snapshot.write = write
    saver.save(5, {}, wait=True)


@pytest.mark.dist
@pytest.mark.parametrize("which", [0, 1])
def test_all_ranks_agree_that_the_last_save_failed(tmp_path, which):
    ranks = start_two(_one_cannot_write, tmp_path, which)
    for rank in ranks:
        rank.join(120)
        assert rank.exitcode == 0
    for step in (3, 4):
        said = [(tmp_path / f"said-{step}-{rank}").read_text() for rank in range(2)]
        assert said[0] == said[1] and "No space left on device; make room there" in said[0]
        assert ("rank 1: " in said[0]) == (which == 1)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["step-00000001", "step-00000005"]


def _save_for_ever(world, root):
    checkpoints = Checkpoints(root, world, keep=2, keep_every=10)
    newest = checkpoints.newest()
    engine = Filled(world, numbers=100_000)
    engine.step = step_of(newest) if newest else 0
    saver = saver_of(checkpoints, engine)
    while True:
        engine.step += 1
        saver.save(engine.step, {}, wait=engine.step % 3 == 0)
        if world.is_main and engine.step % 3 == 0:
            (root.parent / "aside").write_text(str(engine.step))
            (root.parent / "aside").rename(root.parent / "promised")


@pytest.mark.dist
@pytest.mark.parametrize("seed", [0])
def test_whenever_ranks_are_killed_what_is_left_is_whole(tmp_path, seed):
    """Saves without a pause; rank 0, rank 1 or both are killed at a random moment, again and again."""
    chance, root, before, unfinished = random.Random(seed), tmp_path / "c", -1, 0
    root.mkdir()
    for _ in range(8):
        ranks = start_two(_save_for_ever, root)
        begun, deadline = max(steps(root), default=0), time.monotonic() + 120
        while max(steps(root), default=0) < begun + 2:
            assert time.monotonic() < deadline and all(rank.is_alive() for rank in ranks)
            time.sleep(0.01)
        time.sleep(chance.random() * 0.2)
        for rank in chance.choice([ranks[:1], ranks[1:], ranks]):
            os.kill(rank.pid, signal.SIGKILL)
        for rank in ranks:
            rank.join(60)
            assert rank.exitcode
        unfinished += len(list(root.glob(".step-*")))
        found = committed(root)
        promised = int((tmp_path / "promised").read_text())
        assert step_of(found[-1]) >= max(promised, before)
        before = step_of(found[-1])
        for path in found:
            assert problems(path) == []
            numbers = [t for f in path.glob("*.safetensors") for t in load_file(f).values()]
            assert len(list(path.glob("*.safetensors"))) == 3 and sum(map(torch.numel, numbers)) == 1_200_001
            assert all((t == step_of(path)).all() for t in numbers)
        kept = [step_of(path) for path in found]
        assert {*range(10, before, 10), before - 1, before} <= set(kept)
        assert len(surplus(kept, 2, 10)) <= 1  # killed between the commit and the deletion
    assert unfinished  # some were hit in the middle of a save
