"""Whoever listens, or nobody: a run that has finished ends with 0, a list that cannot be written ends as `ls` would."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TINY

COMMAND = """
import os, sys
import mae_dist.cli as cli
def work(arguments):
    for i in range(3000):
        print("line", i, "of some length, so that buffers fill", flush=i % 100 == 0)
    print("a name that is no text: \\udcff", file=sys.stderr)
    opened = os.open(sys.argv[3], os.O_WRONLY | os.O_CREAT)
    os.write(2, b"a library's word")
    os.close(opened)
    open(sys.argv[3] + ".end", "w").write("done")
    return int(arguments[0])
cli.COMMANDS[sys.argv[1]] = work
cli.main()
"""


def run(command: str, tmp_path: Path, how: str, status: int = 0) -> subprocess.CompletedProcess:
    """`command` with standard output that is gone, full or closed; or with all three streams closed."""
    python = [sys.executable, "-c", COMMAND, command, str(status), str(tmp_path / "file")]
    ended = tmp_path / "status"
    shell = {
        "gone": '"$@" | head -n 1; exit ${PIPESTATUS[0]}',
        "full": '"$@" > /dev/full',
        "closed": '"$@" >&-',
        "all closed": '"$@" <&- >&- 2>&-',
        "full errors": '"$@" > /dev/null 2> /dev/full',
        "errors gone": f'exec 3>&1; {{ "$@" 2>&1 >&3 3>&-; echo $? > {ended}; }} | true; exit $(cat {ended})',
    }[how]
    return subprocess.run(["bash", "-c", shell, "bash", *python], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("how", ["gone", "full", "closed", "all closed", "full errors", "errors gone"])
@pytest.mark.parametrize("status", [0, 143])
def test_work_goes_on_and_ends_as_it_would(tmp_path: Path, how: str, status: int) -> None:
    done = run("pretrain", tmp_path, how, status)
    assert done.returncode == status and "Traceback" not in done.stderr
    assert (tmp_path / "file.end").read_text() == "done"
    assert (tmp_path / "file").read_bytes() == b"", "a file got the number, and the words, of a closed stream"
    if how == "full":
        assert done.stderr.count("warning: standard output: No space left on device") == 1


@pytest.mark.parametrize(("how", "status"), [("gone", 128 + signal.SIGPIPE), ("full", 1), ("closed", 0)])
def test_a_list_that_cannot_be_written_ends_the_command(tmp_path: Path, how: str, status: int) -> None:
    done = run("verify", tmp_path, how)
    assert done.returncode == status and "Traceback" not in done.stderr
    assert (tmp_path / "file.end").exists() == (how == "closed")
    assert (done.stderr == "error: standard output: No space left on device\n") == (how == "full")
    assert done.stderr == "" or how != "gone"


@pytest.mark.parametrize("arguments", [["--help"], ["shard", "--help"], ["nonsense"], ["shard"]])
def test_help_and_mistakes_too(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "mae_dist", *arguments]
    mistake = "--help" not in arguments
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == (2 if mistake else 1) and done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_a_stream_that_somebody_made_non_blocking_is_waited_for(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    command = [sys.executable, "-c", COMMAND, "pretrain", "0", str(tmp_path / "file")]
    process = subprocess.Popen(command, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    with os.fdopen(reading) as read:
        lines = read.read().splitlines()
    assert process.wait(60) == 0 and process.stderr and b"Traceback" not in process.stderr.read()
    assert len(lines) == 3000
    process.stderr.close()


def test_a_parent_that_ignores_its_children_changes_nothing(tmp_path: Path) -> None:
    """Some supervisors do, and so does a shell's `trap '' CHLD`; a program that is started inherits it."""
    run = ["pretrain", *TINY, "--data.fake=true", "--train.steps=2", "--train.global_batch_size=2"]
    command = [sys.executable, "-m", "mae_dist", *run, f"--train.runs_dir={tmp_path}"]
    command = ["env", "--ignore-signal=SIGCHLD", *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
