"""A real SLURM cluster of two nodes on this one machine, for as long as a test runs.

Debian's slurm-wlm and munge, as root: munged (as the user munge), slurmctld and two slurmd on free ports, every file
in one temporary directory. The nodes need names that resolve; they are put into /etc/hosts and taken out again.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

NODES = ("mae-n1", "mae-n2")
HOSTS = Path("/etc/hosts")
HOSTS_LINE = f"127.0.0.1 {' '.join(NODES)} # mae_dist tests\n"
TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "setpriv")

CONFIG = """
ClusterName=mae
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket
StateSaveLocation={root}/state
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/%n/slurmd.pid
SlurmdSpoolDir={root}/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2
ReturnToService=2
NodeName={nodes[0]} NodeHostname=localhost NodeAddr=127.0.0.1 Port={node_ports[0]} CPUs=4 State=UNKNOWN
NodeName={nodes[1]} NodeHostname=localhost NodeAddr=127.0.0.1 Port={node_ports[1]} CPUs=4 State=UNKNOWN
PartitionName=main Nodes={nodes[0]},{nodes[1]} Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """The reason why there can be no cluster here, or None."""
    if os.geteuid() != 0:
        return "a SLURM of our own needs root"
    # Debian keeps the daemons where only root's PATH looks.
    missing = [tool for tool in TOOLS if shutil.which(tool, path=os.environ["PATH"] + ":/usr/sbin:/sbin") is None]
    return f"not installed: {', '.join(missing)} (Debian: slurm-wlm munge)" if missing else None


class Cluster:
    """Runs SLURM's commands against this cluster and no other."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.env = {**os.environ, "SLURM_CONF": str(root / "slurm.conf")}
        self.env["PATH"] += ":/usr/sbin:/sbin"

    def run(self, *command: str, **env: str) -> str:
        """What the command printed; its error text is part of the exception when it fails."""
        done = subprocess.run(command, env={**self.env, **env}, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stderr}{done.stdout}"
        return done.stdout

    def sbatch(self, *arguments: str, **env: str) -> str:
        return self.run("sbatch", "--parsable", *arguments, **env).strip()

    def job(self, job: str) -> dict[str, str]:
        """`scontrol show job` as a dictionary: JobState, Restarts, NodeList, ..."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: str, *states: str, seconds: float) -> str:
        """The job's state as soon as it is one of these, or its state when the time is over."""
        end = time.monotonic() + seconds
        while (state := self.job(job)["JobState"]) not in states and time.monotonic() < end:
            time.sleep(0.5)
        return state


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@contextmanager
def running() -> Iterator[Cluster]:
    root = Path(tempfile.mkdtemp(prefix="mae-slurm-"))
    root.chmod(0o755)
    cluster = Cluster(root)
    for name in ("munge", "state", *NODES):
        (root / name).mkdir()
    key = root / "munge" / "key-file"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    for path in (root / "munge", key):
        shutil.chown(path, "munge", "munge")
    port, *node_ports = free_ports(3)
    text = CONFIG.format(root=root, host=socket.gethostname(), port=port, nodes=NODES, node_ports=node_ports)
    (root / "slurm.conf").write_text(text)
    added = HOSTS_LINE not in HOSTS.read_text()
    if added:
        HOSTS.write_text(HOSTS.read_text().rstrip("\n") + "\n" + HOSTS_LINE)

    munge = [f"--{name}={root}/munge/{name}" for name in ("socket", "key-file", "pid-file", "log-file", "seed-file")]
    commands = [["setpriv", "--reuid=munge", "--regid=munge", "--clear-groups", "munged", "-F", "--force", *munge]]
    commands += [["slurmctld", "-D"], *(["slurmd", "-D", "-N", node] for node in NODES)]
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            with (root / f"{command[-1] if command[0] == 'slurmd' else command[0]}.log").open("wb") as log:
                daemons.append(subprocess.Popen(command, env=cluster.env, stdout=log, stderr=log))
            time.sleep(1)
        end = time.monotonic() + 30
        while cluster.run("sinfo", "--noheader", "--format=%T %D").split() != ["idle", str(len(NODES))]:
            assert time.monotonic() < end, "\n".join(log.read_text() for log in root.glob("*.log"))
            time.sleep(0.5)
        yield cluster
    finally:
        if len(daemons) == len(commands):
            subprocess.run(["scancel", "--state=RUNNING", "--signal=KILL", "--full"], env=cluster.env, timeout=60)
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(timeout=60)
        if added:
            HOSTS.write_text(HOSTS.read_text().replace(HOSTS_LINE, ""))
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(reason)
    with running() as started:
        yield started
