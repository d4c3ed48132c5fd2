"""A file or directory is there whole or not at all, with the mode that the umask gives."""

import errno
import os
import stat
from pathlib import Path

import pytest

from mae_dist.local import naming, new_directory, write_file


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
def test_modes_follow_the_umask(tmp_path: Path, mask: int):
    before = os.umask(mask)
    try:
        write_file(tmp_path / "file", "text")
        with new_directory(tmp_path / "directory") as aside:
            (aside / "inner").write_bytes(b"1")
            (aside / "inner").chmod(0o600)
    finally:
        os.umask(before)
    for path in (tmp_path / "file", tmp_path / "directory" / "inner"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_an_error_leaves_what_was_there(tmp_path: Path):
    write_file(tmp_path / "file", "old")
    with pytest.raises(UnicodeEncodeError):
        write_file(tmp_path / "file", "\ud800")
    with pytest.raises(RuntimeError), new_directory(tmp_path / "directory") as aside:
        (aside / "inner").write_text("1")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), OSError(errno.EIO, "bad", "/a/x.tmp", None, "/a/x")])
def test_an_error_names_one_file_and_no_more(error: OSError):
    with pytest.raises(OSError) as caught, naming(Path("/a/x"), Path("/a/x.tmp")):
        raise error
    assert str(caught.value).endswith(": '/a/x'")  # no "-> None"


def test_each_is_fsynced_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[str] = []
    fsync, rename, replace = os.fsync, Path.rename, Path.replace

    def name_of(descriptor: int) -> str:
        return Path(f"/proc/self/fd/{descriptor}").readlink().name

    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(f"fsync {name_of(fd)}"), fsync(fd))[1])
    monkeypatch.setattr(Path, "rename", lambda a, b: (calls.append(f"rename {b.name}"), rename(a, b))[1])
    monkeypatch.setattr(Path, "replace", lambda a, b: (calls.append(f"rename {b.name}"), replace(a, b))[1])
    write_file(tmp_path / "file", "1")
    assert [call.split()[0] for call in calls] == ["fsync", "rename", "fsync"] and calls[1] == "rename file"
    assert calls[-1] == f"fsync {tmp_path.name}"
    calls.clear()
    with new_directory(tmp_path / "directory") as aside:
        (aside / "inner").write_text("1")
    kinds = [call if call.endswith("inner") else call.split()[0] for call in calls]
    assert kinds == ["fsync inner", "fsync", "rename", "fsync"]
