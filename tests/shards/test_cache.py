"""The cache of whole shards: what is in it is whole, it was fetched once, it stays under its limit, come what may."""

import fcntl
import hashlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from mae_dist.errors import Unreadable, UserError
from mae_dist.shards import download, remote
from mae_dist.shards.cache import Cache, read_range
from mae_dist.shards.download import Wanted
from tests.shards.servers import HTTPServer

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def small_and_fast(monkeypatch):
    """Requests of 1000 bytes, waits of milliseconds."""
    monkeypatch.setattr(download, "CHUNK", 1000)
    monkeypatch.setattr(download, "FIRST_WAIT", 0.002)


@pytest.fixture
def files(tmp_path):
    """Four files of 3500 random bytes, two of them with the same name."""
    rng = random.Random(0)
    for name in ("a", "b", "x/same", "y/same"):
        path = tmp_path / "served" / f"{name}.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rng.randbytes(3500))
    return tmp_path / "served"


@pytest.fixture
def server(files):
    started = HTTPServer(files)
    yield started
    started.stop()


@pytest.fixture
def cache(tmp_path):
    made = Cache(tmp_path / "cache", limit=100_000)
    made.prepare()
    return made


def wanted(server, name) -> Wanted:
    data = (server.directory / name).read_bytes()
    return Wanted(f"{server.url}/{name}", len(data), hashlib.sha256(data).hexdigest())


def content(cache, shard) -> bytes | None:
    return cache.read(shard, 0, shard.num_bytes + 1)


def leftovers(cache) -> list[str]:
    return [path.name for path in cache.directory.iterdir() if path.suffix in (".tmp", ".needs")]


def test_what_is_fetched_is_what_was_served_and_is_fetched_once(server, cache):
    for name in ("a.tar", "x/same.tar", "y/same.tar"):
        assert content(cache, wanted(server, name)) is None
        for _ in range(3):
            cache.ensure(wanted(server, name))
        assert content(cache, wanted(server, name)) == (server.directory / name).read_bytes()
        assert server.asked(name) == [(0, 1000), (1000, 2000), (2000, 3000), (3000, 3500)]
    assert not leftovers(cache)
    assert cache.counters.totals() | {"downloads": 3, "bytes": 10500, "retries": 0} == cache.counters.totals()


def test_another_content_at_the_same_place_is_another_file(server, cache):
    before = wanted(server, "a.tar")
    cache.ensure(before)
    (server.directory / "a.tar").write_bytes(bytes(3500))
    after = wanted(server, "a.tar")
    cache.ensure(after)
    assert content(cache, after) == bytes(3500) != content(cache, before)


def test_after_a_dropped_connection_only_the_rest_is_asked_for(server, cache):
    server.faults["a.tar"] = ["", "", "drop", "drop"]
    cache.ensure(wanted(server, "a.tar"))
    assert content(cache, wanted(server, "a.tar")) == (server.directory / "a.tar").read_bytes()
    assert [start for start, _ in server.asked("a.tar")] == [0, 1000, 2000, 2000, 2000, 3000]
    assert cache.counters.totals()["retries"] == 2


def test_a_server_without_ranges_is_read_from_the_start(files, cache):
    server = HTTPServer(files, ranges=False)
    server.faults["a.tar"] = ["drop", "drop", "drop"]
    cache.ensure(wanted(server, "a.tar"))
    assert content(cache, wanted(server, "a.tar")) == (files / "a.tar").read_bytes()
    assert read_range(wanted(server, "b.tar"), 10, 20, cache.counters) is None
    server.stop()


@pytest.mark.parametrize(
    "faults", [["error"] * 7, ["missing"] * 2, ["wrong"] * 5 + ["error"], ["wrong"] * 8 + ["drop"]]
)
def test_a_fault_that_passes_is_survived(server, cache, faults):
    server.faults["a.tar"] = faults
    cache.ensure(wanted(server, "a.tar"))
    assert content(cache, wanted(server, "a.tar")) == (server.directory / "a.tar").read_bytes()
    assert not leftovers(cache)


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda path: path.unlink(), r"a.tar: not there, tried 3 times, last error: FileNotFoundError"),
        (lambda path: path.write_bytes(bytes(3500)), r"a.tar: cannot be fetched, tried 3 times, .*sha256 \w{64} where"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), r"a.tar: .*3499 bytes where the manifest says 3500"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), r"a.tar: .*more bytes where the manifest says 3500"),
    ],
    ids=["missing", "other bytes", "shorter", "longer"],
)
@pytest.mark.parametrize("ranges", [True, False])
def test_a_fault_that_stays_is_an_error_with_the_place(files, cache, break_it, says, ranges):
    server = HTTPServer(files, ranges)
    shard = wanted(server, "a.tar")
    break_it(files / "a.tar")
    with pytest.raises(UserError, match=f"^{server.url}/{says}"):
        cache.ensure(shard)
    assert content(cache, shard) is None and not leftovers(cache)
    server.stop()


