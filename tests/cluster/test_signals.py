"""The fire drill: real processes, an accident on one rank, and what must be left behind."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mae_dist.train.checkpoint import committed
from tests.cluster.test_pretrain import arguments, records, status, val_losses
from tests.conftest import losses, mae_dist

pytestmark = pytest.mark.dist
DRILL = Path(__file__).with_name("drill.py")
LAUNCH = [sys.executable, "-m", "mae_dist.launch"]
TERM, USR1, INT = int(signal.SIGTERM), int(signal.SIGUSR1), int(signal.SIGINT)


def drill(shards: Path, runs: Path, accidents: str, *more: str) -> subprocess.CompletedProcess:
    """Two processes with these accidents; micro-batches of 2, so that an evaluation has more than one batch."""
    command = [*LAUNCH, "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2", str(DRILL), accidents]
    command += [*arguments(shards, runs, "--train.micro_batch_size=2", "--train.watchdog=2"), *more]
    return subprocess.run(["env", "--default-signal=HUP", *command], capture_output=True, text=True, timeout=240)


def newest(runs: Path) -> str | None:
    found = committed(runs / "t" / "checkpoints")
    return found[-1].name if found else None


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    mae_dist(*arguments(shards, runs, "--train.micro_batch_size=2"), processes=2, timeout=240)
    return runs


# forward_backward is called three times a step; rank 1 measures two batches in an evaluation.
@pytest.mark.parametrize(
    ("accident", "number", "step"),
    [
        pytest.param("forward:1:1", USR1, None, id="USR1 in the first batch"),
        pytest.param("start:1:0", TERM, None, id="TERM before anything"),
        pytest.param("forward:17:0", TERM, 6, id="TERM in a step, rank 0"),
        pytest.param("forward:17:1", INT, 6, id="INT in a step"),
        pytest.param("data:14:1", int(signal.SIGHUP), 5, id="HUP while it waits for data"),
        pytest.param("evaluation:1:1", USR1, 7, id="USR1 in an evaluation"),
        pytest.param("save:2:1", TERM, 9, id="TERM in a save"),
    ],
)
def test_a_signal_to_one_rank_stops_all_and_nothing_is_lost(shards, undisturbed, tmp_path, accident, number, step):
    done = drill(shards, tmp_path, f"{accident}:{number}")
    assert done.returncode == 128 + number, done.stderr
    assert "Traceback" not in done.stderr
    assert newest(tmp_path) == (step and f"step-{step:08d}")
    if step is None:
        assert not losses(tmp_path / "t") if (tmp_path / "t" / "journal.jsonl").exists() else True
        return
    assert status(tmp_path) == ("SCHEDULED" if number == USR1 else "KILLED")
    assert max(losses(tmp_path / "t")) == step
    assert f"stopped by signal {number} after step {step}" in done.stdout
    assert 7 not in val_losses(tmp_path) or step > 7  # no half evaluation
    if step == 7:
        mae_dist(*arguments(shards, tmp_path, "--train.micro_batch_size=2"), processes=2, timeout=240)
        assert losses(tmp_path / "t") == losses(undisturbed / "t")
        assert val_losses(tmp_path) == val_losses(undisturbed)  # the one that was cut short was made up for
        assert [r["step"] for r in records(tmp_path) if "loss/val" in r.get("metrics", {})] == [7, 14]


def test_a_signal_in_a_knn_measurement_stops_it_and_the_next_attempt_makes_up_for_it(shards, tmp_path):
    """The second time, of the held-out images, while they are classified on rank 1."""
    want = ("--train.micro_batch_size=2", "--train.knn_every=2")
    mae_dist(*arguments(shards, tmp_path / "whole", *want), timeout=240)
    whole = {
        r["step"]: r["metrics"]["eval/knn"] for r in records(tmp_path / "whole") if "eval/knn" in r.get("metrics", {})
    }
    step = sorted(whole)[1]
    done = drill(shards, tmp_path, f"k-NN:4:1:{USR1}", *want)
    assert done.returncode == 128 + USR1, done.stderr
    assert newest(tmp_path) == f"step-{step:08d}" and f"after step {step}" in done.stdout
    mae_dist(*arguments(shards, tmp_path, *want), timeout=240)
    found = [(r["step"], r["metrics"]["eval/knn"]) for r in records(tmp_path) if "eval/knn" in r.get("metrics", {})]
    assert found == sorted(whole.items())


def test_a_signal_ends_a_run_whose_rank_never_gets_its_data(shards, tmp_path):
    done = drill(shards, tmp_path, f"data:13:1:sleep,forward:13:0:{TERM}")
    assert done.returncode == 128 + TERM, done.stderr
    assert "in data of step 5" in done.stderr and "waited for: rank 1" in done.stderr
    assert status(tmp_path) == "KILLED" and newest(tmp_path) == "step-00000004"
    for rank in (0, 1):
        stacks = (tmp_path / "t" / "logs" / f"rank-{rank}.log").read_text()
        assert f"rank {rank} has been in" in stacks and "drill.py" in stacks if rank else "forward" in stacks


def test_a_rank_that_fails_takes_the_others_down_and_its_error_is_the_one_shown(shards, tmp_path):
    done = drill(shards, tmp_path, "forward:17:1:error")
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1 and "KeyError: 'the real error'" in done.stderr
    assert "ended because rank 1 failed: KeyError: 'the real error'" in done.stderr
    assert status(tmp_path) == "FAILED"


def test_a_killed_rank_is_named(shards, tmp_path):
    done = drill(shards, tmp_path, f"forward:17:1:{int(signal.SIGKILL)}")
    assert done.returncode == 128 + signal.SIGKILL
    assert "rank 1" in done.stderr and "was killed" in done.stderr and "Traceback" not in done.stderr
    assert status(tmp_path) == "FAILED"


@pytest.mark.slow
def test_a_frozen_rank_is_named_by_another_and_the_run_gives_up(shards, tmp_path):
    done = drill(shards, tmp_path, f"forward:17:1:{int(signal.SIGSTOP)}", "--train.timeout=8")
    assert done.returncode in (75, 128 + signal.SIGKILL)  # torchrun has to kill the frozen one
    assert "rank 1: SILENT for" in done.stderr and "waited for: rank 1" in done.stderr
    assert "error: lost the others in forward and backward of step 6: Timed out" in done.stderr
    assert status(tmp_path) == "FAILED"


def wait_until(true: Callable[[], bool], jobs: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 240
    while not true():
        assert time.monotonic() < deadline and all(job.poll() is None for job in jobs), "the run never got there"
        time.sleep(0.02)


def node(shards: Path, runs: Path, port: int, is_host: bool, log: Path) -> subprocess.Popen:
    """One of up to two elastic nodes on this machine, in a process group of its own."""
    command = [*LAUNCH, "--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d"]
    command += [f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=t", "--local-addr=127.0.0.1"]
    command += [f"--rdzv-conf=is_host={is_host},last_call_timeout=8"]
    command += ["-m", "mae_dist", *arguments(shards, runs, "--train.watchdog=2", "--train.steps=60")]
    return subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT)


@pytest.mark.slow
def test_elastic_the_run_goes_on_with_the_node_that_is_left(shards, tmp_path):
    """One of two launchers is killed; its process, an orphan, ends itself; the other node goes on alone."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logs = [tmp_path / "log-0", tmp_path / "log-1"]
    nodes = [node(shards, tmp_path, port, i == 0, logs[i]) for i in range(2)]
    try:
        journal = tmp_path / "t" / "journal.jsonl"
        wait_until(lambda: journal.exists() and '"step":10,' in journal.read_text(), nodes)
        nodes[1].kill()
        assert nodes[0].wait(timeout=240) == 0, logs[0].read_text()
    finally:
        for one in nodes:
            one.kill()
    starts = [record for record in records(tmp_path) if record["kind"] == "start"]
    assert [start["tags"]["world_size"] for start in starts][-2:] == ["2", "1"]
    alone = tmp_path / "alone"
    mae_dist(*arguments(shards, alone, "--train.steps=60"), timeout=240)
    assert losses(tmp_path / "t") == pytest.approx(losses(alone / "t"), rel=1e-5)
