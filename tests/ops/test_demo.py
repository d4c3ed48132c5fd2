"""Where the demo may write, and what it deletes: its own things only."""

import pytest

from mae_dist.errors import UserError
from mae_dist.ops import demo


def test_a_second_demo_clears_what_the_first_made_and_nothing_else(tmp_path):
    directory = tmp_path / "deep" / "demo"
    demo.clear(directory)
    for name in ("images/x", "shards/x", "runs/x", "mine"):
        (directory / name).mkdir(parents=True)
    (directory / "reconstruction.png").touch()
    (directory / "notes.txt").touch()
    demo.clear(directory)
    assert sorted(path.name for path in directory.iterdir()) == [".mae_dist_demo", "mine", "notes.txt"]


def test_what_is_somebody_elses_is_refused_untouched(tmp_path, monkeypatch):
    theirs = tmp_path / "demo"
    (theirs / "runs").mkdir(parents=True)
    with pytest.raises(UserError, match="not empty, and not an earlier demo"):
        demo.demo(theirs)
    assert [path.name for path in theirs.iterdir()] == ["runs"]
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file", "file/below", "dangling"):
        with pytest.raises(UserError, match="cannot be used"):
            demo.clear(tmp_path / name)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    demo.clear(tmp_path / "empty")  # the current directory itself


def test_a_command_that_fails_is_named(monkeypatch):
    with pytest.raises(UserError, match=r"ended with status 2: mae-dist shard nowhere out"):
        demo.run(["mae-dist", "shard", "nowhere", "out"])


def test_a_variable_that_would_end_it_later_ends_it_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "3")
    with pytest.raises(UserError, match="MLFLOW_EXPERIMENT_ID"):
        demo.demo(tmp_path / "demo")
    assert not (tmp_path / "demo").exists()
