"""The whole command on sharded weights: train, validate, draw, save, stop, and go on with another engine."""

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TINY, losses, mae_dist

pytestmark = [pytest.mark.dist, pytest.mark.slow]
needs_deepspeed = pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="deepspeed is not installed")


def arguments(shards: Path, runs: Path, steps: int, *more: str) -> list[str]:
    return [
        "pretrain", *TINY, f"--data.shards={shards}", "--data.val_shards=1", f"--train.runs_dir={runs}",
        "--train.name=t", "--train.global_batch_size=12", f"--train.steps={steps}", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def plain(shards, tmp_path_factory) -> dict[int, float]:
    """Six steps of DDP in one process, stopped after three and gone on with `train.steps` said anew."""
    runs = tmp_path_factory.mktemp("plain")
    mae_dist(*arguments(shards, runs, 3))
    mae_dist(*arguments(shards, runs, 6, "--train.accept_changes=true"))
    return losses(runs / "t")


@needs_deepspeed
def test_zero_3_on_two_processes_then_fsdp_alone(shards, plain, tmp_path):
    first = ["--engine.name=deepspeed", "--engine.zero_stage=3", "--train.micro_batch_size=3"]
    done = mae_dist(*arguments(shards, tmp_path, 3, *first), processes=2, timeout=300)
    assert (tmp_path / "t" / "review" / "reconstruction-00000003.png").exists(), done.stdout
    done = mae_dist(*arguments(shards, tmp_path, 6, "--engine.name=fsdp", "--train.accept_changes=true"), timeout=300)
    assert "UserWarning" not in done.stderr
    assert losses(tmp_path / "t") == pytest.approx(plain, rel=1e-5)


@needs_deepspeed
def test_deepspeed_needs_no_launcher(shards, plain, tmp_path):
    mae_dist(*arguments(shards, tmp_path, 3, "--engine.name=deepspeed"), timeout=300)
    assert losses(tmp_path / "t") == pytest.approx({step: plain[step] for step in (1, 2, 3)}, rel=1e-5)


@needs_deepspeed
@pytest.mark.skipif(not shutil.which("deepspeed", path=Path(sys.executable).parent), reason="no deepspeed launcher")
def test_under_the_launcher_of_deepspeed(shards, plain, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus=2", "--no_ssh_check"]
    launcher += ["--master_addr=127.0.0.1", f"--master_port={port}", "--module", "mae_dist"]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [*launcher, *arguments(shards, tmp_path, 3, "--engine.name=deepspeed")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(tmp_path / "t") == pytest.approx({step: plain[step] for step in (1, 2, 3)}, rel=1e-5)
