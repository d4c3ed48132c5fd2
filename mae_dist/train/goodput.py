"""Where the time of a run went, from its journal alone: work that counted, restarts, saves.

It follows from when each attempt started, and from the steps and saves that it went on from: the journal is cut back to
those. So it needs no last word, and a run that was killed is told right too.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mae_dist.train.progress import duration

STALL = "perf/save_stall_s"
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

    @property
    def fraction(self) -> float:
        """Seconds of work that counted, of all; 0 to 1."""
        return max(0.0, 1 - (self.restarts + self.saves) / self.seconds) if self.seconds > 0 else 1.0

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
        }

    def __str__(self) -> str:
        again = f" ({count(self.lost_steps, 'step')} done again)" if self.lost_steps else ""
        return (
            f"{count(self.attempts, 'attempt')} in {duration(self.seconds)}, of which {self.fraction:.1%} was work "
            f"that counted; restarts took {duration(self.restarts)}{again}, saves {duration(self.saves)}; "
            f"{count(self.skipped, 'step')} skipped, {count(self.bad_samples, 'bad sample')}"
        )


def count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def goodput(records: Iterable[dict[str, Any]]) -> Goodput:
    """What the records of a journal, in their order, say."""
    attempts, step, restarts, saves, lost, skipped, bad = 0, 0, 0.0, 0.0, 0, 0, 0
    first = counted = now = 0.0  # epoch seconds; `counted`: up to here nothing was done in vain
    for record in records:
        kind, time, metrics = record.get("kind"), float(record.get("time", 0.0)), record.get("metrics", {})
        if kind == "start":
            first, counted = (first, counted) if attempts else (time, time)
            restarts += max(0.0, time - counted)
            attempts += 1
        elif kind == "cut":
            lost += record["steps"]
        elif kind == "metrics":
            saves += metrics.get(STALL, 0.0)
            step = max(step, record["step"])
            skipped = max(skipped, int(metrics.get("optim/skipped", 0)))  # of the whole run: checkpoints keep it
            bad = max(bad, int(metrics.get("progress/bad_samples", 0)))
        now = max(now, time)
        if kind in ("start", "image") or metrics.keys() & MILESTONES:
            counted = max(counted, time)
    return Goodput(step, attempts, now - first, restarts, saves, lost, skipped, bad)
