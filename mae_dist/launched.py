"""How a process ends that a launcher started, and on which signals. Imports next to nothing: it is the first of all."""

import ctypes
import os
import signal
import sys
from typing import NoReturn

PR_SET_PDEATHSIG = 1
# What schedulers, terminals and limits send to end a job: it saves, and ends with 128 + n.
STOP_SIGNALS = (
    signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGQUIT, signal.SIGXCPU
)  # fmt: skip


def stop_signals() -> list[signal.Signals]:
    """Those that this process acts on: what nohup or a shell's `&` has taken from the terminal stays ignored."""
    terminal = (signal.SIGHUP, signal.SIGQUIT)
    return [n for n in STOP_SIGNALS if n not in terminal or signal.getsignal(n) is not signal.SIG_IGN]


def leave_signals_to_parent() -> None:
    """In a worker: what is sent to all of a job is the trainer's to act on; a limit on this process is told to it."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGXCPU, lambda number, frame: os.kill(os.getppid(), number))


def end_with_launcher() -> None:
    """Under torchrun or deepspeed: SIGKILL for this process when that dies, however it happens (Linux only).

    An orphan would train on and write into the run beside the attempt that the scheduler starts next. SIGKILL, because
    it may be waiting for a peer that is gone. A process that somebody started by hand has no launcher and stays.
    """
    if {"TORCHELASTIC_RUN_ID", "LOCAL_SIZE"} & os.environ.keys() and sys.platform == "linux":
        launcher = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != launcher:  # it died just before that
            os._exit(128 + signal.SIGKILL)


def leave(status: int) -> NoReturn:
    """Exit. Beside other ranks without the interpreter's clean-up: whatever was to be closed is closed by now.

    After an error no library's clean-up may wait for ranks that are in the middle of something. After the last step a
    thread of the collectives may still drop the last reference to a tensor, for which it asks for the interpreter's
    lock; while the interpreter is going down, that is SIGABRT, "terminate called without an active exception".
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if "WORLD_SIZE" in os.environ:
        os._exit(status)
    sys.exit(status)
