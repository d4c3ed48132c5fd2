"""Where the time of a run went, from its journal alone: work that counted, restarts, saves.

It follows from when each attempt started, and from the steps and saves that it went on from: the journal is cut back to
those. So it needs no last word, and a run that was killed is told right too.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mae_dist.track.journal import number
from mae_dist.train.progress import duration

STALL, SAVED = "perf/save_stall_s", "perf/save_s"
MILESTONES = {"loss/train", "loss/val", STALL}  # while their record is there, what was done before it is not done again


@dataclass(frozen=True)
class Goodput:
    """Of a whole run, all its attempts together."""

    step: int = 0
    """The last that was logged."""
    attempts: int = 0
    seconds: float = 0.0
    """Since the first start."""
    restarts: float = 0.0
    """Seconds between what each attempt but the first went on from and its start: work in vain, waiting, loading."""
    saves: float = 0.0
    """Seconds that training stood still for checkpoints."""
    lost_steps: int = 0
    """Updates that were done and had to be done again, as far as they had been logged."""
    skipped: int = 0
    """Updates left out because numbers were not finite."""
    bad_samples: int = 0
    unsaved: float = 0.0
    """Seconds at the end of a run that has ended, of which no checkpoint knows: another start does them again."""

    @property
    def fraction(self) -> float:
        """Seconds of work that counted, of all; 0 to 1. An update that was skipped took its time and did not count."""
        if self.seconds <= 0 or self.step <= self.skipped:
            return 0.0
        work = 1 - (self.restarts + self.saves + self.unsaved) / self.seconds
        return max(0.0, work) * (1 - self.skipped / self.step)

    def metrics(self) -> dict[str, float]:
        """As they are logged at the end of each attempt."""
        return {
            "run/goodput": self.fraction,
            "run/attempts": self.attempts,
            "run/lost_steps": self.lost_steps,
            "run/skipped_steps": self.skipped,
            "run/bad_samples": self.bad_samples,
            "run/restart_s": self.restarts,
            "run/save_s": self.saves,
            "run/unsaved_s": self.unsaved,
        }

    def __str__(self) -> str:
        again = f" ({count(self.lost_steps, 'step')} done again)" if self.lost_steps else ""
        vain = f", {duration(self.unsaved)} after the last checkpoint in vain" if round(self.unsaved) else ""
        return (
            f"{count(self.attempts, 'attempt')} in {duration(self.seconds)}, of which {self.fraction:.1%} was work "
            f"that counted; restarts took {duration(self.restarts)}{again}, saves {duration(self.saves)}{vain}; "
            f"{self.skipped} of {count(self.step, 'step')} skipped, {count(self.bad_samples, 'bad sample')}"
        )


def count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def goodput(records: Iterable[dict[str, Any]], ended: bool = False) -> Goodput:
    """What the records of a journal, in their order, say. `ended`: the last attempt has, with its last checkpoint."""
    attempts, step, restarts, saves, lost, skipped, bad = 0, 0, 0.0, 0.0, 0, 0, 0
    first = counted = now = saved = 0.0  # epoch seconds; `counted`: up to here nothing was done in vain
    stalls, there = dict[int, float](), set[int]()  # by step: when training went on after a save; those committed
    for record in records:
        kind, time, metrics = record.get("kind"), float(record.get("time", 0.0)), record.get("metrics") or {}
        now = max(now, time)
        if kind == "start":
            first, counted = (first, counted) if attempts else (time, time)
            restarts += max(0.0, time - counted)
            attempts += 1
            saved = max(saved, time)
        elif kind == "cut":
            lost += record["steps"]
        elif kind == "metrics":
            saves += number(record, STALL)
            step = max(step, record["step"])
            skipped = max(skipped, int(number(record, "optim/skipped")))  # of the whole run: checkpoints keep it
            bad = max(bad, int(number(record, "progress/bad_samples")))
            stalls |= {record["step"]: time} if STALL in metrics else {}
            there |= {record["step"]} if SAVED in metrics else set()
            saved = max(saved, stalls[record["step"]] if record["step"] in stalls.keys() & there else 0.0)
        if kind in ("start", "image") or metrics.keys() & MILESTONES:
            counted = max(counted, time)
    return Goodput(step, attempts, now - first, restarts, saves, lost, skipped, bad, now - saved if ended else 0.0)
