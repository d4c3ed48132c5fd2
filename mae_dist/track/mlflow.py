"""Copies a run's journal to MLflow: `python -m mae_dist.track.mlflow RUN_DIR [--follow-pid PID]`.

It is a process of its own, so a slow or dead MLflow costs the trainer nothing, and it outlives a killed trainer long
enough to say so in MLflow. Whatever fails is tried again; what was sent is remembered in `<run_dir>/mlflow.json`.

A run in MLflow is the copy of one directory's journal. When the journal is no longer what was sent (other settings or
data, a step done again with other numbers), a new run takes its place: the whole journal, tagged with the old run's id
and why; the old one stays as it was.
"""

import argparse
import logging
import os
import signal
import sys
import time
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from mae_dist.errors import UserError
from mae_dist.launched import STOP_SIGNALS
from mae_dist.local import allow_as_umask
from mae_dist.output import protect
from mae_dist.track import TrackConfig, journal
from mae_dist.track.bounds import bounded, limit_answers, longest_call
from mae_dist.track.identity import END, claim, whereabouts
from mae_dist.track.place import ENVIRONMENT, PARENT, is_server, opening, sqlite_url, tracking_uri, ui_command, usable
from mae_dist.track.state import BATCH_METRICS, FOLLOWS, Batch, Differs, State, Summary, as_utf8, unsent
from mae_dist.track.tracker import MLflowTracker, is_gone
from mae_dist.urls import masked

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["MLflowTracker", "Shipper", "Summary", "follow", "sync", "tracking_uri", "ui_command"]

LOCK_NAME = "mlflow.lock"
POLL_S = 1.0
BACKOFF_S = 10.0  # the longest pause between two tries
PATIENCE_S = 60.0  # how long an unreachable server is tried after the trainer is gone
SILENCE_S = 600.0  # a run without an end whose journal has been still for this long is dead to `sync`


class Shipper:
    """Copies one run's journal. Every method raises what MLflow raises, and loses nothing by it."""

    def __init__(self, run_dir: Path | str, config: TrackConfig | None = None) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self.run_dir = Path(run_dir).resolve()
        self.config = config or TrackConfig()
        self.state = State.load(self.run_dir)
        self.client: MlflowClient | None = None
        self.sent = 0
        """Journal records sent so far."""
        self._in_doubt = True

    def ship(self, died: float | None = None) -> None:
        """Send what is there and not sent yet.

        `died`: when the training process was found dead (epoch seconds), 0 if it lives, None if that is not known.
        """
        self.state = State.load(self.run_dir)  # after a failure, memory is ahead of what was sent
        if died is not None and bool(died) != bool(self.state.died):
            self.state.died = died
            self.state.save(self.run_dir)
        try:
            with bounded():
                client = self.client or self._connect()
            if client is None:
                return
            try:
                self._send_records(client)
            except Differs as difference:
                print(f"MLflow run {self.state.run_id} stays as it is, a new one begins: {difference}", flush=True)
                self.state = self.state.another(FOLLOWS, str(difference))
                with bounded():
                    client = self._connect() or client
                self._send_records(client)
            try:
                self._send_files(client)
            finally:  # a broken artifact store must not leave a finished run "running"
                with bounded():
                    self._settle(client)
        except Exception:
            self.client, self._in_doubt = None, True  # look again whether the run is still there
            raise

    def _send_records(self, client: "MlflowClient") -> None:
        run_id = self.state.run_id

        @cache
        def shown(key: str) -> dict[int, float]:
            with bounded():
                return {point.step: point.value for point in client.get_metric_history(run_id, key)}

        with (self.run_dir / journal.FILE_NAME).open("rb") as file:
            self.state.seek(file)
            lines = journal.whole_lines(file)
            while self.state.batch or self.state.gather(lines, shown):
                assert self.state.batch is not None
                self.state.save(self.run_dir)
                self._send(client, self.state.batch)
                self.sent += self.state.batch.records
                self.state.batch = None
                self.state.save(self.run_dir)

    def _send(self, client: "MlflowClient", batch: Batch) -> None:
        from mlflow.entities import Metric, Param, RunTag
        from mlflow.exceptions import MlflowException

        parent = self._parent(Path(batch.tags[PARENT])) if PARENT in batch.tags else None
        nested = {} if parent is None else {"mlflow.parentRunId": parent}
        params = [Param(key, as_utf8(value)) for key, value in batch.params.items()]
        try:  # first: of a run that was started otherwise nothing else is sent
            with bounded():
                client.log_batch(self.state.run_id, params=params, synchronous=True)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            with bounded():
                there = client.get_run(self.state.run_id).data.params
            changed = [
                f"{p.key} was {old} and is {p.value}" for p in params if (old := there.get(p.key, p.value)) != p.value
            ]
            if changed:
                raise Differs("; ".join(changed)) from None
            print(f"warning: params refused: {brief(error)}", flush=True)  # would be refused for ever
        # MLflow keeps one of two equal (key, value, step, timestamp), so a batch sent twice is there once.
        points = [Metric(p.key, p.value, int(p.time * 1000), p.step) for p in batch.points]
        for i in range(0, len(points), BATCH_METRICS):
            with bounded():
                client.log_batch(self.state.run_id, metrics=points[i : i + BATCH_METRICS], synchronous=True)
        tags = [RunTag(key, as_utf8(value)) for key, value in (batch.tags | nested).items() if value]
        with bounded():
            client.log_batch(self.state.run_id, tags=tags, synchronous=True)

    def _parent(self, directory: Path) -> str:
        """MLflow's id of another run, which is sent first if it is not there; "" when it has never written a word."""
        if not self.run_dir.is_relative_to(directory):  # somebody else may have written the journal
            return ""
        if not (directory / journal.FILE_NAME).is_file():
            return ""
        mine = whereabouts(directory.resolve())
        if State.load(directory).holder != mine:
            summary = sync(directory, self.config, tries=1)
            if summary.error:
                print(f"warning: {directory} is not in MLflow: {summary.error}", flush=True)
        state = State.load(directory)
        return state.run_id if state.holder == mine else ""

    def _send_files(self, client: "MlflowClient") -> None:
        while self.state.files:
            record = self.state.files[0]
            path = self.run_dir / record["path"]
            if not path.resolve().is_relative_to(self.run_dir):  # somebody else may have written the journal
                print(f"warning: {path} is outside the run; it is not sent", flush=True)
            elif not path.exists():
                print(f"warning: {path} is gone; it cannot be sent", flush=True)
            elif "key" in record:
                with bounded():
                    self._send_image(client, record, path)
            else:
                parent = PurePosixPath(record["path"]).parent
                folder = None if parent.is_absolute() or str(parent) == "." else str(parent)
                with bounded():
                    client.log_artifact(self.state.run_id, str(path), folder)
            self._in_doubt = False
            del self.state.files[0]
            self.state.save(self.run_dir)

    def _send_image(self, client: "MlflowClient", record: dict[str, Any], path: Path) -> None:
        from mae_dist.track.review import open_picture

        key, step, stamp = record["key"], record["step"], int(record["time"] * 1000)
        if self._in_doubt:  # it may be there although the answer never came; MLflow would show it twice
            begin = f"images/{key.replace('/', '~')}+step+{step}+timestamp+{stamp}+"
            there = [info.path for info in client.list_artifacts(self.state.run_id, "images")]
            if any(name.startswith(begin) and "compressed" in name for name in there):
                return
        image = open_picture(path)
        if image is None:
            print(f"warning: {path} is no picture; it cannot be sent", flush=True)
            return
        client.log_image(self.state.run_id, image, key=key, step=step, timestamp=stamp, synchronous=True)

    def _settle(self, client: "MlflowClient") -> None:
        """Tell MLflow the status of the run, if that has changed."""
        status, reason, when = self.state.wanted()
        settled = f"{status} {when}"
        if settled == self.state.settled:
            return
        if status in ("RUNNING", "SCHEDULED"):
            client.update_run(self.state.run_id, status=status)
            if status == "RUNNING" and self.state.settled:
                client.set_tag(self.state.run_id, END, "resumed", synchronous=True)
        else:
            client.set_tag(self.state.run_id, END, reason[:1000], synchronous=True)
            client.set_terminated(self.state.run_id, status, int(when * 1000))
        self.state.settled = settled
        self.state.save(self.run_dir)

    def _connect(self) -> "MlflowClient | None":
        """A client, with a run to write to; None while the journal is empty."""
        path = self.run_dir / journal.FILE_NAME
        first = next(journal.read(path), None) if path.exists() else None
        if first is None:
            return None
        from mlflow import MlflowClient

        limit_answers()
        uri = usable(tracking_uri(self.run_dir.parent, self.config.tracking_uri))
        with opening(uri, self.run_dir.parent) as missing:
            if missing:  # made aside: killed half-way, a store that is there would be broken for ever
                aside = missing.with_suffix(".new")
                aside.unlink(missing_ok=True)
                MlflowClient(sqlite_url(aside)).search_experiments(max_results=1)
                allow_as_umask(aside)
                aside.rename(missing)
            client = MlflowClient(uri)
            experiment = self._experiment(client, uri)
        self.state = claim(client, experiment, self.run_dir, self.state)
        self.client = client
        return client

    def _experiment(self, client: "MlflowClient", uri: str) -> str:
        """The experiment's id; it is made if need be, with its artifacts beside the runs unless a server keeps them."""
        from mlflow.exceptions import MlflowException

        name = as_utf8(os.environ.get("MLFLOW_EXPERIMENT_NAME") or self.config.experiment)
        found = client.get_experiment_by_name(name)
        if found is None:
            own = None if is_server(uri) else (self.run_dir.parent / "mlartifacts").as_uri()
            try:
                return client.create_experiment(name, artifact_location=own)
            except MlflowException:  # another run may have been faster
                found = client.get_experiment_by_name(name)
                if found is None:
                    raise
        return found.experiment_id


def sync(run_dir: Path | str, config: TrackConfig | None = None, tries: int = 4) -> Summary:
    """Send what is missing now; `tries` failures in a row end it. Raises UserError where there is no journal."""
    path = Path(run_dir).resolve() / journal.FILE_NAME
    if not path.is_file():
        raise UserError(f"{run_dir}: no {journal.FILE_NAME} in it; give the directory of one run, such as runs/NAME")
    shipper, error = Shipper(path.parent, config), None
    began, sent = time.monotonic(), 0
    try:
        with FileLock(path.parent / LOCK_NAME, timeout=2):
            for pause in range(tries):
                time.sleep((2**pause - 1) * POLL_S)
                changed = path.stat().st_mtime
                try:
                    shipper.ship(changed + 1 if time.time() - changed > SILENCE_S else None)  # file times are coarse
                    error = None
                    break
                except Exception as failure:
                    error = brief(failure)
                    if shipper.sent == sent and time.monotonic() - began > longest_call():
                        break  # it hangs, and would again
                    began, sent = time.monotonic(), shipper.sent
    except Timeout:
        error = "another process is copying this run at this moment; what it leaves, the same command sends later"
    state = State.load(path.parent)
    return Summary(state.run_id, shipper.sent, unsent(path.parent), state.wanted()[0], error)


def follow(shipper: Shipper, pid: int, since: float = 0.0, patience: float = PATIENCE_S) -> bool:
    """Send what comes until an end record of `since` (epoch seconds) or later was sent, or process `pid` is gone.

    Returns whether MLflow has everything. After the process is gone, `patience` seconds without progress end it.
    """
    is_child = os.getppid() == pid
    pause, said, progress, deadline, died = POLL_S, "", None, 0.0, 0.0
    while True:
        dead = is_gone(pid, is_child)  # asked first: what it wrote last is then there to be read
        died = died or (time.time() if dead else 0.0)
        try:
            shipper.ship(died)
            end = shipper.state.end
            if dead or (end is not None and end["time"] >= since):
                return True
            pause, said = POLL_S, ""
        except Exception as error:
            if said != brief(error):
                said = brief(error)
                print(f"{time.strftime('%F %T')} tried again until it works: {said}", flush=True)
            here = (dead, shipper.state.run_id, shipper.state.offset, len(shipper.state.files))
            if here != progress:
                progress, deadline = here, time.monotonic() + patience
            elif dead and time.monotonic() > deadline:
                return False
            pause = min(2 * pause, BACKOFF_S)
        time.sleep(pause)


def brief(error: Exception) -> str:
    """An error in one line: how it begins and ends, without passwords."""
    text = masked(f"{type(error).__name__}: {' '.join(str(error).split())}")
    return text if len(text) <= 300 else f"{text[:120]} ... {text[-160:]}"


def main() -> None:
    """The process that `MLflowTracker` starts; without --follow-pid, one `sync`."""
    parser = argparse.ArgumentParser(prog="python -m mae_dist.track.mlflow", description="Copy a run to MLflow.")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--follow-pid", type=int, help="stay until this process has ended its run, or is gone")
    parser.add_argument("--since", type=float, default=0.0, help="epoch seconds; end records before that are old")
    parser.add_argument("--experiment", default=TrackConfig.experiment)
    given = parser.parse_args()
    protect()
    config = TrackConfig(experiment=given.experiment)
    if given.follow_pid is None:
        summary = sync(given.run_dir, config)
        print(summary)
        sys.exit(1 if summary.error else 0)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # schedulers signal everything; this one has to outlive the trainer
    os.nice(5)
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    with FileLock(given.run_dir / LOCK_NAME):
        sys.exit(0 if follow(Shipper(given.run_dir, config), given.follow_pid, given.since) else 1)


if __name__ == "__main__":
    main()
