"""Law 4 by recorded file calls: nothing gets a name before its bytes are on the disk, nothing goes before that."""

import errno
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from mae_dist.engine import Snapshot, capture, state_bytes
from mae_dist.engine.base import ParamState
from mae_dist.engine.world import World
from mae_dist.errors import MachineFault
from mae_dist.evaluate.checkpoints import check_weights, newest_of
from mae_dist.train.checkpoint import Checkpoints, committed, read_meta, step_of
from mae_dist.train.saving import Saver

ALONE = World(0, 1, torch.device("cpu"))
NOBODY = 65534
Calls = list[tuple[str, str]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """(call, path) of every fsync, rename and removal of this process, in their order, as they ended."""
    made: Calls = []

    def record(name: str, path_of: Callable[..., str]) -> None:
        original = getattr(os, name)

        def recorded(*args, **kwargs):
            path = path_of(*args)
            result = original(*args, **kwargs)
            made.append((name, path))
            return result

        monkeypatch.setattr(os, name, recorded)

    record("fsync", lambda fd: str(Path(f"/proc/self/fd/{fd}").readlink()))
    for name in ("rename", "replace"):
        record(name, lambda old, new: str(new))
    for name in ("unlink", "rmdir", "remove"):
        record(name, lambda path, *rest: str(path))
    return made


def snapshot(step: int, rank: int = 0, size: int = 1) -> Snapshot:
    return Snapshot({"w": torch.full((9,), float(step))} if rank == 0 else {}, {"m": torch.ones(3)}, rank, size, "")


class Engine:
    """Of one parameter."""

    world, shapes, optimizer_state = ALONE, {"w": (9,)}, ("exp_avg", "exp_avg_sq")

    def gather(self, name: str) -> ParamState:
        return ParamState(torch.ones(9), {"exp_avg": torch.ones(9), "exp_avg_sq": torch.ones(9)})

    def counters(self) -> dict:
        return {}


def first(calls: Calls, kind: str, ending: str) -> int:
    """Where the first such call stands; all of them must have been made."""
    found = [i for i, (name, path) in enumerate(calls) if name in kind.split() and path.endswith(ending)]
    assert found, f"no {kind} of {ending}: {calls}"
    return found[0]


@pytest.mark.parametrize("ranks", [1, 2])
def test_bytes_then_list_then_name_then_retention(tmp_path: Path, calls: Calls, ranks: int) -> None:
    made = [Checkpoints(tmp_path / "run" / "checkpoints", ALONE, keep=1) for _ in range(ranks)]
    for rank, checkpoints in enumerate(made):
        checkpoints.world, checkpoints.attempt = World(rank, ranks, ALONE.device), made[0].attempt
    assert {("fsync", str(tmp_path)), ("fsync", str(tmp_path / "run"))} <= set(calls)  # the directories' own names
    for step in (1, 2):
        calls.clear()
        for rank in reversed(range(ranks)):
            made[rank].write_share(step, snapshot(step, rank, ranks))
        made[0].commit(step, {}, threading.Event(), 30)
        made[0].retire()
    root, aside = tmp_path / "run" / "checkpoints", made[0].aside(2).name
    listed = first(calls, "rename replace", "meta.json")
    named = first(calls, "rename replace", "step-00000002")
    for name in read_meta(root / "step-00000002")["files"]:
        assert first(calls, "fsync", f"{aside}/{name}") < listed
    assert any(name == "fsync" and "meta.json" in path for name, path in calls[:listed])
    assert any(call == ("fsync", str(root / aside)) for call in calls[listed:named]), "the directory's names"
    kept = calls.index(("fsync", str(root)), named)
    gone = first(calls, "rename replace", ".old-step-00000001")
    assert listed < named < kept < gone
    assert not [c for c in calls[:kept] if c[0] in ("unlink", "rmdir", "remove") and "step-00000001" in c[1]]
    assert committed(root) == [root / "step-00000002"]


def test_when_the_last_save_returns_all_of_it_is_done(tmp_path: Path, calls: Calls) -> None:
    saver = Saver(Checkpoints(tmp_path / "c", ALONE, 3), partial(capture, Engine()), state_bytes(Engine()))  # type: ignore[arg-type]
    saver.save(7, {}, wait=True)
    named = first(calls, "rename replace", "step-00000007")
    assert ("fsync", str(tmp_path / "c")) in calls[named:]


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_a_checkpoint_has_the_modes_of_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        checkpoints = Checkpoints(tmp_path / "c", ALONE, keep=1)
        checkpoints.write_share(1, snapshot(1))
        checkpoints.commit(1, {}, threading.Event(), 30)
    finally:
        os.umask(before)
    files = list((tmp_path / "c" / "step-00000001").iterdir())
    assert len(files) == 3 and {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~mask}


@pytest.fixture
def root() -> Iterator[Path]:
    """Two checkpoints where any user may look."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    checkpoints = Checkpoints(folder / "checkpoints", ALONE, keep=9)
    for step in (4, 8):
        checkpoints.write_share(step, snapshot(step))
        checkpoints.commit(step, {}, threading.Event(), 30)
    yield folder / "checkpoints"
    folder.chmod(0o755)
    shutil.rmtree(folder)


@pytest.fixture
def nobody() -> Iterator[None]:
    """For root, the test is another user; others take away their own rights."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(NOBODY)
    yield
    os.seteuid(before)


@pytest.mark.parametrize("what", ["model.safetensors", "meta.json", "optimizer-00000-of-00001.safetensors", ".", ".."])
def test_what_may_not_be_read_is_not_damaged(root: Path, what: str, request: pytest.FixtureRequest) -> None:
    (root / "step-00000008" / what).resolve().chmod(0)
    checkpoints = Checkpoints(root, ALONE, keep=9)
    request.getfixturevalue("nobody")
    with pytest.raises(MachineFault, match=r"(checkpoints|step-00000008).*: Permission denied") as found:
        checkpoints.newest()
    assert found.value.status == 2
    with pytest.raises(OSError, match="Permission denied"):
        check_weights(newest_of(root.parent)) if what in ("model.safetensors", "meta.json") else committed(root / "x")
        (root / "step-00000008" / what).open()
    os.seteuid(os.getuid())
    for path in (root, root / "step-00000008"):
        path.chmod(0o755)
    assert sorted(p.name for p in root.iterdir()) == ["step-00000004", "step-00000008"]


@pytest.mark.parametrize(("number", "status"), [(errno.EIO, 75), (errno.ESTALE, 75), (errno.ENOMEM, 75)])
def test_a_disk_that_fails_for_a_moment_costs_no_checkpoint(
    root: Path, monkeypatch: pytest.MonkeyPatch, number: int, status: int
) -> None:
    """No disk here fails on demand, so the call that reads the bytes does."""

    def failing(*args):  # a read, unlike an open, does not say of which file
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr("mae_dist.train.checkpoint.hashlib.file_digest", failing)
        with pytest.raises(MachineFault, match=r"step-00000008/\S+\.safetensors: ") as found:
            Checkpoints(root, ALONE, keep=9).newest()
    assert found.value.status == status
    newest = Checkpoints(root, ALONE, keep=9).newest()
    assert newest and step_of(newest) == 8


def test_without_descriptors_nothing_is_set_aside(root: Path) -> None:
    code = """
import os, sys
from pathlib import Path
import torch
from mae_dist.engine.world import World
from mae_dist.errors import MachineFault
from mae_dist.train.checkpoint import Checkpoints
checkpoints = Checkpoints(Path(sys.argv[1]), World(0, 1, torch.device("cpu")), 9)
held = []
try:
    while True:
        held.append(os.open("/", os.O_RDONLY))
except OSError:
    pass
try:
    checkpoints.newest()
except MachineFault as error:
    os.close(held.pop())
    print(error.status, error)
"""
    done = subprocess.run([sys.executable, "-c", code, str(root)], capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("75 ") and "Too many open files; raise the limit" in done.stdout, done.stderr
    assert sorted(p.name for p in root.iterdir()) == ["step-00000004", "step-00000008"]
