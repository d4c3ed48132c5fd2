"""What a process says, whoever listens: a reader that leaves, a full disk or a closed terminal stops no work.

Called once, first of all, by each of our processes. Below Python's own buffers, so that print, progress bars, warnings
and the interpreter's last flush are all the same. Imports next to nothing.
"""

import errno
import io
import os
import select
import signal
import sys
import threading
from typing import TextIO


class Listener(io.FileIO):
    """A standard stream (1 or 2). When nobody takes what is written, it goes nowhere from then on.

    `product`: what is written is what the command is for. Then that ends the process as it ends other Unix tools: in
    silence when the reader has left (SIGPIPE), else with a line that says why and status 1.
    """

    def __init__(self, number: int, product: bool):
        super().__init__(number, "wb", closefd=False)
        self.product = product

    def write(self, data) -> int:
        while True:
            try:
                written = super().write(data)
            except OSError as error:
                self._lose(error)
                return memoryview(data).nbytes
            if written is not None:
                return written
            select.select([], [self.fileno()], [])  # somebody made it non-blocking: wait, as if it were not

    def _lose(self, error: OSError) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        if error.errno != errno.EPIPE and self.fileno() == 1:
            more = "" if self.product else "; the work goes on, and what it says is lost"
            print(f"{'error' if self.product else 'warning'}: standard output: {error.strerror}{more}", file=sys.stderr)
        if self.product:
            raise SystemExit(128 + signal.SIGPIPE if error.errno == errno.EPIPE else 1)


def protect(product: bool = False) -> None:
    """Nothing that is printed raises from here on; with `product`, see `Listener`. Streams put in by a caller stay.

    Standard streams that were closed lead nowhere: the next file opened would get their number, and with it what
    libraries say to number 2. SIGCHLD is as usual again: where a parent ignores it, workers would end untold.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)  # the lowest free number: this one, as those below are taken
            assert nowhere == number
            os.set_inheritable(nowhere, True)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _open(1, sys.__stdout__, product)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _open(2, sys.__stderr__, False)


def _open(number: int, before: TextIO | None, product: bool) -> TextIO:
    """A text stream like `before`; a name that it cannot spell is shown with escapes."""
    encoding = before.encoding if before else "utf-8"
    raw = Listener(number, product)
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=number == 2 or raw.isatty()
    )
