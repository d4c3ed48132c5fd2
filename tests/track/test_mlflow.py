"""The copy in MLflow equals the journal, whatever fails in between, and training never waits for it."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from mae_dist.errors import UserError
from mae_dist.track import TrackConfig, journal
from mae_dist.track.mlflow import MLflowTracker, Shipper, follow, sync, ui_command
from mae_dist.track.state import END_REASON_DIED, State, unsent
from tests.track.conftest import Server, end_run, start_run, write_picture, write_steps

TRAINER = """
    import sys, time
    from pathlib import Path
    sys.path.insert(0, sys.argv[3])
    from tests.track.conftest import end_run, start_run, write_picture, write_steps
    from mae_dist.track import TrackConfig
    from mae_dist.track.mlflow import MLflowTracker

    run_dir, first, last, ends = Path(sys.argv[1]), *map(int, sys.argv[2].split(",")), sys.argv[4]
    tracker = MLflowTracker.start(run_dir, TrackConfig())
    opened = start_run(run_dir, step=first)
    write_steps(opened, first + 1, last)
    write_picture(opened, last)
    print(tracker.process.pid, flush=True)
    if ends == "never":
        time.sleep(600)
    end_run(opened)
    tracker.close(60)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs directory with one sqlite store for all runs in it."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def run_dir(runs: Path, request: pytest.FixtureRequest) -> Path:
    made = runs / request.node.name.removeprefix("test_")
    made.mkdir()
    return made


def client_of(run_dir: Path) -> MlflowClient:
    return MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run_dir.parent / 'mlflow.db'}")


def run_of(run_dir: Path) -> Run:
    return client_of(run_dir).get_run(State.load(run_dir).run_id)


def history(run_dir: Path, key: str) -> list[tuple[int, float]]:
    """(step, value) of every stored point, by step."""
    points = client_of(run_dir).get_metric_history(State.load(run_dir).run_id, key)
    return sorted((point.step, point.value) for point in points)


def listed(run_dir: Path, folder: str = "") -> list[str]:
    return [info.path for info in client_of(run_dir).list_artifacts(State.load(run_dir).run_id, folder)]


def pictures(run_dir: Path) -> list[str]:
    """Names of the stored full-size pictures."""
    return [name for name in listed(run_dir, "images") if name.endswith(".png")]


def check_copy(run_dir: Path, last: int, status: str = "FINISHED", number_of_pictures: int = 1) -> Run:
    """The run in MLflow is the journal's: each step 1..last once."""
    assert history(run_dir, "loss/train") == [(step, 1 / (step + 1)) for step in range(1, last + 1)]
    assert history(run_dir, "perf/speed") == [(step, step * 7.0) for step in range(1, last + 1)]
    assert len(pictures(run_dir)) == number_of_pictures
    assert "config.yaml" in listed(run_dir)
    run = run_of(run_dir)
    assert run.info.status == status
    assert run.info.run_name == run_dir.name
    assert run.data.params == {"lr": "0.1"}
    assert run.data.tags["mlflow.source.git.commit"] == "0" * 40
    assert run.data.tags["mlflow.user"]
    assert run.data.tags["mlflow.source.name"] == "mae-dist"
    assert unsent(run_dir) == 0
    return run


