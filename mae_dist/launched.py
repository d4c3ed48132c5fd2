"""What a launcher says to the processes it starts, how these end, and on which signals. Imports next to nothing."""

import ctypes
import os
import re
import signal
import sys
from typing import NamedTuple, NoReturn

from mae_dist.errors import UserError

PR_SET_PDEATHSIG = 1
# What schedulers, terminals and limits send to end a job: it saves, and ends with 128 + n.
STOP_SIGNALS = (
    signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGQUIT, signal.SIGXCPU
)  # fmt: skip
PORT = "29500"
SCHEDULERS = {  # rank, size, local rank, local size, as srun and mpirun tell them
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    "mpirun": (
        "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "mpiexec": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}  # fmt: skip
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
OURS = (*NAMES, "LOCAL_SIZE", "PET_NNODES")  # DeepSpeed's word for LOCAL_WORLD_SIZE; what Kubeflow tells torchrun


class Launch(NamedTuple):
    """This process's place among those of a run, as its environment says."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among the processes of this node."""
    local_size: int | None = None
    """Processes on this node; None: not known."""
    host: str = ""
    """Where rank 0 is, and the port where all meet; "" and 0 for a process alone."""
    port: int = 0


def launch() -> Launch:
    """Read torchrun's or DeepSpeed's variables, or srun's or mpirun's where those are not set.

    Raises UserError where they contradict each other or are only a part of what a launcher sets: a process that took
    itself for another one would train beside the run, or keep nothing of it.
    """
    _adopt_scheduler()
    given = {name: os.environ[name] for name in OURS if os.environ.get(name)}
    if not {"RANK", "WORLD_SIZE"} & given.keys():
        harmless = {("LOCAL_RANK", "0"), ("PET_NNODES", "1")}
        stray = [f"{name}={value}" for name, value in given.items() if (name, value) not in harmless]
        if stray:
            raise _refused(f"{stray[0]} is set, but neither RANK nor WORLD_SIZE")
        return Launch()
    for name, other in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
        if name not in given:
            raise _refused(f"{other}={given[other]} is set, but not {name}")
    rank, size = _number(given, "RANK", 0), _number(given, "WORLD_SIZE", 1)
    local_rank = _number(given, "LOCAL_RANK", 0) if "LOCAL_RANK" in given else 0
    local_name = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in given), "")
    local_size = _number(given, local_name, 1) if local_name else None
    if rank >= size:
        raise _refused(f"RANK={rank} is not below WORLD_SIZE={size}")
    if local_rank > rank or (local_size is not None and not local_rank < local_size <= size):
        told = f"{local_name}={local_size}, " if local_name else ""
        raise _refused(f"LOCAL_RANK={local_rank} does not fit {told}RANK={rank}, WORLD_SIZE={size}")
    if size == 1:
        return Launch(local_size=1)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in given:
            raise _refused(f"WORLD_SIZE={size} is set, but not {name}, where its processes meet")
    port = _number(given, "MASTER_PORT", 1)
    if port > 65535:
        raise _refused(f"MASTER_PORT={port} is no port")
    return Launch(rank, size, local_rank, local_size, given["MASTER_ADDR"], port)


def _refused(found: str) -> UserError:
    return UserError(
        f"environment: {found}; a launcher sets all of {', '.join(NAMES)}: start with launch/torchrun.sh or torchrun, "
        f"or for one process write: env {' '.join(f'-u {name}' for name in OURS if name in os.environ)} mae-dist ..."
    )


def _number(given: dict[str, str], name: str, least: int) -> int:
    if not re.fullmatch(r"\d{1,9}", given[name]) or int(given[name]) < least:
        raise _refused(f"{name}={given[name]} is not a whole number from {least}")
    return int(given[name])


