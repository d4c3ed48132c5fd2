"""The same function over many jobs: here, in processes of this machine, or on a Ray cluster."""

import importlib
import multiprocessing
import os
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, TypeVar

from mae_dist.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")
QUEUED = 4  # jobs handed out ahead, for each process


def in_processes(
    work: Callable[[Job], Result], jobs: Sequence[Job], workers: int, tick: float = 1.0
) -> Generator[Result | None, None, None]:
    """Results as they come, in any order; None when `tick` seconds pass without one, so that progress can be shown.

    Raises UserError when a process was killed; what a job raises is raised here.
    """
    if workers <= 1 or len(jobs) <= 1:
        yield from map(work, jobs)
        return
    todo = iter(jobs)
    pool = _pool(workers)
    try:
        running = {pool.submit(work, job) for job in islice(todo, workers * QUEUED)}
        while running:
            done, running = wait(running, tick, FIRST_COMPLETED)
            if not done:
                yield None
            for future in done:
                yield future.result()
                running |= {pool.submit(work, job) for job in islice(todo, 1)}
    except BrokenProcessPool as error:
        raise killed(workers) from error
    finally:
        pool.shutdown(cancel_futures=True)


def in_order(work: Callable[[Job], Result], jobs: Sequence[Job], workers: int) -> Generator[Result, None, None]:
    """Results in the order of the jobs, which only read: when they are not wanted any more they are not waited for.

    Raises as `in_processes`.
    """
    if workers <= 1 or len(jobs) <= 1:
        yield from map(work, jobs)
        return
    todo, pool = iter(jobs), _pool(workers)
    try:
        ahead = deque(pool.submit(work, job) for job in islice(todo, workers * QUEUED))
        while ahead:
            result = ahead.popleft().result()
            ahead.extend(pool.submit(work, job) for job in islice(todo, 1))
            yield result
    except BrokenProcessPool as error:
        raise killed(workers) from error
    except BaseException:  # Ctrl-C, or the reader has seen enough
        for process in list(pool._processes.values()):
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def killed(workers: int) -> UserError:
    return UserError(
        f"one of {workers} processes was killed, perhaps for want of memory; start the same command again with fewer "
        "--workers: what is written stays"
    )


def _pool(workers: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("forkserver")
    try:
        return ProcessPoolExecutor(workers, context, initializer=_live_and_die_with_parent)
    except OSError as error:  # of a semaphore
        raise UserError(
            f"/dev/shm: {error.strerror}: processes need a few bytes there; make room, or write --workers 1"
        ) from error


def _live_and_die_with_parent() -> None:
    """Ctrl-C is the parent's to handle; and no worker outlives a parent that was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def find_ray(address: str) -> Any:
    """The ray module. Raises UserError when it is not installed, or nobody listens at HOST:PORT (ray waits minutes)."""
    try:
        library: Any = importlib.import_module("ray")  # an extra, and unknown to the type checker
    except ImportError:
        raise UserError("--ray needs ray: pip install 'mae_dist[ray]'") from None
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise no_cluster(address, error) from error
    return library


def no_cluster(address: str, error: Exception) -> UserError:
    return UserError(f"--ray {address}: no cluster there ({error}); write auto, or HOST:PORT of its head")


def on_ray(
    work: Callable[[Job], Result], jobs: Sequence[Job], address: str, tick: float = 1.0
) -> Generator[Result | None, None, None]:
    """As `in_processes`, one CPU of a Ray cluster a job. The nodes need mae_dist installed and the same file system.

    Raises UserError when ray is not installed, when no cluster answers or when it breaks down.
    """
    library = find_ray(address)
    try:
        library.init(address, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise no_cluster(address, error) from error
    try:
        remote = library.remote(num_cpus=1, max_retries=3)(lambda job: work(job))  # it takes functions only, no partial
        todo = iter(jobs)
        ahead = QUEUED * max(1, int(library.cluster_resources().get("CPU", 1)))
        running = [remote.remote(job) for job in islice(todo, ahead)]
        while running:
            done, running = library.wait(running, timeout=tick)
            if not done:
                yield None
            for result in done:
                yield library.get(result)
                running += [remote.remote(job) for job in islice(todo, 1)]
    except library.exceptions.RayTaskError as error:
        raise error.cause from error
    except library.exceptions.RayError as error:
        raise UserError(f"--ray {address}: {error}; start the same command again to go on") from error
    finally:
        library.shutdown()