def test_a_server_that_is_gone_is_an_error_with_the_place(server, cache):
    shard = wanted(server, "a.tar")
    server.stop()
    for fetch in (lambda: cache.ensure(shard), lambda: read_range(shard, 0, 10, cache.counters)):
        with pytest.raises(Unreadable, match=r"a.tar: cannot be fetched, tried 8 times, last error: \w*Connect"):
            fetch()  # status 75: no mistake of the user's


def test_no_further_try_begins_after_so_long(server, cache, monkeypatch):
    monkeypatch.setattr(download, "GIVE_UP", 0.0)
    server.faults["a.tar"] = ["error"] * 8
    with pytest.raises(UserError, match=r"a.tar: cannot be fetched, tried 1 times, .*Error: the server says 500"):
        cache.ensure(wanted(server, "a.tar"))


def test_a_size_is_checked_without_a_checksum_too(server, cache):
    shard = wanted(server, "a.tar")._replace(sha256="")
    cache.ensure(shard)
    with pytest.raises(UserError, match="more bytes where the manifest says 3499"):
        cache.ensure(shard._replace(num_bytes=3499))


def test_a_command_is_read_to_its_end_and_named_when_it_fails(files, cache):
    data = (files / "a.tar").read_bytes()
    good = Wanted(f"pipe:cat {files}/a.tar", len(data), hashlib.sha256(data).hexdigest())
    cache.ensure(good)
    assert content(cache, good) == data
    for command, says in (("exit 3", "ended with status 3"), ("head -c 99 /dev/zero", "99 bytes where")):
        with pytest.raises(UserError, match=rf"^pipe:{command}: cannot be fetched.*{says}"):
            cache.ensure(good._replace(place=f"pipe:{command}"))


def group_exists(process) -> bool:
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("command", ["sleep 1000", "cat {tar} | (head -c 700; sleep 1000)", "exec >&-; sleep 1000"])
def test_a_command_that_falls_silent_is_killed_with_all_that_it_started_and_named(files, cache, command, monkeypatch):
    """Before the first byte, in the middle, and behind the last: an end that never comes."""
    monkeypatch.setattr(remote, "SILENCE", 0.2)
    started, popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    data = (files / "a.tar").read_bytes()
    place = f"pipe:{command.format(tar=files / 'a.tar')}"
    with pytest.raises(UserError, match=rf"^pipe:.*cannot be fetched, tried {download.TRIES} times, .* was killed"):
        cache.ensure(Wanted(place, len(data), hashlib.sha256(data).hexdigest()))
    assert len(started) == download.TRIES
    deadline = time.monotonic() + 30
    while any(map(group_exists, started)):
        assert time.monotonic() < deadline, "something of the command is still there"
        time.sleep(0.02)


def test_a_slow_command_is_not_a_silent_one(files, cache, monkeypatch):
    """3.5 seconds in all, with pauses of half a second."""
    monkeypatch.setattr(remote, "SILENCE", 3)
    data = (files / "a.tar").read_bytes()
    slow = f"pipe:for i in 0 1 2 3 4 5 6; do dd bs=500 count=1 skip=$i if={files}/a.tar status=none; sleep 0.5; done"
    wanted_here = Wanted(slow, len(data), hashlib.sha256(data).hexdigest())
    cache.ensure(wanted_here)
    assert content(cache, wanted_here) == data


