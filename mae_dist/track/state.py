"""How far MLflow is with a run, and what of the journal comes next. Nothing here talks to MLflow.

The state is `<run_dir>/mlflow.json`, read and written by the one process that holds the run's lock.
"""

import hashlib
import json
import math
import re
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO, Any, NamedTuple

from mae_dist.local import write_file
from mae_dist.track import journal

FILE_NAME = "mlflow.json"
END_REASON_DIED = "the training process died without a word"
NONFINITE_KEY = "health/nonfinite"
BATCH_METRICS = 500
FOLLOWS, COPY, WHY = "mae_dist.follows", "mae_dist.copy_of", "mae_dist.why"
COMPARED = ("loss/train", "loss/val", "optim/lr")  # metrics that a step made again has again, to rounding
# Relative: bf16, another engine or world size, and kernels that add in any order, move a loss by up to 3e-3
# (tests/engine/test_parity.py). Another config or other data are known without this, from the start record.
TOLERANCE = 1e-2
STATUSES = ("FINISHED", "FAILED", "KILLED", "SCHEDULED")  # the last: ended, and to be started again by a scheduler


class Point(NamedTuple):
    """One value of one metric."""

    key: str
    value: float
    time: float
    """Epoch seconds."""
    step: int


class Differs(Exception):
    """The journal is no longer that of the run in MLflow: why."""


Shown = Callable[[str], Mapping[int, float]]


@dataclass
class Batch:
    """What is sent together."""

    points: list[Point] = field(default_factory=list)
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    records: int = 0

    @classmethod
    def load(cls, saved: dict[str, Any]) -> "Batch":
        """The inverse of `dataclasses.asdict` and JSON."""
        return cls(**{**saved, "points": [Point(*point) for point in saved["points"]]})


