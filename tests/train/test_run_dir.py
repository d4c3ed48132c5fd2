"""Where a run is to lie and cannot: one line that names it, before the first step."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mae_dist
from mae_dist.data import DataConfig
from mae_dist.engine.world import World
from mae_dist.errors import UserError, machine_fault
from mae_dist.train.alone import alone
from mae_dist.train.options import TrainConfig
from mae_dist.train.run import git_commit

ALONE = World(0, 1, torch.device("cpu"))


@pytest.mark.parametrize("name", ["", "..", ".hidden", "a/b", "a\nb", "a\x00b", "a\x7fb", "\udcff"])
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"train\.name: .* is not a name for a directory"):
        replace(TrainConfig(), name=name).check()


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("file", "is a file, where a directory is to be"),
        ("file/run", "is a file, where a directory is to be"),
        ("link", "is a link to nothing"),
        ("link/run", "is a link to nothing"),
        ("n" * 300, "File name too long"),
        ("/proc/runs/a", "no directory can be made there"),
    ],
)
def test_a_directory_that_cannot_be_is_named(tmp_path: Path, where: str, reason: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(OSError, match=reason) as found, alone(tmp_path / where, ALONE):
        pass
    fault = machine_fault(found.value)
    assert fault and fault.status == 2 and str(fault).count("\n") == 0 and reason in str(fault)
    assert str(tmp_path / where).startswith(str(fault).split(": ")[0]) or where.startswith("/proc")


def test_a_directory_of_any_other_name_is_good(tmp_path: Path) -> None:
    for name in ("with space", "a?b", "a%41b", "é", "#", "n" * 250):
        with alone(tmp_path / name, ALONE):
            assert (tmp_path / name / "run.lock").is_file()


def test_data_is_found_from_another_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = DataConfig(shards="shards/train", val_shards="../val", cache_dir="cache").absolute()
    assert (found.shards, found.cache_dir) == (str(tmp_path / "shards/train"), str(tmp_path / "cache"))
    assert found.val_shards and Path(str(found.val_shards)).parent.samefile(tmp_path.parent)
    kept = DataConfig(shards="s3://bucket/train", val_shards=2)
    assert kept.absolute() == kept and DataConfig(fake=True).absolute() == DataConfig(fake=True)
    listed = DataConfig(shards="train-{000..009}.tar", mode="webdataset")  # what names its data
    assert listed.absolute().shards == listed.shards


def test_too_few_open_files_are_refused_with_the_number(shards: Path) -> None:
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
    code += (
        "from mae_dist.cli import main; sys.argv = ['mae-dist', 'info', sys.argv[1], '--sheet', sys.argv[2]]; main()"
    )
    command = [sys.executable, "-c", code, str(shards), str(shards.parent / "sheet.png")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith(
        "error: at most 64 open files are allowed here, 256 are needed"
    )


def test_the_commit_is_that_of_the_code(tmp_path, monkeypatch):
    """Not that of a user's repository in which it is installed; and changed code is said to be changed."""
    package = tmp_path / "site-packages" / "mae_dist"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.setattr(mae_dist, "__file__", str(package / "__init__.py"))
    monkeypatch.delenv("MAE_DIST_GIT_COMMIT", raising=False)

    def git(*words: str) -> str:
        me = ["-c", "user.name=me", "-c", "user.email=me@here"]
        return subprocess.run(["git", *me, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    git("init", "-q")
    git("commit", "-qm", "theirs", "--allow-empty")
    assert git_commit() is None
    git("add", ".")
    git("commit", "-qm", "ours")
    assert git_commit() == git("rev-parse", "HEAD").strip()
    (package / "__init__.py").write_text("changed = True")
    assert git_commit() == git("rev-parse", "HEAD").strip() + "-dirty"