def wait_for(done: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def trainer(run_dir: Path, first: int, last: int, ends: str = "well") -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", textwrap.dedent(TRAINER), str(run_dir), f"{first},{last}"]
    command += [str(Path(__file__).parents[2]), ends]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.dist
def test_a_server_that_comes_up_late_gets_everything(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.environ["MLFLOW_TRACKING_URI"] = server.url
    run_dir = tmp_path / "run"
    began = time.monotonic()
    tracker = MLflowTracker.start(run_dir, TrackConfig())
    process = tracker.process
    assert process is not None
    opened = start_run(run_dir)
    write_steps(opened, 1, 400)
    write_picture(opened, 400)
    end_run(opened)
    assert time.monotonic() - began < 5  # the trainer noticed nothing
    tracker.close(0.5)
    assert time.monotonic() - began < 7
    assert f"mae-dist sync {run_dir}" in capsys.readouterr().err
    wait_for(lambda: "tried again" in (run_dir / "logs/mlflow.log").read_text())
    assert "another process" in str(sync(run_dir))
    server.start()
    assert process.wait(60) == 0
    run = check_copy(run_dir, 400)
    assert run.data.tags["mae_dist.end"] == "all steps done"
    assert client_of(run_dir).get_experiment(run.info.experiment_id).artifact_location.startswith("mlflow-artifacts:")
    assert "progress/attempt" in run.data.metrics
    assert ui_command(run_dir) == server.url


@pytest.mark.dist
def test_a_killed_trainer_is_said_to_be_dead_and_resumes(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = trainer(run_dir, 0, 30, ends="never")
    assert process.stdout is not None
    shipper = int(process.stdout.readline())
    wait_for(lambda: State.load(run_dir).settled.startswith("RUNNING"))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(shipper, number)  # as a scheduler does to everything
    os.killpg(process.pid, signal.SIGKILL)
    wait_for(lambda: State.load(run_dir).settled.startswith("FAILED"))
    process.wait()
    process.stdout.close()
    run = check_copy(run_dir, 30, "FAILED")
    assert run.data.tags["mae_dist.end"] == END_REASON_DIED

    process = trainer(run_dir, 20, 50)
    process.communicate(timeout=90)
    run = check_copy(run_dir, 50, number_of_pictures=2)
    assert run.data.tags["mae_dist.attempts"] == "2"
    assert history(run_dir, "progress/attempt") == [(0, 1.0), (20, 2.0)]
    assert [run.info.run_name for run in client_of(run_dir).search_runs(["1"])] == ["run"]
    assert (
        ui_command(run_dir) == ui_command(tmp_path) == f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/mlflow.db"
    )
    assert (tmp_path / "mlartifacts" / run.info.run_id / "artifacts/config.yaml").is_file()


def test_a_store_whose_making_was_killed_is_made_anew(tmp_path: Path) -> None:
    opened = start_run(tmp_path / "a")
    write_steps(opened, 1, 3)
    end_run(opened)
    (tmp_path / "mlflow.new").write_bytes(b"half a database")
    summary = sync(tmp_path / "a")
    assert (summary.status, summary.unsent, summary.error) == ("FINISHED", 0, None)
    assert not (tmp_path / "mlflow.new").exists()


@pytest.mark.dist
def test_several_shippers_on_a_fresh_store(tmp_path: Path) -> None:
    for name in "ab":
        opened = start_run(tmp_path / name)
        write_steps(opened, 1, 20)
        write_picture(opened, 20)
        end_run(opened)
    command = [sys.executable, "-m", "mae_dist.track.mlflow"]
    started = [subprocess.Popen([*command, str(tmp_path / name)], stdout=subprocess.DEVNULL) for name in "ab"]
    assert [process.wait(90) for process in started] == [0, 0]
    for name in "ab":
        check_copy(tmp_path / name, 20)
    assert len(client_of(tmp_path / "a").search_runs(["1"])) == 2


@pytest.mark.dist
def test_a_server_that_never_answers_holds_nobody(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        tracker = MLflowTracker.start(tmp_path, TrackConfig(tracking_uri=uri, close_timeout=3))
        process = tracker.process
        assert process is not None
        end_run(start_run(tmp_path))
        began = time.monotonic()
        tracker.close()
        assert 2.9 < time.monotonic() - began < 5
        assert "MLflow: 2 records not sent yet, which is tried for another minute" in capsys.readouterr().err
        process.kill()
        process.wait()


def test_killed_run(run_dir: Path) -> None:
    opened = start_run(run_dir)
    write_steps(opened, 1, 5)
    write_picture(opened, 5)
    end_run(opened, "KILLED", "SIGUSR1: out of time")
    summary = sync(run_dir)
    assert (summary.status, summary.records, summary.unsent, summary.error) == ("KILLED", 8, 0, None)
    assert "MLflow has everything" in str(summary)
    run = check_copy(run_dir, 5, "KILLED")
    assert run.data.tags["mae_dist.end"] == "SIGUSR1: out of time"
    times = [record["time"] for record in journal.read(run_dir / journal.FILE_NAME)]
    assert (run.info.start_time, run.info.end_time) == (int(times[0] * 1000), int(times[-1] * 1000))
    assert sync(run_dir).records == 0


def test_a_cut_and_replayed_journal_is_there_once(run_dir: Path) -> None:
    opened = start_run(run_dir)
    write_steps(opened, 1, 1200)
    write_picture(opened, 600)
    sync(run_dir)
    assert State.load(run_dir).step == 1200
    opened.close()
    opened = start_run(run_dir, step=500)
    write_steps(opened, 501, 900)
    assert sync(run_dir).status == "RUNNING"  # half replayed: nothing of it is new
    write_picture(opened, 600)
    write_steps(opened, 901, 1500)
    end_run(opened)
    sync(run_dir)
    run = check_copy(run_dir, 1500)
    assert run.data.tags["mae_dist.attempts"] == "2"


def test_what_is_not_a_number_is_counted(run_dir: Path) -> None:
    opened = start_run(run_dir)
    for step, loss in enumerate([0.5, float("nan"), float("inf"), 0.25], 1):
        opened.write({"kind": "metrics", "step": step, "metrics": {"loss/train": loss, "lr": 0.1}})
    end_run(opened)
    sync(run_dir)
    assert history(run_dir, "loss/train") == [(1, 0.5), (4, 0.25)]
    assert history(run_dir, "health/nonfinite") == [(2, 1.0), (3, 2.0)]
    assert len(history(run_dir, "lr")) == 4


def test_a_dead_store_ends_a_sync_and_loses_nothing(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    monkeypatch.setattr("mae_dist.track.mlflow.POLL_S", 0.1)
    monkeypatch.setattr("mae_dist.track.mlflow.BACKOFF_S", 0.1)
    opened = start_run(run_dir)
    write_steps(opened, 1, 5)
    write_picture(opened, 5)
    dead = TrackConfig(tracking_uri="http://127.0.0.1:9")
    summary = sync(run_dir, dead, tries=2)
    assert (summary.unsent, summary.records) == (7, 0)
    assert "refused" in str(summary)
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert not follow(Shipper(run_dir, dead), gone.pid, patience=0.3)
    summary = sync(run_dir)  # with the store that is there; the follower has left word that the process died
    assert summary.error is None
    assert check_copy(run_dir, 5, "FAILED").data.tags["mae_dist.end"] == END_REASON_DIED


def test_a_journal_silent_for_long_is_a_dead_run(run_dir: Path) -> None:
    opened = start_run(run_dir)
    opened.close()
    assert sync(run_dir).status == "RUNNING"
    os.utime(opened.path, (time.time() - 3600, time.time() - 3600))
    assert sync(run_dir).status == run_of(run_dir).info.status == "FAILED"
    end_run(start_run(run_dir))
    assert sync(run_dir).status == run_of(run_dir).info.status == "FINISHED"


def loses_one_answer(name: str, lost: list[str]) -> Callable[..., Any]:
    """The client's method `name`, whose first call does its work and then fails; of `log_batch` each kind."""
    call = getattr(MlflowClient, name)

    def wrapped(*args: Any, **more: Any) -> Any:
        answer = call(*args, **more)
        kind = f"{name} {' '.join(more.keys() & {'metrics', 'params', 'tags'}) if name == 'log_batch' else ''}"
        if kind not in lost:
            lost.append(kind)
            raise ConnectionError(f"{name}: the answer got lost")
        return answer

    return wrapped


def test_answers_that_get_lost(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow did it, but said otherwise: of every kind of call, the first one."""
    opened = start_run(run_dir)
    write_steps(opened, 1, 5)
    write_picture(opened, 5)
    end_run(opened)
    lost: list[str] = []
    for name in ("create_experiment", "create_run", "log_batch", "log_artifact", "log_image", "set_terminated"):
        monkeypatch.setattr(MlflowClient, name, loses_one_answer(name, lost))
    monkeypatch.setattr("mae_dist.track.mlflow.POLL_S", 0.01)
    assert sync(run_dir, TrackConfig(experiment="lossy"), tries=2).error is not None
    assert sync(run_dir, TrackConfig(experiment="lossy"), tries=12).error is None
    assert len(lost) == 8
    check_copy(run_dir, 5)
    experiment = client_of(run_dir).get_experiment_by_name("lossy")
    assert experiment is not None
    assert len(client_of(run_dir).search_runs([experiment.experiment_id])) == 1


def test_a_broken_artifact_store_does_not_hold_up_the_rest(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = start_run(run_dir)
    write_steps(opened, 1, 5)
    write_picture(opened, 5)
    end_run(opened)
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_artifact", lambda *_: (_ for _ in ()).throw(OSError("no such bucket")))
        summary = sync(run_dir, tries=1)
    assert "no such bucket" in str(summary.error)
    assert summary.unsent == 2
    assert len(history(run_dir, "loss/train")) == 5
    assert run_of(run_dir).info.status == "FINISHED"
    assert sync(run_dir).unsent == 0
    check_copy(run_dir, 5)


def test_files_that_cannot_be_sent_are_named(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened = start_run(run_dir)
    (run_dir / "review").mkdir()
    (run_dir / "review/report.html").write_text("<p>")
    (run_dir / "broken.png").write_text("no picture")
    opened.write({"kind": "artifact", "path": "review/report.html"})
    opened.write({"kind": "artifact", "path": "gone.txt"})
    opened.write({"kind": "image", "step": 1, "key": "recon", "path": "broken.png"})
    end_run(opened)
    assert sync(run_dir).unsent == 0
    assert listed(run_dir, "review") == ["review/report.html"]
    output = capsys.readouterr().out
    assert "gone.txt is gone" in output
    assert "broken.png is no picture" in output


def test_a_run_deleted_there_is_sent_again(run_dir: Path) -> None:
    opened = start_run(run_dir)
    write_steps(opened, 1, 3)
    sync(run_dir)
    old = State.load(run_dir).run_id
    client_of(run_dir).delete_run(old)
    write_steps(opened, 4, 5)
    write_picture(opened, 5)
    end_run(opened)
    sync(run_dir)
    assert check_copy(run_dir, 5).info.run_id != old


def test_params_that_are_refused_do_not_block(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRUNCATE_LONG_VALUES", "false")
    end_run(start_run(run_dir, params={"long": "x" * 10_000}))
    assert sync(run_dir).error is None
    assert run_of(run_dir).data.params == {}
    assert "params refused" in capsys.readouterr().out


def test_names_that_are_no_utf8_arrive_with_escapes(run_dir: Path) -> None:
    opened = start_run(run_dir)
    opened.write({"kind": "start", "step": 1, "params": {"shards": "caf\udce9"}})
    end_run(opened)
    assert sync(run_dir).error is None
    assert run_of(run_dir).data.params["shards"] == "caf\\udce9"


def test_an_error_of_the_server_is_no_refusal(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    end_run(start_run(run_dir))
    whole = MlflowClient.log_batch

    def failing(*args: Any, params: Any = (), **more: Any) -> Any:
        if params:
            raise MlflowException("database is locked")
        return whole(*args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", failing)
        assert "database is locked" in str(sync(run_dir, tries=1).error)
    assert sync(run_dir).error is None
    assert run_of(run_dir).data.params == {"lr": "0.1"}


def test_the_environment_names_store_and_experiment(run_dir: Path, tmp_path: Path) -> None:
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{run_dir.parent / 'mlflow.db'}"
    os.environ["MLFLOW_EXPERIMENT_NAME"] = "from the environment"
    end_run(start_run(run_dir))
    assert sync(run_dir, TrackConfig(tracking_uri=f"sqlite:///{tmp_path}/other.db")).error is None
    assert not (tmp_path / "other.db").exists()
    experiment = client_of(run_dir).get_experiment(run_of(run_dir).info.experiment_id)
    assert experiment.name == "from the environment"
    assert experiment.artifact_location == (run_dir.parent / "mlartifacts").as_uri()


def test_no_journal_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no journal\.jsonl in it"):
        sync(tmp_path)
    (tmp_path / journal.FILE_NAME).touch()
    assert sync(tmp_path).error is None
    assert not (tmp_path / "mlflow.db").exists()  # an empty journal makes no run


def test_a_tracker_never_raises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    off = MLflowTracker.start(tmp_path, TrackConfig(mlflow=False))
    off.close()
    assert capsys.readouterr().err == ""
    (tmp_path / "logs").write_text("not a directory")
    broken = MLflowTracker.start(tmp_path, TrackConfig())
    broken.close()
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("http://me:secret@tracking:5000/x", "http://tracking:5000/x"),
        ("postgresql://me:secret@db/mlflow", 'mlflow ui --backend-store-uri "$MLFLOW_TRACKING_URI"'),
        ("sqlite:////with space/m.db", "mlflow ui --backend-store-uri 'sqlite:////with space/m.db'"),
    ],
)
def test_ui_command(tmp_path: Path, uri: str, expected: str) -> None:
    assert ui_command(tmp_path, uri) == expected


def test_importing_the_room_is_cheap() -> None:
    code = "import sys, json, mae_dist.track, mae_dist.track.mlflow; print(json.dumps(list(sys.modules)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert not {"mlflow", "torch", "numpy", "PIL"} & set(loaded)
