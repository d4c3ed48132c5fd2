"""Two attempts never work on one run at once, and ranks do not outlive what started them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mae_dist.engine.world import World
from mae_dist.train.alone import Taken, alone

ROOT = Path(__file__).parents[2]
MAIN = World(0, 1, torch.device("cpu"))
HOLD = """
import sys, time, torch
from pathlib import Path
from mae_dist.engine.world import World
from mae_dist.train.alone import Taken, alone
world = World(int(sys.argv[2]), 1, torch.device("cpu"))  # size 1: this test has no process group
with alone(Path(sys.argv[1]), world):
    print("in", flush=True)
    time.sleep(600)
"""


def holder(run_dir: Path, rank: int) -> subprocess.Popen:
    """A process that holds the lock as this rank does."""
    command = [sys.executable, "-c", HOLD, str(run_dir), str(rank)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert process.stdout and process.stdout.readline() == "in\n"
    return process


@pytest.mark.parametrize("rank", [0, 1])
def test_while_any_rank_of_another_attempt_lives_nobody_gets_in(tmp_path, rank, capsys):
    """Also when only an orphan is left; and as soon as it is gone, the next attempt goes on."""
    other = holder(tmp_path, rank)
    try:
        with (
            pytest.raises(Taken, match=r"trains this run; stop it, or .* --train.name NAME"),
            alone(tmp_path, MAIN, patience=0.3),
        ):
            pytest.fail("two at once")
        if rank == 0:
            assert f"process {other.pid} on" in capsys.readouterr().out
    finally:
        other.kill()
        other.wait()
    with alone(tmp_path, MAIN, patience=0):
        pass


def test_the_lock_is_let_go_at_the_end_whatever_forked_workers_do(tmp_path):
    with alone(tmp_path, MAIN, patience=0):
        worker = os.fork()
        if not worker:
            time.sleep(60)
            os._exit(0)
    try:
        with alone(tmp_path, MAIN, patience=0):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)


def test_ranks_share_the_lock(tmp_path):
    others = [holder(tmp_path, 0), holder(tmp_path, 1), holder(tmp_path, 2)]
    for other in others:
        other.kill()
        other.wait()


LAUNCHER = """
import os, subprocess, sys, time
rank = "import time, mae_dist.launched as l; l.end_with_launcher(); print('up', flush=True); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", rank])
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
@pytest.mark.parametrize(
    "sets", [{"TORCHELASTIC_RUN_ID": "x"}, {"LOCAL_SIZE": "1"}, {}], ids=["torchrun", "deepspeed", ""]
)
def test_a_rank_dies_with_its_launcher_and_one_started_by_hand_does_not(sets):
    """The end of the pipe tells: it closes when nobody holds it any more."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **sets}
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER], stdout=subprocess.PIPE, env=environment, start_new_session=True
    )
    assert launcher.stdout and launcher.stdout.readline() == b"up\n"
    launcher.kill()
    launcher.wait()
    if sets:
        assert launcher.stdout.read() == b""  # returns: the rank is gone
        return
    os.set_blocking(launcher.stdout.fileno(), False)
    time.sleep(0.5)
    assert launcher.stdout.read() is None  # still there
    os.killpg(launcher.pid, signal.SIGKILL)
