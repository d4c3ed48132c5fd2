"""`sbatch -N 2 launch/slurm.sbatch` over two nodes of a real SLURM: it trains, stops in time, and goes on."""

import json
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.system import slurm

REPOSITORY = Path(__file__).parents[2]
SETTINGS = ["--config", "configs/demo.yaml", "--data.fake", "true", "--train.global_batch_size", "8"]

pytestmark = pytest.mark.system
cluster = slurm.cluster  # the fixture


def submit(cluster: slurm.Cluster, folder: Path, steps: int, *options: str) -> str:
    """Sends the job off with one process a node; its number. All jobs of a test share a log and a run."""
    options = ("--nodes=2", f"--chdir={REPOSITORY}", f"--output={folder}/log", *options)
    arguments = ["--train.runs_dir", f"{folder}/runs", "--train.steps", str(steps), "--train.log_every", "1"]
    script = str(REPOSITORY / "launch" / "slurm.sbatch")
    return cluster.sbatch(*options, script, *SETTINGS, *arguments, PYTHON=sys.executable, NPROC="1")


def wait_for(folder: Path, text: str, count: int = 1, seconds: float = 200) -> None:
    """Until `text` is in the log so many times."""
    log, end = folder / "log", time.monotonic() + seconds
    while not log.exists() or log.read_text().count(text) < count:
        assert time.monotonic() < end, f"no {text!r} in\n{log.read_text() if log.exists() else 'a log'}"
        time.sleep(0.2)


def start_now(cluster: slurm.Cluster, job: str) -> None:
    """SLURM lets a job that was put back wait for two minutes, while its nodes are cleaned up; we a few seconds."""
    time.sleep(5)  # a start in the second in which the old one was revoked fails: "Job credential revoked"
    end = time.monotonic() + 100
    while cluster.job(job)["JobState"] == "PENDING" and time.monotonic() < end:
        with suppress(AssertionError):  # it has started meanwhile
            cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")
        time.sleep(1)


def test_two_nodes_train(cluster: slurm.Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, 4)
    state = cluster.wait(job, "COMPLETED", "FAILED", seconds=200)
    log = (tmp_path / "log").read_text()
    assert state == "COMPLETED", log
    # srun puts the node's number before each line: both nodes ran, and rank 0, which writes, was on the first.
    assert f"0: launch/torchrun.sh: node 0 of 2 (node 0 is {slurm.NODES[0]}:" in log
    assert "1: launch/torchrun.sh: node 1 of 2" in log
    assert "0: step 4/4" in log
    (journal,) = tmp_path.glob("runs/*/journal.jsonl")
    assert json.loads(journal.read_text().splitlines()[0])["tags"]["world_size"] == "2"
    assert list(tmp_path.glob("runs/*/checkpoints/step-*4"))


def test_a_job_at_its_time_limit_puts_itself_in_the_queue_until_the_run_is_complete(
    cluster: slurm.Cluster, tmp_path: Path
) -> None:
    job = submit(cluster, tmp_path, 600)
    wait_for(tmp_path, "0: step ")
    cluster.run("scancel", "--signal=USR1", job)  # to every process of the step, as --signal=USR1@120 does
    wait_for(tmp_path, "stopped by signal 10 after step")
    wait_for(tmp_path, "status 138: back in the queue to go on")
    assert cluster.wait(job, "PENDING", seconds=60) == "PENDING"
    start_now(cluster, job)
    wait_for(tmp_path, "resumed at step")
    assert cluster.wait(job, "COMPLETED", "FAILED", seconds=300) == "COMPLETED", (tmp_path / "log").read_text()
    assert cluster.job(job)["Restarts"] == "1"
    (journal,) = tmp_path.glob("runs/*/journal.jsonl")
    ends = [record["status"] for record in map(json.loads, journal.read_text().splitlines()) if "status" in record]
    assert ends == ["SCHEDULED", "FINISHED"]


def test_a_mistake_is_not_queued_again(cluster: slurm.Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, 0)
    assert cluster.wait(job, "COMPLETED", "FAILED", seconds=200) == "FAILED"
    log = (tmp_path / "log").read_text()
    assert "train.steps: 0: write" in log and "status 2: not started again" in log


def test_a_preempted_job_goes_on_by_itself(cluster: slurm.Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, 100_000)
    wait_for(tmp_path, "0: step ")
    cluster.run("scontrol", "requeue", job)
    assert cluster.wait(job, "PENDING", seconds=60) == "PENDING"
    wait_for(tmp_path, "stopped by signal 15 after step")
    start_now(cluster, job)
    wait_for(tmp_path, "resumed at step")
    assert cluster.job(job)["Restarts"] == "1"
    cluster.run("scancel", job)
    cluster.wait(job, "CANCELLED", seconds=60)
