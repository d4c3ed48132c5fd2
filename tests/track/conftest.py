"""A clean environment, small runs, and a real MLflow server that a test brings up when it wants to."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from mae_dist.track import journal
from mae_dist.track.journal import Journal
from mae_dist.track.review import reconstruction_grid, save_picture


@pytest.fixture(autouse=True)
def clean_environment() -> Iterator[None]:
    """No MLflow settings from outside, and none left behind."""
    with mock.patch.dict(os.environ):
        for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
            del os.environ[name]
        os.environ["GIT_PYTHON_REFRESH"] = "quiet"
        yield


@pytest.fixture(scope="module")
def quick_disk() -> Iterator[None]:
    """fsync does nothing: these tests end processes, not the power, and a busy disk takes 10 ms for each."""
    with mock.patch("os.fsync"):
        yield


def write_steps(opened: Journal, first: int, last: int) -> None:
    """Metrics of the steps first..last; a step that is written again is the same again."""
    for step in range(first, last + 1):
        opened.write(
            {"kind": "metrics", "step": step, "metrics": {"loss/train": 1 / (step + 1), "perf/speed": step * 7}}
        )


def write_picture(opened: Journal, step: int) -> None:
    """A small grid in review/, and its record."""
    pixels = np.full((2, 8, 8, 3), step % 256, np.uint8)
    name = save_picture(reconstruction_grid(pixels, pixels, pixels), opened.path.parent, step)
    opened.write({"kind": "image", "step": step, "key": "recon/val", "path": name})


def start_run(run_dir: Path, step: int = 0, **more: object) -> Journal:
    """Open (and cut) a run's journal and write its start record."""
    opened = Journal(run_dir / journal.FILE_NAME)
    opened.cut(step)
    (run_dir / "config.yaml").write_text("model: {}\n")
    record = {"params": {"lr": 0.1}, "tags": {"mlflow.source.git.commit": "0" * 40}, "artifacts": ["config.yaml"]}
    opened.write({"kind": "start", "step": step, **record, **more})
    return opened


def end_run(opened: Journal, status: str = "FINISHED", reason: str = "all steps done") -> None:
    """The end record; the journal is closed."""
    opened.write({"kind": "end", "status": status, "reason": reason})
    opened.close()


class Server:
    """`mlflow server` on a loopback port that is known before it listens."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Return when it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder / 'server.db'}"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, cwd=self.folder, start_new_session=True
            )
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                    if answer.status == 200:
                        return
            except OSError:
                assert self.process.poll() is None, (self.folder / "server.log").read_text()
                time.sleep(0.2)
        raise TimeoutError((self.folder / "server.log").read_text())

    def stop(self) -> None:
        """End it and its workers."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A server that does not listen yet."""
    made = Server(tmp_path)
    yield made
    made.stop()
