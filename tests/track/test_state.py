"""What is sent next: nothing lost and nothing twice, whatever is cut, replayed, or forgotten between two saves."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mae_dist.track import journal
from mae_dist.track.journal import Journal
from mae_dist.track.state import BATCH_METRICS, NONFINITE_KEY, Batch, Point, State, clean, unsent

pytestmark = pytest.mark.usefixtures("quick_disk")


class Reader:
    """A shipper without MLflow: `sent` is what a server would have."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.sent: list[Point] = []

    def poll(self, dies: bool = False) -> list[Batch]:
        """Send all there is; one that `dies` does so between sending its first batch and remembering it."""
        state, batches = State.load(self.run_dir), []
        with (self.run_dir / journal.FILE_NAME).open("rb") as file:
            state.seek(file)
            lines = journal.whole_lines(file)
            while state.batch or state.gather(lines):
                assert state.batch is not None
                state.save(self.run_dir)
                self.sent += [point for point in state.batch.points if point not in self.sent]  # as MLflow does
                batches.append(state.batch)
                if dies:
                    return batches
                state.batch = None
                state.save(self.run_dir)
        return batches


def value(key: str, step: int) -> float:
    """A resumed run is deterministic."""
    return hash((key, step)) % 1000 / 7


def write_step(opened: Journal, step: int) -> None:
    opened.write({"kind": "metrics", "step": step, "metrics": {"loss/train": value("loss/train", step)}})
    if step % 3 == 0:  # a second record of the same step, written later
        opened.write({"kind": "metrics", "step": step, "metrics": {"knn": value("knn", step), "bad": math.nan}})


actions = st.lists(
    st.tuples(st.sampled_from(["steps", "poll", "die", "resume", "checkpoint"]), st.integers(1, 6)), max_size=25
)


@given(plan=actions)
def test_every_point_once_through_any_history(tmp_path_factory: pytest.TempPathFactory, plan: list) -> None:
    run_dir = tmp_path_factory.mktemp("run")
    reader, opened = Reader(run_dir), Journal(run_dir / journal.FILE_NAME)
    opened.write({"kind": "start", "step": 0})
    step = saved = 0
    attempts, furthest = 1, 0
    for action, number in plan:
        if action == "steps":
            for _ in range(number):
                step += 1
                write_step(opened, step)
            furthest = max(furthest, step)
        elif action == "checkpoint":
            saved = step
        elif action == "resume":
            opened.close()
            opened = Journal(run_dir / journal.FILE_NAME)
            opened.cut(saved)
            step = saved
            opened.write({"kind": "start", "step": step})
            attempts += 1
            reader.poll()
        else:
            reader.poll(dies=action == "die")
    for rest in range(step + 1, furthest + 1):
        write_step(opened, rest)
    opened.close()
    reader.poll()
    reader.poll()
    expected = [("loss/train", step) for step in range(1, furthest + 1)]
    expected += [("knn", step) for step in range(3, furthest + 1, 3)]
    found = [(point.key, point.step) for point in reader.sent if point.key in ("loss/train", "knn")]
    assert sorted(found) == sorted(expected)
    assert all(
        point.value == value(point.key, point.step) for point in reader.sent if (point.key, point.step) in expected
    )
    counted = [point.value for point in reader.sent if point.key == NONFINITE_KEY]
    assert counted == list(range(1, furthest // 3 + 1))
    assert [point.value for point in reader.sent if point.key == "progress/attempt"] == list(range(1, attempts + 1))
    assert unsent(run_dir) == 0


def test_batches_are_small_and_end_between_records(tmp_path: Path) -> None:
    opened = Journal(tmp_path / journal.FILE_NAME)
    for step in range(200):
        opened.write({"kind": "metrics", "step": step, "metrics": {f"m{i}": 0.0 for i in range(7)}})
    opened.close()
    assert unsent(tmp_path) == 200
    batches = Reader(tmp_path).poll()
    assert sum(len(batch.points) for batch in batches) == 1400
    assert all(BATCH_METRICS <= len(batch.points) < BATCH_METRICS + 7 for batch, _ in pairwise(batches))
    assert unsent(tmp_path) == 0


def test_params_and_tags_are_those_of_the_last_start(tmp_path: Path) -> None:
    opened = Journal(tmp_path / journal.FILE_NAME)
    opened.write({"kind": "start", "step": 0, "params": {"lr": 1}, "tags": {"host": "a", "gone": None}})
    opened.write({"kind": "start", "step": 5, "params": {"lr": 2, "new": 3}, "tags": {"host": "b"}})
    opened.close()
    (batch,) = Reader(tmp_path).poll()
    assert batch.params == {"lr": "2", "new": "3"}
    assert batch.tags == {"host": "b", "mae_dist.attempts": "2"}


def test_records_nobody_can_read_are_named_and_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened = Journal(tmp_path / journal.FILE_NAME)
    opened.write({"kind": "metrics", "metrics": {"a": 1}})
    opened.write({"kind": "metrics", "step": 1, "metrics": {"a": 10**400}})
    opened.write({"kind": "metrics", "step": 2, "metrics": None})
    opened.write({"kind": "some new kind", "step": 2})
    opened.write({"kind": "metrics", "step": 3, "metrics": {"a": 1, "b": "text", "c": None}})
    opened.close()
    reader = Reader(tmp_path)
    reader.poll()
    assert [(point.key, point.value) for point in reader.sent] == [("a", 1.0), (NONFINITE_KEY, 2.0)]
    assert capsys.readouterr().out.count("not a record for MLflow") == 3


@pytest.mark.parametrize(
    ("end", "status"),
    [
        ("FINISHED", "FINISHED"),
        ("killed", "KILLED"),
        ("FAILED", "FAILED"),
        ("SCHEDULED", "SCHEDULED"),
        ("what", "FAILED"),
        (None, "FAILED"),
    ],
)
def test_status_of_an_end(tmp_path: Path, end: str | None, status: str) -> None:
    state = State(end={"status": end, "reason": None, "time": 1.0}, died=2.0)
    assert state.wanted() == (status, status.lower(), 1.0)


def test_a_state_that_cannot_be_read_starts_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = State(run_id="abc", steps={"a": 3}, died=1.5)
    state.save(tmp_path)
    assert State.load(tmp_path) == state
    (tmp_path / "mlflow.json").write_text("{")
    assert State.load(tmp_path).run_id == ""
    assert "sent again as a new one" in capsys.readouterr().out


@given(name=st.text(max_size=300))
def test_clean_names_are_what_mlflow_takes(name: str) -> None:
    from mlflow.utils.validation import _validate_metric_name, _validate_param_name, _validate_tag_name

    for validate in (_validate_metric_name, _validate_param_name, _validate_tag_name):
        validate(clean(name))
    assert len(clean(name)) <= 250
    assert clean(clean(name)) == clean(name)


@pytest.mark.parametrize("name", ["loss/train", "perf/images per second", "sys/gpu_0:power", "a.b-c"])
def test_usual_names_stay(name: str) -> None:
    assert clean(name) == name
