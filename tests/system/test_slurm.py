"""`sbatch -N 2 launch/slurm.sbatch` trains over two nodes of a real SLURM."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import slurm

REPOSITORY = Path(__file__).parents[2]

pytestmark = pytest.mark.system
cluster = slurm.cluster  # the fixture


def submit(cluster: slurm.Cluster, log: Path, *arguments: str) -> str:
    """Sends the job off with one process a node; its number."""
    options = ["--nodes=2", f"--chdir={REPOSITORY}", f"--output={log}"]
    settings = {"PYTHON": sys.executable, "NPROC": "1"}
    return cluster.sbatch(*options, str(REPOSITORY / "launch" / "slurm.sbatch"), *arguments, **settings)


def test_two_nodes_train(cluster: slurm.Cluster, tmp_path: Path) -> None:
    arguments = ["--config", "configs/demo.yaml", "--data.fake", "true", "--train.steps", "4"]
    arguments += ["--train.runs_dir", str(tmp_path / "runs"), "--train.global_batch_size", "8"]
    log = tmp_path / "log"
    job = submit(cluster, log, *arguments)
    state = cluster.wait(job, "COMPLETED", "FAILED", "NODE_FAIL", seconds=300)
    said = log.read_text() if log.exists() else ""
    assert state == "COMPLETED", said
    for rank in (0, 1):
        assert f"node {rank} of 2" in said
    assert list((tmp_path / "runs").glob("*/checkpoints/step-*4")), said