def _adopt_scheduler() -> None:
    """Where only srun or mpirun says that this is one of several processes: set what torchrun would have set.

    Raises UserError where they do not say enough.
    """
    if {"RANK", "WORLD_SIZE"} & os.environ.keys():
        return
    for program, names in SCHEDULERS.items():
        rank, size, local_rank, local_size = (os.environ.get(name, "") for name in names)
        if not rank or size in ("", "1"):
            continue
        host, port, nodes = os.environ.get("MASTER_ADDR", ""), PORT, os.environ.get("SLURM_STEP_NODELIST", "")
        if program == "srun":  # its "2(x3),1" are the tasks of each node
            counts = [
                count
                for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", local_size)
                for _ in range(int(times or 1))
            ]
            local_size = dict(enumerate(counts)).get(int(os.environ.get("SLURM_NODEID", 0)), "")
            job, step = (int(os.environ.get(name, 0)) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
            port = str(10000 + (job + 97 * step) % 20000)  # two jobs on one node do not meet
            first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)  # of "gpu[03-04,7],login1"
            host = host or (re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0]) if first else "")
        if local_size == size:
            host = host or "127.0.0.1"
        if not (local_rank and local_size and host):
            raise UserError(
                f"environment: {program} started this process as {rank} of {size} ({names[1]}), but does not say "
                "where rank 0 is: set MASTER_ADDR to its host name, or start one launch/torchrun.sh a node"
            )
        values = (rank, size, local_rank, local_size, host, os.environ.get("MASTER_PORT") or port)
        os.environ.update(zip(NAMES, values, strict=True))
        return


def take_local_rank(arguments: list[str]) -> None:
    """Remove the `--local_rank=N` that the launchers of DeepSpeed and of old torch write first.

    Raises UserError when it is another one than LOCAL_RANK.
    """
    if not (found := re.fullmatch(r"--local[_-]rank=(\d+)", arguments[0] if arguments else "")):
        return
    del arguments[0]
    if os.environ.setdefault("LOCAL_RANK", found[1]) != found[1]:
        raise _refused(f"LOCAL_RANK={os.environ['LOCAL_RANK']} is set, but the launcher wrote {found[0]}")


def rank_or_zero() -> int:
    """This process's rank, for messages: 0 where the environment makes no sense, which `launch` refuses."""
    rank = os.environ.get("RANK", "")
    return int(rank) if rank.isdecimal() else 0


def rank_and_size() -> tuple[int, int]:
    """Of a part of some work that each rank does; (0, 1), all of it, where the environment makes no sense."""
    rank, size = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    known = rank.isdecimal() and size.isdecimal() and int(rank) < int(size)
    return (int(rank), int(size)) if known else (0, 1)


def stop_signals() -> list[signal.Signals]:
    """Those that this process acts on: what nohup or a shell's `&` has taken from the terminal stays ignored."""
    terminal = (signal.SIGHUP, signal.SIGQUIT)
    return [n for n in STOP_SIGNALS if n not in terminal or signal.getsignal(n) is not signal.SIG_IGN]


def leave_signals_to_parent() -> None:
    """In a worker: what is sent to all of a job is the trainer's to act on; a limit on this process is told to it."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGXCPU, lambda number, frame: os.kill(os.getppid(), number))


def end_with_launcher() -> None:
    """Under torchrun or deepspeed: SIGKILL for this process when that dies, however it happens (Linux only).

    An orphan would train on and write into the run beside the attempt that the scheduler starts next. SIGKILL, because
    it may be waiting for a peer that is gone. A process that somebody started by hand has no launcher and stays.
    """
    if {"TORCHELASTIC_RUN_ID", "LOCAL_SIZE"} & os.environ.keys() and sys.platform == "linux":
        launcher = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != launcher:  # it died just before that
            os._exit(128 + signal.SIGKILL)


def leave(status: int) -> NoReturn:
    """Exit. Beside other ranks without the interpreter's clean-up: whatever was to be closed is closed by now.

    After an error no library's clean-up may wait for ranks that are in the middle of something. After the last step a
    thread of the collectives may still drop the last reference to a tensor, for which it asks for the interpreter's
    lock; while the interpreter is going down, that is SIGABRT, "terminate called without an active exception".
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if "WORLD_SIZE" in os.environ:
        os._exit(status)
    sys.exit(status)
