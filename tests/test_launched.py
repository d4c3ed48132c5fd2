"""How a rank ends: without the interpreter's clean-up, which threads of the collectives may turn into SIGABRT."""

import os
import subprocess
import sys

import pytest

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
