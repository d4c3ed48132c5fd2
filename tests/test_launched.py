"""How a rank ends: without the interpreter's clean-up, which threads of the collectives may turn into SIGABRT."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mae_dist import launched
from mae_dist.errors import UserError

RANK = """
import atexit, os, sys
atexit.register(os.abort)  # as a thread would that wants the interpreter's lock too late
import mae_dist.cli as cli
cli.COMMANDS["pretrain"] = lambda arguments: print("done") or int(arguments[0])
sys.argv = ["mae-dist", "pretrain", "{status}"]
cli.main()
"""


@pytest.mark.parametrize(("status", "world", "ended"), [(0, "2", 0), (143, "2", 143), (0, None, -6)])
def test_what_happens_while_the_interpreter_goes_down_does_not_fail_a_rank(status, world, ended):
    environment = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
    environment |= {"WORLD_SIZE": world} if world else {}
    command = [sys.executable, "-c", RANK.format(status=status)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert (done.returncode, done.stdout) == (ended, "done\n")


def environment(monkeypatch, **values):
    """This process's environment, of all that launchers set, as `values` and nothing else."""
    for name in {*launched.OURS, *(name for names in launched.SCHEDULERS.values() for name in names), *values}:
        monkeypatch.setenv(name, "")  # noted, so that what launch() sets goes too
        monkeypatch.delenv(name)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


MEET = {"MASTER_ADDR": "a", "MASTER_PORT": "2950"}
SRUN = {"SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_NODELIST": "gpu[03-04,9],login", "SLURM_STEP_TASKS_PER_NODE": "2,1"}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"RANK": "1"}, ["RANK=1 is set, but not WORLD_SIZE", "env -u RANK mae-dist"]),
        ({"RANK": "0"}, ["RANK=0 is set, but not WORLD_SIZE"]),
        ({"WORLD_SIZE": "2"}, ["WORLD_SIZE=2 is set, but not RANK"]),
        ({"LOCAL_RANK": "1"}, ["LOCAL_RANK=1 is set, but neither"]),
        ({"MASTER_ADDR": "a"}, ["MASTER_ADDR=a is set, but neither"]),
        ({"MASTER_PORT": "1"}, ["MASTER_PORT=1 is set, but neither"]),
        ({"LOCAL_WORLD_SIZE": "2"}, ["LOCAL_WORLD_SIZE=2 is set, but neither"]),
        ({"PET_NNODES": "2"}, ["PET_NNODES=2 is set, but neither"]),
        ({"RANK": "x", "WORLD_SIZE": "2"}, ["RANK=x is not a whole number"]),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, ["RANK=-1 is not a whole number"]),
        ({"RANK": "0", "WORLD_SIZE": "0"}, ["WORLD_SIZE=0 is not a whole number from 1"]),
        ({"RANK": "0", "WORLD_SIZE": "1e3"}, ["WORLD_SIZE=1e3 is not"]),
        ({"RANK": "2", "WORLD_SIZE": "2"}, ["RANK=2 is not below WORLD_SIZE=2"]),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "1"} | MEET, ["LOCAL_RANK=1 does not fit RANK=0"]),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"} | MEET, ["LOCAL_WORLD_SIZE=1"]),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "3"} | MEET, ["LOCAL_SIZE=3"]),
        ({"RANK": "0", "WORLD_SIZE": "2"}, ["but not MASTER_ADDR"]),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, ["but not MASTER_PORT"]),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "70000"}, ["MASTER_PORT=70000 is no"]),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
          "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, ["mpirun started this process as 0 of 4", "set MASTER_ADDR"]),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, ["mpiexec started this process as 0 of 2"]),
    ],
)  # fmt: skip
def test_a_part_of_what_a_launcher_sets_is_refused(monkeypatch, values, words):
    environment(monkeypatch, **values)
    with pytest.raises(UserError) as refused:
        launched.launch()
    assert all(word in str(refused.value) for word in words) and "\n" not in str(refused.value), str(refused.value)


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ({}, (0, 1, 0, None, "", 0)),
        ({"LOCAL_RANK": "0"}, (0, 1, 0, None, "", 0)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1, 0, 1, "", 0)),
        ({"RANK": "1", "WORLD_SIZE": "2"} | MEET, (1, 2, 0, None, "a", 2950)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"} | MEET, (3, 4, 1, 2, "a", 2950)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, (0, 1, 0, None, "", 0)),  # a batch script, not srun
        (SRUN | {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0", "SLURM_JOB_ID": "7"},
         (1, 3, 1, 2, "gpu03", 10007)),
        (SRUN | {"SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_NODEID": "1", "SLURM_JOB_ID": "7"} | MEET,
         (2, 3, 0, 1, "a", 2950)),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "3", "SLURM_STEP_TASKS_PER_NODE": "4",
          "SLURM_STEP_NODELIST": "n1", "SLURM_NODEID": "0", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "1"},
         (3, 4, 3, 4, "n1", 10104)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
          "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, (1, 2, 1, 2, "127.0.0.1", 29500)),
    ],
)  # fmt: skip
def test_a_process_finds_its_place(monkeypatch, values, place):
    for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_NODEID"):
        monkeypatch.delenv(name, raising=False)
    environment(monkeypatch, **values)
    assert tuple(launched.launch()) == place == tuple(launched.launch())  # the second time from what the first one set


def test_the_launcher_of_deepspeed_may_say_the_local_rank_in_front(monkeypatch):
    environment(monkeypatch, RANK="3", WORLD_SIZE="4", LOCAL_RANK="1", **MEET)
    arguments = ["--local_rank=1", "pretrain", "--train.seed=0"]
    launched.take_local_rank(arguments)
    assert arguments == ["pretrain", "--train.seed=0"] and launched.launch().local_rank == 1
    with pytest.raises(UserError, match="LOCAL_RANK=1 is set, but the launcher wrote --local_rank=0"):
        launched.take_local_rank(["--local_rank=0", "pretrain"])


def test_no_pipe_of_a_launcher_is_left_before_its_end():
    """`| head` ended a job of many nodes with 141: under pipefail, SIGPIPE of what writes on is an error."""
    for script in (Path(__file__).parents[1] / "launch").iterdir():
        assert "| head" not in script.read_text(), script
