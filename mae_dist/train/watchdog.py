"""A thread that sees a training step hang, says which rank waits for what, and ends a process that cannot go on."""

import faulthandler
import sys
import threading
import time
from collections import deque
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch.distributed as dist

from mae_dist.data.ring import late_workers
from mae_dist.engine.world import World
from mae_dist.errors import Ended, UserError
from mae_dist.train.peers import FAILED, LEFT, MISTAKE, STOPPED, Beat, Board
from mae_dist.train.stop import Stopped, StopRequest

FACTOR = 10  # times the median step
START = 5  # times the limit, while there is no median: compilers take long
MEASURED = 3  # steps that make a median
GRACE = 60.0  # seconds after a stop signal for the step under way
ECHO = 5.0  # seconds to find out what a failed collective is the echo of
SILENT = 5  # beats without a word
SAVING, DATA = "save", "data"


class RankLost(Ended):
    """This rank ended because another one did, or could not be reached."""

    status = 75  # a temporary failure: a restart may well cure it


class Moment(NamedTuple):
    phase: str
    step: int
    since: float


class Watchdog:
    """`seconds`: how long one phase of a step (data, backward, update, ...) may take before the rank says so, if that
    is also ten times the median step; None: for ever. Collective to make.
    """

    def __init__(self, run_dir: Path, world: World, stop: StopRequest, seconds: float | None, step: int):
        self.world, self.stop, self.seconds = world, stop, seconds
        self.logs = run_dir / "logs"
        self.board = Board(self.logs, world)
        self.steps: deque[float] = deque(maxlen=99)  # seconds
        self.now = Moment("start", step, time.monotonic())
        self.step_began = self.now.since
        self.dumped = self.told = 0.0  # the moments for which that is done
        self.asked = 0.0  # when a stop signal was first seen
        self.tick = min(1.0, (seconds or 60.0) / 10)
        self.beat = max(self.tick, world.size / 100)  # a shared file system has other things to do
        self.next_beat = 0.0
        self.closed, self.writing = threading.Event(), threading.Lock()
        self.board.write(step, "start")
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def enter(self, phase: str, step: int) -> None:
        """Say what this rank begins now, or goes on with."""
        now = time.monotonic()
        if step != self.now.step:
            self.steps.append(now - self.step_began)
            self.step_began = now
        self.now = Moment(phase, step, now)

    def close(self, how: str) -> None:
        """No more watching; `how` this rank ended is there for the others to read."""
        with self.writing:  # the other thread's beat, begun before, is not to be the last word
            self.closed.set()
            self.board.write(self.now.step, how)

    def limit(self) -> float:
        """Seconds that are too long."""
        if self.seconds is None:
            return float("inf")
        return max(self.seconds, FACTOR * median(self.steps)) if len(self.steps) >= MEASURED else START * self.seconds

    def cause(self, error: BaseException) -> Ended | Stopped | UserError:
        """What a collective that failed here is the echo of; looks around for a few seconds."""
        for _ in range(round(ECHO / 0.25)):
            if found := self._ended():
                return found
            time.sleep(0.25)
        if self.stop.signal:
            return Stopped(self.stop.signal)
        others = [beat for beat in self.board.read() if beat.rank != self.world.rank and beat.phase != LEFT]
        theirs = "; ".join(f"rank {beat.rank} was in {spot(beat)} {beat.age:.0f} s ago" for beat in others[:8])
        return RankLost(
            f"lost the others in {self.now.phase} of step {self.now.step}: {brief(error)}{theirs and f' ({theirs})'}"
        )

    def _ended(self) -> Ended | Stopped | UserError | None:
        """Why another rank has ended, if one has."""
        for beat in self.board.read():
            if beat.rank == self.world.rank:
                continue
            if beat.phase.startswith(STOPPED):
                return Stopped(int(beat.phase.removeprefix(STOPPED)))
            if beat.phase.startswith(MISTAKE):
                return UserError(f"rank {beat.rank}: {beat.phase.removeprefix(MISTAKE)}")
            if beat.phase.startswith(FAILED):
                return RankLost(f"ended because rank {beat.rank} {beat.phase}")
            if beat.is_dead():
                return RankLost(f"ended because rank {beat.rank} (pid {beat.pid}) was killed in {spot(beat)}")
        return None

    def _watch(self) -> None:
        while not self.closed.wait(self.tick):
            now = self.now
            waited = time.monotonic() - now.since
            if self.next_beat <= time.monotonic():
                with self.writing:
                    if self.closed.is_set():
                        return
                    self.board.write(now.step, now.phase, waited, late_workers())
                self.next_beat = time.monotonic() + self.beat
            self._leave_if_lost(now, waited)
            if waited <= self.limit() or self.told == now.since:
                continue
            if self.dumped != now.since:
                self.dumped = now.since
                self._dump(now, waited)
            elif waited > self.limit() + 2 * self.beat:  # the others have written meanwhile
                self.told = now.since
                self._tell(now, waited)

    def _leave_if_lost(self, now: Moment, waited: float) -> None:
        if self.stop.signal and not self.asked:
            self.asked = time.monotonic()
        saving, late = now.phase == SAVING, waited > self.limit()
        if self.stop.leaving or (saving and not late):
            return
        if (self.stop.signal and self.stop.begun) or late:
            cause = self._ended()  # then this step never ends
            if cause is None and self.asked and not saving:
                grace = GRACE + 2 * median(self.steps or [0.0])
                if min(waited, time.monotonic() - self.asked) > grace:
                    cause = Stopped(self.stop.signal)
            if cause:
                print(f"rank {self.world.rank}: {cause}", file=sys.stderr, flush=True)
                self.stop.exit(cause)

    def _dump(self, now: Moment, waited: float) -> None:
        try:
            with (self.logs / f"rank-{self.world.rank}.log").open("a") as file:
                what = f"rank {self.world.rank} has been in {now.phase} of step {now.step} for {waited:.1f} s"
                print(f"{time.strftime('%F %T')} {what}", file=file, flush=True)
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:
            pass

    def _tell(self, now: Moment, waited: float) -> None:
        """One rank says it for all: the first that is awake."""
        beats = self.board.read()
        silent = [beat for beat in beats if beat.age > SILENT * self.beat]
        awake = [beat for beat in beats if beat not in silent]
        if not awake or awake[0].rank != self.world.rank:
            return
        lines = [f"watchdog: {now.phase} of step {now.step} takes {waited:.1f} s"]
        lines[0] += f" (median step: {median(self.steps):.2f} s)" if self.steps else ""
        lines += [
            f"  rank {beat.rank}: in {spot(beat)} for {beat.seconds:.1f} s"
            + (f", waits for {beat.late}" if beat.late else "")
            for beat in awake[:16]
        ]
        lines += [
            f"  rank {beat.rank}: SILENT for {beat.age:.1f} s, last in {spot(beat)} (pid {beat.pid} on {beat.host})"
            for beat in silent[:16]
        ]
        behind = [beat for beat in awake if (beat.step, beat.phase == now.phase) < (now.step, True)]
        # One that waits for its own data waits for no other rank, be it the speaker.
        slow = silent or [beat for beat in awake if beat.late or beat.phase == DATA] or behind
        if slow:
            lines.append(f"  waited for: rank {', '.join(str(beat.rank) for beat in slow[:16])}")
        elif self.world.size > 1:
            lines.append("  all ranks wait for each other: the network between them, or a collective that one left out")
        print("\n".join([*lines, f"  stacks: {self.logs}/rank-*.log"]), file=sys.stderr, flush=True)


def spot(beat: Beat) -> str:
    return f"{beat.phase} of step {beat.step}"


def brief(error: BaseException) -> str:
    """A collective's error in one line, without source files and advice."""
    return " ".join(str(error).split("]", 1)[-1].split("This is typically")[0].split())


def is_echo(error: BaseException) -> bool:
    """Whether an error says no more than that a collective failed."""
    words = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )
