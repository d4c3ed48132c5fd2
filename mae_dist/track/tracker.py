"""The trainer's end of MLflow: it starts the process that copies the journal, and at the end waits for it a little."""

import os
import subprocess
import sys
import time
from pathlib import Path

from mae_dist.track import TrackConfig
from mae_dist.track.place import tracking_uri, usable
from mae_dist.track.state import unsent
from mae_dist.urls import masked

LOG_NAME = "logs/mlflow.log"


class MLflowTracker:
    """One shipper process. Nothing here raises or waits longer than asked: MLflow cannot stop a training run."""

    def __init__(self, run_dir: Path, process: "subprocess.Popen[bytes] | None", close_timeout: float) -> None:
        self.run_dir, self.process, self.close_timeout = run_dir, process, close_timeout

    @classmethod
    def start(cls, run_dir: Path | str, config: TrackConfig) -> "MLflowTracker":
        """Start copying `<run_dir>/journal.jsonl`; on rank 0, best before CUDA and the network are up.

        The process has a session of its own, and sees by itself when this one is gone. Its output: logs/mlflow.log.
        """
        run_dir = Path(run_dir).resolve()
        process = None
        try:
            if config.mlflow:
                process = spawn(run_dir, config)
        except Exception as error:
            print(
                f"warning: MLflow is off for now: {masked(str(error))}; `mae-dist sync {run_dir}` sends the run",
                file=sys.stderr,
            )
        return cls(run_dir, process, config.close_timeout)

    def close(self, timeout: float | None = None) -> None:
        """After the end record: wait at most `timeout` seconds (None: the config's) for MLflow to have everything."""
        if self.process is None:
            return
        try:
            code = self.process.wait(self.close_timeout if timeout is None else timeout)
        except subprocess.TimeoutExpired:
            code = None
        self.process = None
        try:
            left = unsent(self.run_dir)
        except Exception as error:
            left = str(error)
        if code != 0 or left:
            what = f"{left} records" if left else "the status"
            going_on = ", which is tried for another minute" if code is None else ""
            print(
                f"MLflow: {what} not sent yet{going_on} (see {self.run_dir / LOG_NAME}); "
                f"`mae-dist sync {self.run_dir}` finishes the copy",
                file=sys.stderr,
            )


def spawn(run_dir: Path, config: TrackConfig) -> "subprocess.Popen[bytes]":
    """Start the shipper of `run_dir`, following this process. Raises OSError, and UserError as `usable` does."""
    command = [sys.executable, "-P", "-m", "mae_dist.track.mlflow", str(run_dir)]
    command += ["--follow-pid", str(os.getpid()), "--since", repr(time.time()), f"--experiment={config.experiment}"]
    uri = usable(tracking_uri(run_dir.parent, config.tracking_uri))
    told = {"MLFLOW_TRACKING_URI": uri} if config.tracking_uri else {}  # not by arguments, which everybody can see
    package = str(Path(__file__).resolve().parents[2])
    paths = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    log = run_dir / LOG_NAME
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": paths, **told},
        )


def is_gone(pid: int, is_child: bool) -> bool:
    """Whether a process has ended. `is_child`: it started this one, which its end gives another parent."""
    if is_child:
        return os.getppid() != pid
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except ProcessLookupError:
        return True
    except OSError:  # another user's, or a system without /proc
        return False
