"""What MLflow shows as one run is one journal of one directory: never two trainings, never two directories."""

import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from mae_dist.track import journal
from mae_dist.track.journal import Journal
from mae_dist.track.mlflow import sync
from mae_dist.track.place import PARENT
from mae_dist.track.state import State
from tests.track.conftest import end_run, start_run

pytestmark = pytest.mark.usefixtures("quick_disk")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs directory with one sqlite store for all runs in it."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def run_dir(runs: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    made = runs / request.node.name.removeprefix("test_")
    made.mkdir()
    yield made
    shutil.rmtree(made, ignore_errors=True)


def sent(run_dir: Path) -> Run:
    """The run in MLflow of a directory, after everything was sent."""
    summary = sync(run_dir)
    assert summary.error is None and summary.unsent == 0
    return client(run_dir).get_run(summary.run_id)


def client(run_dir: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{run_dir.parent / 'mlflow.db'}")


def curve(run_dir: Path, run: Run, key: str = "loss/train") -> dict[int, float]:
    points = client(run_dir).get_metric_history(run.info.run_id, key)
    assert len({point.step for point in points}) == len(points)
    return {point.step: point.value for point in points}


def written(run_dir: Path, key: str = "loss/train") -> dict[int, float]:
    records = journal.read(run_dir / journal.FILE_NAME)
    return {r["step"]: r["metrics"][key] for r in records if key in r.get("metrics", {})}


def steps(opened: Journal, first: int, last: int, slope: float = 1.0) -> None:
    for step in range(first, last + 1):
        metrics = {"loss/train": slope / step, "perf/x": float(os.urandom(1)[0])}
        opened.write({"kind": "metrics", "step": step, "metrics": metrics})


def train(run_dir: Path, first: int, last: int, slope: float = 1.0, **start: object) -> Run:
    """One attempt, from step `first` on."""
    opened = start_run(run_dir, step=first, **start)
    steps(opened, first + 1, last, slope)
    end_run(opened)
    return sent(run_dir)


def test_steps_done_again_alike_stay_one_run(run_dir: Path) -> None:
    first = train(run_dir, 0, 30)
    again = train(run_dir, 10, 40, 1 + 1e-7)  # as much as another number of processes rounds otherwise
    assert again.info.run_id == first.info.run_id
    assert sorted(curve(run_dir, again)) == list(range(1, 41))


@pytest.mark.parametrize(
    ("slope", "start"),
    [(2.0, {}), (1.0, {"identity": "other"}), (1.0, {"params": {"lr": 0.2}})],
    ids=["numbers", "settings", "params"],
)
def test_another_training_is_another_run(run_dir: Path, slope: float, start: dict) -> None:
    """The new one has the whole journal and the params of now; the old one stays, and says where it goes on."""
    old = train(run_dir, 0, 30, identity="first", params={"lr": 0.1})
    before = curve(run_dir, old)
    new = train(run_dir, 10, 20, slope, **({"identity": "first", "params": {"lr": 0.1}} | start))
    assert new.info.run_id != old.info.run_id
    assert curve(run_dir, new) == written(run_dir) and max(written(run_dir)) == 20
    assert new.data.params["lr"] == str({"lr": 0.1, **start.get("params", {})}["lr"])
    assert new.data.tags["mae_dist.follows"] == old.info.run_id and new.data.tags["mae_dist.why"]
    old = client(run_dir).get_run(old.info.run_id)
    assert curve(run_dir, old) == before and old.data.params["lr"] == "0.1"
    assert old.data.tags["mae_dist.followed_by"] == new.info.run_id and old.info.status == "FINISHED"
    assert train(run_dir, 15, 25, slope, **start).info.run_id == new.info.run_id  # alike again


def test_a_run_of_which_nothing_was_sent_yet_shows_its_last_start(run_dir: Path) -> None:
    for identity, lr in (("a", 0.1), ("b", 0.2)):
        opened = start_run(run_dir, step=0, identity=identity, params={"lr": lr})
        steps(opened, 1, 5, lr)
        end_run(opened)
    run = sent(run_dir)
    assert run.data.params == {"lr": "0.2"} and curve(run_dir, run) == written(run_dir)
    assert "mae_dist.follows" not in run.data.tags


def test_a_number_that_was_none_and_a_point_that_was_not_there(run_dir: Path) -> None:
    """MLflow has no point there: what the journal says now can only be shown by another run."""
    opened = start_run(run_dir)
    for step, loss in enumerate((0.5, float("nan"), 0.25), 1):
        opened.write({"kind": "metrics", "step": step, "metrics": {"loss/val": loss}})
    opened.close()
    old = sent(run_dir)
    opened = start_run(run_dir)
    for step, loss in enumerate((0.5, 0.4, 0.25), 1):
        opened.write({"kind": "metrics", "step": step, "metrics": {"loss/val": loss}})
    opened.close()
    new = sent(run_dir)
    assert new.info.run_id != old.info.run_id
    assert curve(run_dir, new, "loss/val") == {1: 0.5, 2: 0.4, 3: 0.25}
    assert client(run_dir).get_run(old.info.run_id).info.status == "KILLED"  # it was running


def test_the_first_mean_of_an_attempt_may_be_over_fewer_steps(run_dir: Path) -> None:
    """Logged every 20 steps, saved at 30: the mean of 31 to 40 is not that of 21 to 40; the next one is compared."""

    def attempt(first: int, losses: dict[int, float]) -> Run:
        opened = start_run(run_dir, step=first)
        for step, loss in losses.items():
            opened.write({"kind": "metrics", "step": step, "metrics": {"loss/train": loss, "optim/lr": 1.0}})
        opened.close()
        return sent(run_dir)

    old = attempt(0, {20: 1.0, 40: 0.5, 60: 0.4})
    assert attempt(30, {40: 0.45, 60: 0.4, 80: 0.3}).info.run_id == old.info.run_id
    assert attempt(30, {40: 0.45, 60: 0.41, 80: 0.3}).info.run_id != old.info.run_id


def test_a_killed_shipper_makes_the_new_run_once(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = train(run_dir, 0, 30)
    opened = start_run(run_dir, step=10)
    steps(opened, 11, 20, 2.0)
    end_run(opened)
    create = MlflowClient.create_run

    def lost(*args: object, **more: object) -> None:
        create(*args, **more)  # type: ignore[arg-type]
        raise ConnectionError("the answer got lost")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "create_run", lost)
        assert sync(run_dir, tries=1).error
    new = sent(run_dir)
    followers = client(run_dir).search_runs(["1"], f"tags.\"mae_dist.follows\" = '{old.info.run_id}'")
    assert [run.info.run_id for run in followers] == [new.info.run_id]
    assert client(run_dir).get_run(old.info.run_id).data.tags["mae_dist.followed_by"] == new.info.run_id


def test_a_copy_gets_a_run_of_its_own(run_dir: Path) -> None:
    first = train(run_dir, 0, 30)
    copy = Path(shutil.copytree(run_dir, f"{run_dir}-2"))
    second = train(copy, 30, 40, 3.0)
    assert second.info.run_id != first.info.run_id and second.data.tags["mae_dist.copy_of"] == first.info.run_id
    assert curve(copy, second) == written(copy)
    assert train(run_dir, 30, 35).info.run_id == first.info.run_id
    assert curve(run_dir, first) == written(run_dir)
    assert train(copy, 40, 41, 3.0).info.run_id == second.info.run_id


def test_a_copy_of_what_was_never_sent(run_dir: Path) -> None:
    """The key of the run to be is copied too."""
    opened = start_run(run_dir)
    steps(opened, 1, 3)
    end_run(opened)
    State().save(run_dir)
    copy = Path(shutil.copytree(run_dir, f"{run_dir}-2"))
    assert sent(run_dir).info.run_id != sent(copy).info.run_id


def test_a_moved_run_keeps_its_run(run_dir: Path) -> None:
    first = train(run_dir, 0, 30)
    moved = run_dir.rename(f"{run_dir}-moved")
    assert train(moved, 20, 40).info.run_id == first.info.run_id
    other = train(run_dir, 0, 5)  # a new run under the old name
    assert other.info.run_id != first.info.run_id
    assert sent(moved).data.tags["mae_dist.run_dir"] == str(moved)


def test_a_run_put_back_from_a_copy_or_from_before_there_were_holders_keeps_its_run(run_dir: Path) -> None:
    first = train(run_dir, 0, 30)
    backup = Path(shutil.copytree(run_dir, f"{run_dir}-backup"))
    shutil.rmtree(run_dir)
    shutil.copytree(backup, run_dir)
    assert train(run_dir, 20, 40).info.run_id == first.info.run_id
    state = json.loads((run_dir / "mlflow.json").read_text())
    del state["holder"]
    (run_dir / "mlflow.json").write_text(json.dumps(state | {"params": ["lr"]}))
    client(run_dir).delete_tag(first.info.run_id, "mae_dist.holder")
    assert train(run_dir, 40, 50).info.run_id == first.info.run_id


def test_two_directories_that_cannot_see_each_other(run_dir: Path) -> None:
    """Both at paths the other does not know (another mount, another machine): the second to come has another run."""
    train(run_dir, 0, 30)
    elsewhere = Path(shutil.copytree(run_dir, f"{run_dir}-elsewhere"))
    moved = run_dir.rename(f"{run_dir}-moved")
    assert sent(moved).info.run_id != sent(elsewhere).info.run_id


@pytest.mark.parametrize("seed", range(3))
def test_no_two_directories_ever_share_a_run(run_dir: Path, seed: int) -> None:
    """Copied, moved, deleted and sent in any order, each journal its own numbers."""
    draw = random.Random(seed)
    alive, count = [run_dir / "0"], 1
    (run_dir / "mlflow.db").symlink_to(run_dir.parent / "mlflow.db")
    train(alive[0], 0, 3, 1.0)
    for _ in range(14):
        chosen, new = draw.choice(alive), run_dir / str(count)
        action = draw.choice(["copy", "copy", "move", "delete", "send", "swap"])
        if action == "copy":
            alive.append(Path(shutil.copytree(chosen, new)))
        elif action == "move":
            alive[alive.index(chosen)] = chosen.rename(new)
        elif action == "swap":  # a copy takes the original's name
            alive[alive.index(chosen)] = chosen.rename(new)
            alive.append(Path(shutil.copytree(new, chosen)))
        elif action == "delete" and len(alive) > 1:
            shutil.rmtree(chosen)
            alive.remove(chosen)
        elif action == "send":
            sync(chosen)
        count += 1
    ids = [sync(path).run_id for path in alive]
    ids = [sync(path).run_id for path in alive]
    assert len(set(ids)) == len(alive)


def test_an_evaluation_in_a_copied_run_belongs_to_the_copy(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{run_dir.parent / 'mlflow.db'}")
    parent = train(run_dir, 0, 3)
    copy = Path(shutil.copytree(run_dir, f"{run_dir}-2"))
    child = copy / "evaluations" / "probe"
    opened = start_run(child, tags={PARENT: str(copy)})
    end_run(opened)
    nested = client(copy).get_run(sync(child).run_id).data.tags["mlflow.parentRunId"]
    assert nested == State.load(copy).run_id != parent.info.run_id
