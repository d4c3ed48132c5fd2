"""The ring: order, whatever workers do; a name for each death; no batch written over; nobody left behind."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from mae_dist.data.ring import HELD, Ring, WorkerDied, late_workers
from mae_dist.errors import UserError

SHAPE = (1, 4, 4)


def fill(rows, images):
    """Each image is its number; the second column becomes its square."""
    for row, image in zip(rows, images, strict=True):
        image.fill_(int(row[0]) % 256)
        row[1] = row[0] ** 2


def slow_at_times(rows, images):
    time.sleep(0.03 * (int(rows[0, 0]) // 8 % 3 == 0))
    fill(rows, images)


def tables(batch, count, last=None):
    lengths = [batch] * (count - 1) + [last or batch]
    starts = np.cumsum([0, *lengths])
    return [np.stack([np.arange(s, s + n), np.zeros(n, int)], axis=1) for s, n in zip(starts, lengths, strict=False)]


def check(n, batch, table, images):
    numbers = np.arange(n * batch, n * batch + len(table))
    np.testing.assert_array_equal(table, np.stack([numbers, numbers**2], axis=1))
    assert images.shape == (len(table), *SHAPE) and images.dtype == torch.uint8
    np.testing.assert_array_equal(images[:, 0, 0, 0].numpy(), numbers % 256)


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.fixture
def ring():
    """Makes rings and closes them."""
    made = []

    def make(work=fill, workers=2, batch=20):
        made.append(Ring(work, workers, batch, 2, SHAPE, pin=False))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.mark.parametrize(("workers", "batch"), [(1, 1), (2, 20), (3, 8), (5, 3), (2, 3000)])
def test_batches_come_in_order_whole_and_with_what_workers_found(ring, workers, batch):
    made = ring(workers=workers, batch=batch)
    batches = list(enumerate(made.run(tables(batch, 12, last=max(1, batch // 3)))))
    assert len(batches) == 12
    for n, (table, images) in batches:  # all kept: none was written over
        check(n, batch, table, images)


def test_a_slow_worker_reorders_nothing(ring):
    for n, (table, images) in enumerate(ring(slow_at_times, workers=3).run(tables(20, 15))):
        check(n, 20, table, images)


def test_a_batch_stays_as_long_as_a_view_of_it_is_held_and_then_makes_room(ring):
    made = ring()
    kept = []
    for n, (_, images) in enumerate(made.run(tables(20, 30))):
        if n % 4 == 0:
            kept.append((n, images[3:5, 0]))  # a view only
        assert len(made.held) <= HELD
    for n, view in kept:
        assert view[:, 0, 0].tolist() == [(n * 20 + 3) % 256, (n * 20 + 4) % 256]
    kept.clear()
    del images, view
    assert not made.held


def test_two_rings_at_once(ring):
    """A validation in the middle of training."""
    outer = ring().run(tables(20, 9))
    for n, (table, images) in enumerate(outer):
        check(n, 20, table, images)
        inner = ring()
        for m, (inner_table, inner_images) in enumerate(inner.run(tables(20, 4))):
            check(m, 20, inner_table, inner_images)
        inner.close()


@pytest.mark.parametrize("at_work", [True, False])
def test_a_killed_worker_is_an_error_with_its_name(ring, at_work):
    made = ring(slow_at_times if at_work else fill, workers=4)
    batches = made.run(tables(20, 10**4))
    next(batches)
    pid = made.workers[3]
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(WorkerDied, match=rf"data worker 3 \(pid {pid}\) was killed by signal 9"):
        for _ in batches:
            pass


def test_workers_that_were_stopped_are_named_and_end_the_run(ring):
    made = ring(workers=2)
    made.limit = 1.0
    batches = made.run(tables(20, 10**4))
    next(batches)
    for pid in made.workers.values():
        os.kill(pid, signal.SIGSTOP)
    either = "|".join(map(str, made.workers.values()))
    with pytest.raises(WorkerDied, match=rf"waited \d+ s for .*\(pid ({either}), stopped by a signal\)"):
        for _ in batches:
            pass
    pids = list(made.workers.values())
    made.close()
    assert not any(map(alive, pids))


def test_workers_that_are_slow_are_waited_for_and_named(ring):
    def slow(rows, images):
        time.sleep(1.5)
        fill(rows, images)

    made, said = ring(slow, workers=1), []
    made.limit = 0.5
    watching = threading.Thread(target=lambda: said.extend(late_workers() for _ in range(100) if not time.sleep(0.03)))
    watching.start()
    next(made.run(tables(8, 1)))
    watching.join()
    assert any(words.startswith(f"data worker 0 (pid {made.workers[0]}, sleeping), ") for words in said)
    assert late_workers() == ""


def test_a_worker_that_ends_is_an_error_with_its_status(ring):
    with pytest.raises(WorkerDied, match=r"data worker [01] \(pid \d+\) ended with status 7"):
        next(ring(lambda rows, images: os._exit(7)).run(tables(20, 2)))


def test_a_users_mistake_keeps_its_words_and_any_other_error_its_traceback(ring):
    def mistaken(rows, images):
        raise UserError("shard 3: unlesbar — café\udce9")

    def broken(rows, images):
        raise KeyError("broken thing")

    with pytest.raises(UserError, match=r"^shard 3: unlesbar — café\\udce9$"):
        next(ring(mistaken).run(tables(20, 2)))
    with pytest.raises(
        RuntimeError, match=r"(?s)data worker \d \(pid \d+\) failed:.*in broken.*KeyError: 'broken thing'"
    ):
        next(ring(broken).run(tables(20, 2)))


def test_closing_leaves_nobody(ring):
    made = ring(slow_at_times)
    next(made.run(tables(20, 50)))
    pids = list(made.workers.values())
    made.close()
    assert len(pids) == 2 and not any(map(alive, pids))


@pytest.mark.dist
def test_workers_end_when_the_trainer_is_killed():
    code = """
import time, numpy as np
from mae_dist.data.ring import Ring
ring = Ring(lambda rows, images: time.sleep(0.01), 3, 20, 2, (1, 4, 4), False)
batches = ring.run(np.zeros((20, 2), int) for _ in iter(int, 1))
next(batches)
print(*ring.workers.values(), flush=True)
time.sleep(600)
"""
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout
    pids = list(map(int, trainer.stdout.readline().split()))
    assert len(pids) == 3 and all(map(alive, pids))
    trainer.kill()
    trainer.wait()
    deadline = time.monotonic() + 60
    while any(map(alive, pids)):
        assert time.monotonic() < deadline, "workers outlived their trainer"
        time.sleep(0.05)


def test_small_pipes_hold_all_tasks(monkeypatch):
    """A kernel gives pipes of a page to a user who has many."""
    real = os.pipe

    def small():
        ends = real()
        fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, 4096)
        return ends

    monkeypatch.setattr(os, "pipe", small)
    made = Ring(fill, 1, 8192, 2, SHAPE, pin=False)
    try:
        assert made.pieces * len(made.tables) <= 4096 // 8
    finally:
        made.close()
