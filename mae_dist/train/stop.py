"""Signals: noted at once, acted on when all ranks have agreed.

Before a process has made its first update there is nothing to save, and it leaves at once. After that the ranks agree
each step: one number, reduced like the skip flag and read a step later, so nobody waits for the device.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

import torch
from torch import Tensor

from mae_dist.engine.world import World
from mae_dist.launched import stop_signals

AT_ONCE = 5.0  # seconds for the main thread to begin to leave when there is nothing to save
LEAVING = 60.0  # and to be gone


class Stopped(Exception):
    """A signal ended the run. `step`: what is saved; None: nothing since the newest checkpoint."""

    def __init__(self, number: int, step: int | None = None):
        saved = "" if step is None else f" after step {step}"
        where = "there" if saved else "the newest checkpoint"
        super().__init__(f"stopped by signal {number}{saved}; the same command goes on from {where}")
        self.signal, self.step = number, step

    @property
    def end(self) -> str:
        """The run's status: SIGUSR1 or 2 is a scheduler's word that it will start the run again."""
        return "SCHEDULED" if self.signal in (signal.SIGUSR1, signal.SIGUSR2) else "KILLED"


class StopRequest:
    """Remembers the first stop signal this process got; a second SIGINT interrupts as usual.

    Python runs a handler only when the main thread is back from C, which in a collective or a compiler may be never.
    So the number also comes through a pipe to a thread, which ends the process where the main thread cannot.
    """

    def __init__(self) -> None:
        self.signal = self.interrupts = 0
        self.heard = stop_signals()
        self.leaving = False
        """The main thread is on its way out: no further signal is to divert it."""
        self._door = threading.Lock()  # held by the thread that decides how this process ends
        self.begun = False
        """An update was made since the start: there is something to save, and ranks must agree to stop."""
        self.last_words: Callable[[Exception], None] = lambda cause: None
        """Called before a process ends that cannot leave by itself."""
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(reading,), daemon=True, name="signals").start()
        for number in self.heard:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or number
        self.interrupts += number == signal.SIGINT
        if self.interrupts > 1:
            raise KeyboardInterrupt
        if not self.begun and not self.leaving:
            self.leaving = True
            raise Stopped(number)

    def _listen(self, pipe: int) -> None:
        while True:
            for number in os.read(pipe, 64):
                self.signal = self.signal or (number if number in self.heard else 0)
            for seconds in (AT_ONCE, LEAVING):
                if self.signal and not self.begun:
                    time.sleep(seconds)
                    if not self.begun:
                        self.exit(Stopped(self.signal), even_if_leaving=seconds == LEAVING)

    def leave(self) -> None:
        """The main thread begins to leave. Does not return where another thread ends the process already."""
        with self._door:
            self.leaving = True

    def exit(self, cause: Exception, even_if_leaving: bool = False) -> None:
        """End this process now, from a thread beside the main one; its workers see that and end too.

        Returns only when the main thread is on its way out.
        """
        with self._door:
            if self.leaving and not even_if_leaving:
                return
            self.last_words(cause)
            os._exit(128 + cause.signal if isinstance(cause, Stopped) else getattr(cause, "status", 2))


class Agreement:
    """The largest of a small number over all ranks. Collective."""

    def __init__(self, world: World):
        self.world = world
        self.event = torch.cuda.Event() if world.device.type == "cuda" else None
        self.known = torch.zeros((), pin_memory=self.event is not None)
        self.agreed = 0
        """What the last call gave."""

    def now(self, value: int) -> int:
        self.agreed = int(self._reduced(value))
        return self.agreed

    def soon(self, value: int) -> int:
        """Of the values given now, on CPU; on CUDA of those of the call before, which are known without waiting."""
        if self.event is None:
            return self.now(value)
        reduced = self._reduced(value)
        self.event.synchronize()  # of the step before: done, or nearly, and this step keeps the device busy
        self.agreed = int(self.known)
        self.known.copy_(reduced, non_blocking=True)
        self.event.record()
        return self.agreed

    def _reduced(self, value: int) -> Tensor:
        return self.world.max(torch.full((), float(value), device=self.world.device))