def test_many_processes_download_once(server, cache):
    server.delay = 0.02
    names = ["a.tar", "b.tar", "x/same.tar", "y/same.tar"]
    shards = [wanted(server, name) for name in names]

    def work(seed: int) -> None:
        for shard in random.Random(seed).sample(shards, 4):
            cache.ensure(shard)

    workers = [FORK.Process(target=work, args=[seed]) for seed in range(5)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
        assert worker.exitcode == 0
    assert all(server.sent[name] == 3500 for name in names)
    assert cache.counters.totals()["downloads"] == 4
    assert not leftovers(cache)


def test_a_killed_process_leaves_nothing_but_what_the_next_start_sweeps(server, cache):
    server.delay = 0.2
    shard = wanted(server, "a.tar")
    worker = FORK.Process(target=cache.ensure, args=[shard])
    worker.start()
    while not any((cache.directory / name).stat().st_size for name in leftovers(cache)):  # made, locked, and at work
        time.sleep(0.001)
    cache.prepare()
    assert leftovers(cache), "a download under way was swept away"
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    assert content(cache, shard) is None and leftovers(cache)
    cache.prepare()
    assert not leftovers(cache)
    cache.ensure(shard)
    assert content(cache, shard) == (server.directory / "a.tar").read_bytes()


def total(cache) -> int:
    return sum(size for _, size, _ in cache._files())


def test_the_least_recently_used_goes_and_what_is_needed_stays(server, cache):
    cache.limit = 7500
    a, b, x, y = (wanted(server, name) for name in ("a.tar", "b.tar", "x/same.tar", "y/same.tar"))
    for age, shard in ((30, a), (20, b)):
        cache.ensure(shard)
        os.utime(cache.directory / shard.name, (time.time() - age,) * 2)
    cache.touch(a)
    cache.ensure(x)
    assert [cache.has(shard) for shard in (a, b, x, y)] == [True, False, True, False]
    with cache.needs() as needs:
        needs.publish([a])
        os.utime(cache.directory / a.name, (0, 0))
        cache.ensure(y)
        assert [cache.has(shard) for shard in (a, b, x, y)] == [True, False, False, True]
        needs.publish([a, y])
        with pytest.raises(
            UserError, match=r"b.tar: .*data.cache_bytes: 7500 bytes in .* are taken by shards that are"
        ):
            cache.ensure(b)
    cache.ensure(b)
    assert not cache.has(a) and not leftovers(cache)


def test_the_needs_of_a_dead_process_hold_nothing(server, cache):
    shard = wanted(server, "a.tar")
    cache.ensure(shard)

    def die_in_need() -> None:
        with cache.needs() as needs:
            needs.publish([shard])
            os.kill(os.getpid(), signal.SIGKILL)

    worker = FORK.Process(target=die_in_need)
    worker.start()
    worker.join()
    assert leftovers(cache)
    cache.limit = 3600
    cache.ensure(wanted(server, "b.tar"))
    assert not cache.has(shard)


def test_it_never_takes_more_than_its_limit_whoever_fetches(server, cache):
    cache.limit = 8000
    shards = [wanted(server, name) for name in ("a.tar", "b.tar", "x/same.tar", "y/same.tar")]

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(15):
            cache.ensure(rng.choice(shards))

    workers = [FORK.Process(target=work, args=[seed]) for seed in range(2)]
    for worker in workers:
        worker.start()
    largest = 0
    while any(worker.is_alive() for worker in workers):
        with cache._room_lock():
            largest = max(largest, total(cache))
    assert 0 < largest <= 8000
    assert [worker.exitcode for worker in workers] == [0, 0]


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data.cache_dir: .*file/cache: Not a directory; write --data.cache_dir DIR"):
        Cache(tmp_path / "file" / "cache").prepare()


def test_no_count_is_lost_between_processes_and_threads(cache):
    workers = [FORK.Process(target=lambda: [cache.counters.add(hits=1, bytes=3) for _ in range(500)]) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert cache.counters.totals()["hits"] == 1500 and cache.counters.totals()["bytes"] == 4500


def test_more_shards_than_the_soft_limit_of_open_files_can_be_mapped():
    code = """
import resource
from mae_dist.shards.store import allow_open_files
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
allow_open_files(500)
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= min(500, hard))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "True", done.stderr


def test_two_prefetchers_of_one_number_do_not_wait_for_each_other(cache, monkeypatch):
    """As in containers that share a cache: their process numbers are the same."""
    real = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", lambda file, how: real(file, how | fcntl.LOCK_NB))  # where it waited: an error
    with cache.needs(), cache.needs():
        assert len(list(cache.directory.glob("*.needs"))) == 2
