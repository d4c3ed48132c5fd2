"""A rank does not outlive the launcher that started it. Imports next to nothing, to be called first of all."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def end_with_launcher() -> None:
    """Under torchrun: SIGKILL for this process when torchrun dies, however that happens (Linux only).

    An orphan would train on and write into the run beside the attempt that the scheduler starts next. SIGKILL, because
    it may be waiting for a peer that is gone. A process that somebody started by hand has no launcher and stays.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        launcher = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != launcher:  # it died just before that
            os._exit(128 + signal.SIGKILL)