@dataclass
class State:
    """What MLflow has. Saved before and after each batch, so whoever dies when, no point is lost or doubled."""

    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Tag of the run in MLflow: a run whose creation was answered too late is found by it, and not made twice."""
    run_id: str = ""
    holder: str = ""
    """The run directory (`whereabouts`) that writes to this run in MLflow, as it is tagged there."""
    links: dict[str, str] = field(default_factory=dict)
    """Tags: the run in MLflow that this one FOLLOWS, or is a COPY of, and WHY it is another one."""
    identity: str = ""
    """Of the last start: what decides the numbers. "": none was said."""
    began: float = 0.0
    """Starts before this time (epoch seconds) are history that the run in MLflow was made with."""
    offset: int = 0
    """Bytes of the journal that have been read."""
    line_length: int = 0
    line_digest: str = ""
    """The line before `offset`: it is still there exactly when nothing before `offset` has been cut."""
    step: int = -1
    """The largest step of a metric that was sent."""
    steps: dict[str, int] = field(default_factory=dict)
    """The same for each metric, and each image key after an "@". A step run again gives what is there already, or the
    run in MLflow is another one from there on (`Differs`)."""
    nonfinite: int = 0
    """Values that were no finite number."""
    starts: list[float] = field(default_factory=list)
    """Times of the start records: an attempt that a cut journal shows again is not counted again."""
    batch: Batch | None = None
    """Taken from the journal, and perhaps sent: it is sent again as it is, which MLflow takes for the same points."""
    files: list[dict[str, Any]] = field(default_factory=list)
    """Images and artifacts not sent yet: a broken artifact store must not hold up the metrics."""
    end: dict[str, Any] | None = None
    """The end record, if no start came after it."""
    died: float = 0.0
    """When the training process was found dead without an end record; 0: it was not."""
    settled: str = ""
    """The status MLflow was told last."""
    resumed: bool = False
    """The last record was a start: no training loss has followed it."""

    def another(self, link: str, why: str) -> "State":
        """Of another run in MLflow, with the whole journal; `link`: FOLLOWS or COPY."""
        return State(links={link: self.run_id, WHY: why}, died=self.died)

    @classmethod
    def load(cls, run_dir: Path) -> "State":
        """The saved state; a new one if there is none, or none that can be read (then MLflow gets a new run)."""
        try:
            saved = journal.from_json(json.loads((run_dir / FILE_NAME).read_bytes()))
            known = {f.name for f in fields(cls)}
            state = cls(**{name: value for name, value in saved.items() if name in known})
            state.batch = Batch.load(saved["batch"]) if saved.get("batch") else None
            return state
        except FileNotFoundError:
            return cls()
        except (ValueError, AttributeError, TypeError) as error:
            print(f"warning: {run_dir / FILE_NAME}: {error}; the run is sent again as a new one", flush=True)
            return cls()

    def save(self, run_dir: Path) -> None:
        """Write it, whole or not at all. Raises OSError."""
        write_file(run_dir / FILE_NAME, json.dumps(journal.to_json(asdict(self))))

    def seek(self, file: IO[bytes]) -> None:
        """Put an open journal, and `offset`, where reading goes on: at its beginning if it was cut before that."""
        file.seek(max(0, self.offset - self.line_length))
        if digest(file.read(self.line_length)) != self.line_digest:
            self.offset = self.line_length = 0
            self.line_digest = digest(b"")
            file.seek(0)

    def gather(self, lines: Iterable[bytes], shown: Shown | None = None) -> bool:
        """Take the next `batch` from lines that follow `offset`; False if there are none.

        `shown`: what MLflow has of a metric, by step. Raises Differs when it has other numbers than the journal, or
        of a run that was started otherwise.
        """
        batch = Batch()
        for line in lines:
            self.offset += len(line)
            self.line_length, self.line_digest = len(line), digest(line)
            batch.records += 1
            record = journal.parse(line)
            try:
                if record is None:
                    raise ValueError("no record")
                self._take(record, batch, shown)
            except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
                print(f"warning: not a record for MLflow ({error!r}): {line[:200]!r}", flush=True)
            if len(batch.points) >= BATCH_METRICS:
                break
        self.batch = batch if batch.records else None
        return batch.records > 0

    def _take(self, record: dict[str, Any], batch: Batch, shown: Shown | None) -> None:
        kind = record.get("kind")
        if kind == "metrics":
            self._take_metrics(record, batch, shown)
        elif kind == "start":
            self._take_start(record, batch)
        elif kind == "image":
            key = clean(str(record["key"])).replace(":", "_")
            if self._is_new(f"@{key}", int(record["step"])):
                self.files.append({"path": str(record["path"]), "key": key, "step": int(record["step"]), **at(record)})
        elif kind == "artifact":
            self._take_artifact(str(record["path"]))
        elif kind == "end":
            self.end = {"status": record.get("status"), "reason": record.get("reason"), **at(record)}

    def _take_metrics(self, record: dict[str, Any], batch: Batch, shown: Shown | None) -> None:
        step, time = int(record["step"]), at(record)["time"]
        bad, first = self.nonfinite, self.resumed
        for name, value in record["metrics"].items():
            key = clean(str(name))
            self.resumed = self.resumed and not key.startswith("loss/train")
            if not self._is_new(key, step):
                mean = key.startswith("loss/train") and first  # over fewer steps than the mean that was cut off
                if shown and key in COMPARED and not mean and not same(value, shown(key).get(step)):
                    raise Differs(f"{key} of step {step} was {shown(key).get(step, math.nan)} and is {value}")
                continue
            if isinstance(value, int | float) and math.isfinite(value):
                batch.points.append(Point(key, float(value), time, step))
            else:
                self.nonfinite += 1
        if self.nonfinite > bad:  # MLflow would draw an infinity as 1.8e308 and flatten the curve
            batch.points.append(Point(NONFINITE_KEY, float(self.nonfinite), time, step))
        self.step = max(self.step, step)

    def _take_start(self, record: dict[str, Any], batch: Batch) -> None:
        time = at(record)["time"]
        self.end, self.resumed = None, True
        if time in self.starts:
            return
        identity = str(record.get("identity") or "")
        if time >= self.began:
            if identity and self.identity not in ("", identity):
                raise Differs("it was started with other settings or data")
            self.identity = identity or self.identity
            batch.params |= {clean(str(name)): str(value) for name, value in (record.get("params") or {}).items()}
        self.starts.append(time)
        self.died = self.died if time < self.died else 0.0
        batch.points.append(Point("progress/attempt", float(len(self.starts)), time, int(record.get("step", 0))))
        tags = (record.get("tags") or {}).items()
        batch.tags.update({clean(str(name)): str(value) for name, value in tags if value is not None})
        batch.tags["mae_dist.attempts"] = str(len(self.starts))
        for path in record.get("artifacts") or ():
            self._take_artifact(str(path))

    def _take_artifact(self, path: str) -> None:
        if {"path": path} not in self.files:
            self.files.append({"path": path})

    def _is_new(self, key: str, step: int) -> bool:
        if step <= self.steps.get(key, -1):
            return False
        self.steps[key] = step
        return True

    def wanted(self) -> tuple[str, str, float]:
        """Status, reason and time (epoch seconds) of the run, as far as the journal and the process tell."""
        if self.end is not None:
            status = str(self.end.get("status", "")).upper()
            status = status if status in STATUSES else "FAILED"
            return status, str(self.end.get("reason") or status.lower()), self.end["time"]
        if self.died:
            return "FAILED", END_REASON_DIED, self.died
        return "RUNNING", "", 0.0


@dataclass(frozen=True)
class Summary:
    """What a `sync` did."""

    run_id: str
    records: int
    """Journal records that this call sent."""
    unsent: int
    status: str
    """FINISHED, FAILED, KILLED, SCHEDULED or RUNNING."""
    error: str | None = None

    def __str__(self) -> str:
        state = f"stopped: {self.error}" if self.error else "MLflow has everything"
        return f"run {self.run_id or '(none)'} {self.status}: {self.records} records sent, {self.unsent} left; {state}"


def at(record: dict[str, Any]) -> dict[str, float]:
    """The time of a record, by itself."""
    return {"time": float(record.get("time", 0.0))}


def same(value: Any, there: float | None) -> bool:
    """Whether a metric is what MLflow has, to rounding; it has none of what was no finite number."""
    if there is None or not isinstance(value, int | float) or not math.isfinite(value):
        return there is None and not (isinstance(value, int | float) and math.isfinite(value))
    return math.isclose(value, there, rel_tol=TOLERANCE, abs_tol=1e-12)


def as_utf8(text: str) -> str:
    """`text`, in which the name of a file need not be UTF-8, as MLflow takes it: with escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def clean(name: str) -> str:
    """The nearest name that MLflow takes: of letters, digits and `_-. :/`, a relative path, at most 250 characters."""
    allowed = re.sub(r"[^A-Za-z0-9_\-. :/]", "_", name)
    return "/".join(part for part in allowed.split("/") if part.strip("."))[:250].rstrip("/") or "_"


def digest(line: bytes) -> str:
    """A short name for the content of a line."""
    return hashlib.blake2b(line, digest_size=16).hexdigest()


def unsent(run_dir: Path) -> int:
    """How many records of the journal, images and artifacts MLflow does not have yet."""
    state = State.load(run_dir)
    try:
        with (run_dir / journal.FILE_NAME).open("rb") as file:
            state.seek(file)
            left = sum(1 for _ in journal.whole_lines(file))
    except FileNotFoundError:
        left = 0
    return left + len(state.files) + (state.batch.records if state.batch else 0)
