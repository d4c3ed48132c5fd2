"""When the watchdog ends a process, and what it leaves alone. In this process; the accidents are in tests/cluster."""

import json
import os
import signal
import subprocess
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mae_dist.data.ring import Ring, WorkerDied
from mae_dist.engine import World
from mae_dist.train import watchdog
from mae_dist.train.peers import FAILED, HOST, MISTAKE, SIZE, Board
from mae_dist.train.stop import Stopped
from mae_dist.train.watchdog import DATA, SAVING, RankLost, Watchdog

WORLD = World(0, 1, torch.device("cpu"))
GRACE = 4.0  # seconds


class Dog:
    """A watchdog of a run that updates have begun in, and what it made of it."""

    def __init__(self, path, monkeypatch):
        monkeypatch.setattr(watchdog, "GRACE", GRACE)
        self.ended: list[Exception] = []
        self.stop = SimpleNamespace(signal=0, begun=True, leaving=False, exit=self.ended.append)
        self.watch = Watchdog(path, WORLD, self.stop, 0.5, step=0)  # type: ignore[arg-type]
        self.watch.steps.extend([0.01] * 5)

    def bark(self) -> Exception:
        """What it ends the process with, sooner or later."""
        deadline = time.monotonic() + 60
        while not self.ended and time.monotonic() < deadline:
            time.sleep(0.05)
        return self.ended[0]


@pytest.fixture
def dog(tmp_path, monkeypatch):
    made = Dog(tmp_path, monkeypatch)
    yield made
    made.watch.close("left")


def test_the_grace_of_a_signal_begins_with_the_signal_however_long_the_phase_is(dog):
    dog.watch.enter("k-NN", 5)
    time.sleep(GRACE + 0.5)
    dog.stop.signal = signal.SIGTERM
    time.sleep(0.5)
    assert dog.ended == []
    assert isinstance(dog.bark(), Stopped)


def test_a_save_on_a_signal_may_take_as_long_as_it_takes(dog):
    dog.stop.signal = signal.SIGTERM
    dog.watch.enter(SAVING, 5)
    time.sleep(GRACE + 1.5)
    assert dog.ended == []


def test_a_save_is_not_waited_for_when_another_rank_is_gone(dog):
    """Its collective never ends: NCCL would wait, where gloo raises."""
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    beat = json.dumps([1, gone.pid, HOST, 5, SAVING, 0.0])
    dog.watch.board.path(1).write_text(beat)
    dog.watch.enter(SAVING, 5)
    found = dog.bark()
    assert isinstance(found, RankLost) and "was killed" in str(found)


def test_the_last_word_is_not_overwritten_by_a_beat_that_had_begun(tmp_path, monkeypatch):
    dog = Dog(tmp_path, monkeypatch)
    begun, write = threading.Event(), dog.watch.board.write

    def slow(step: int, phase: str, seconds: float = 0.0, late: str = "") -> None:
        if not phase.startswith(FAILED):
            begun.set()
            time.sleep(0.3)
        write(step, phase, seconds, late)

    monkeypatch.setattr(dog.watch.board, "write", slow)
    assert begun.wait(10)
    dog.watch.close(f"{FAILED}why")
    time.sleep(0.6)
    assert [beat.phase for beat in dog.watch.board.read()] == [f"{FAILED}why"]


@pytest.mark.parametrize("letters", ["短", "\udce9", "\x07", '"', "é"])
def test_a_mistake_in_any_letters_is_heard_by_the_other_ranks(tmp_path, letters):
    """Cut in bytes it was no JSON: they spoke of a lost rank, which is started again, where it was a mistake."""
    board = Board(tmp_path, WORLD)
    for length in (10, 170, 2000):
        board.write(3, MISTAKE + letters * length, 1.0, letters * length)
        (beat,) = board.read()
        assert beat.phase.startswith(MISTAKE + letters * min(length, 10)) and beat.step == 3
        assert board.path(0).stat().st_size == SIZE


def test_a_rank_that_waits_for_its_own_worker_is_the_one_waited_for(dog, capfd):
    """The speaker itself, whose other ranks are in a collective of the same step."""
    ring = Ring(lambda rows, images: time.sleep(600), 1, 8, 2, (1, 4, 4), False)
    pid = ring.workers[0]

    def wait() -> None:
        with pytest.raises(WorkerDied):
            next(ring.run([np.zeros((8, 2), int)]))

    waiting = threading.Thread(target=wait)
    waiting.start()
    os.kill(pid, signal.SIGSTOP)
    dog.watch.board.path(1).write_text(json.dumps([1, os.getpid(), HOST, 5, "forward and backward", 9.0, ""]))
    dog.watch.enter(DATA, 5)
    said, deadline = "", time.monotonic() + 60
    while "waited for" not in said and time.monotonic() < deadline:
        dog.watch.board.path(1).touch()  # it goes on to write
        said += capfd.readouterr().err
        time.sleep(0.05)
    assert "waited for: rank 0\n" in said
    assert f"waits for data worker 0 (pid {pid}, stopped by a signal)" in said
    os.kill(pid, signal.SIGKILL)
    waiting.join()
    ring.close()
