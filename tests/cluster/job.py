"""One attempt of a distributed job as a scheduler sees it: started, watched, signalled, cleaned up after.

Processes are found by a mark in their environment, so that orphans are found too.
"""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from mae_dist.track import journal
from tests.cluster.nodes import ADDRESSES

ROOT = Path(__file__).parents[2]
MARK = "CHAOS_MARK"


class Process(NamedTuple):
    pid: int
    parent: int
    command: str
    environment: dict[str, str]


def marked(mark: str) -> list[Process]:
    """All living processes that were started, however indirectly, with this mark."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with suppress(OSError):  # it ended while we looked
            environment = (folder / "environ").read_bytes()
            if f"{MARK}={mark}".encode() not in environment.split(b"\0"):
                continue
            pairs = (pair.split("=", 1) for pair in environment.decode(errors="replace").split("\0") if "=" in pair)
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            command = (folder / "cmdline").read_text().replace("\0", " ")
            if state != "Z":
                found.append(Process(int(folder.name), int(parent), command, dict(pairs)))
    return found


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


class Job:
    """`ranks` processes under torchrun that run `arguments` of the audited command line; `attempt` is its number.

    `nodes`: two network namespaces to share the ranks, each with an agent of its own; none: this machine.
    """

    def __init__(self, folder: Path, attempt: int, ranks: int, arguments: list[str], nodes: Sequence[str] = ()):
        self.folder, self.attempt, self.mark = folder, attempt, uuid.uuid4().hex
        self.reached = 0  # by the attempts before, as far as the journal knows
        self.audit, self.log = folder / "audit", folder / f"attempt-{attempt:03d}.log"
        self.audit.mkdir(parents=True, exist_ok=True)
        torchrun = [sys.executable, "-m", "torch.distributed.run"]
        work = ["-m", "tests.cluster.audited", *arguments]
        commands = [[*torchrun, "--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={ranks}", *work]]
        if nodes:
            torchrun[2] = "mae_dist.launch"  # as launch/torchrun.sh does
            meet = [f"--nnodes={len(nodes)}", f"--master-addr={ADDRESSES[0]}", f"--master-port={29500 + attempt}"]
            meet += [f"--nproc-per-node={ranks // len(nodes)}"]
            commands = [
                ["ip", "netns", "exec", node, *torchrun, *meet, f"--node-rank={i}", *work]
                for i, node in enumerate(nodes)
            ]
        own = {"CHAOS_AUDIT": str(self.audit), "CHAOS_ATTEMPT": str(attempt), MARK: self.mark}
        shared = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        cable = {"GLOO_SOCKET_IFNAME": "cable"} if nodes else {}
        with self.log.open("ab") as log:
            self.agents = [
                subprocess.Popen(
                    command, stdout=log, stderr=log, cwd=folder, start_new_session=True,
                    env={**os.environ, **shared, **own, **cable},
                ) for command in commands
            ]  # fmt: skip

    def steps(self) -> list[int]:
        """What rank 0 was given so far."""
        path = self.audit / f"{self.attempt:03d}-0.jsonl"
        return [line["step"] for line in journal.read(path)] if path.exists() else []

    def step(self) -> int:
        """The last of `steps`; 0 before the first."""
        return max(self.steps(), default=0)

    def ended(self) -> bool:
        return all(agent.poll() is not None for agent in self.agents)

    def ranks(self) -> list[Process]:
        """The training processes, by rank, also when their agent is gone."""
        here = [p for p in marked(self.mark) if "RANK" in p.environment and "tests.cluster.audited" in p.command]
        pids = {p.pid for p in here}
        return sorted((p for p in here if p.parent not in pids), key=lambda p: int(p.environment["RANK"]))

    def workers(self) -> list[Process]:
        """The loader's processes: forked by the ranks."""
        pids = {p.pid for p in self.ranks()}
        return [p for p in marked(self.mark) if p.parent in pids and "tests.cluster.audited" in p.command]

    def trainers(self) -> list[Process]:
        """Every process but those that copy the journal to MLflow, which are to outlive the others."""
        return [p for p in marked(self.mark) if "mae_dist.track.mlflow" not in p.command]

    def wait(self, seconds: float) -> int | None:
        """The exit status of the first agent; None if one is still there after `seconds`."""
        deadline = time.monotonic() + seconds
        with suppress(subprocess.TimeoutExpired):
            codes = [agent.wait(max(0.0, deadline - time.monotonic())) for agent in self.agents]
            return codes[0]
        return None

    def kill_all(self) -> None:
        """As a scheduler does with what is left of a job: every process, by SIGKILL."""
        deadline = time.monotonic() + 30
        while left := marked(self.mark):
            for process in left:
                kill(process.pid)
            self.ended()
            assert time.monotonic() < deadline, left
            time.sleep(0.05)
        self.wait(30)

    def tail(self, lines: int = 30) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
