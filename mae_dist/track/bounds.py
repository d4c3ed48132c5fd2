"""Bounds on what a server may cost the process that copies to it: seconds a call, bytes an answer."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

CALLS = 12  # times MLFLOW_HTTP_REQUEST_TIMEOUT: a few requests, each tried again; the timeout itself is for each byte
ANSWER_BYTES = 64 << 20
AGAIN = 1.0  # seconds from one interruption to the next, should it go on


class TooSlow(Exception):
    """No whole answer came in time."""


class TooLarge(Exception):
    """An answer was cut off."""


def longest_call() -> float:
    """Seconds that one exchange with MLflow may take."""
    return CALLS * float(os.environ.get("MLFLOW_HTTP_REQUEST_TIMEOUT") or 10)


@contextmanager
def bounded() -> Iterator[None]:
    """Raise TooSlow in a block that takes longer than `longest_call`, wherever it waits. For the main thread."""
    if threading.current_thread() is not threading.main_thread() or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield  # bounded by the block around it
        return
    seconds = longest_call()

    def interrupt(number: int, frame: FrameType | None) -> None:
        while frame:  # a module whose import is broken off stays broken: the next tick comes soon
            if "importlib" in frame.f_code.co_filename:
                return
            frame = frame.f_back
        raise TooSlow(f"MLflow: no whole answer within {seconds:.0f} s (12 times MLFLOW_HTTP_REQUEST_TIMEOUT)")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def limit_answers() -> None:
    """From here on, no answer that `requests` reads into memory in this process is larger than ANSWER_BYTES."""
    from requests.models import Response

    whole: Any = Response.iter_content
    if hasattr(Response, "limited"):
        return

    def iter_content(self: Response, *args, **more) -> Iterator[Any]:
        size = 0
        for chunk in whole(self, *args, **more):
            size += len(chunk)
            if size > ANSWER_BYTES:
                self.close()
                raise TooLarge(f"MLflow: an answer of more than {ANSWER_BYTES >> 20} MB; no MLflow server sends that")
            yield chunk

    Response.iter_content, Response.limited = iter_content, True  # type: ignore[attr-defined]
