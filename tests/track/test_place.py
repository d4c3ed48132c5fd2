"""Where MLflow is, as people are told, and whether its variables and the config say the same."""

import dataclasses
from pathlib import Path

import pytest
from mlflow import MlflowClient

from mae_dist.errors import UserError
from mae_dist.track import TrackConfig, tracker
from mae_dist.track.mlflow import sync
from mae_dist.track.place import how_to_watch
from tests.track.conftest import end_run, start_run


@pytest.mark.parametrize("before", [[], ["another"]])
def test_the_address_of_the_model_training_page_is_known_before_mlflow_is(tmp_path: Path, before: list[str]) -> None:
    store = f"sqlite:///{tmp_path}/mlflow.db"
    for name in before:
        MlflowClient(store).create_experiment(name)
    said = how_to_watch(tmp_path, TrackConfig())
    run_dir = tmp_path / "first"
    run_dir.mkdir()
    end_run(start_run(run_dir))
    assert sync(run_dir).error is None
    experiment = MlflowClient(store).get_experiment_by_name("mae_dist")
    assert experiment
    page = f"http://127.0.0.1:5000/#/experiments/{experiment.experiment_id}/runs?workflowType=machine_learning"
    assert said == f"mlflow ui --backend-store-uri {store}    then open {page}" == how_to_watch(run_dir, TrackConfig())


def test_where_a_servers_runs_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@mlflow.example/base")
    said = how_to_watch(tmp_path, TrackConfig(experiment="mine"))
    assert said == "https://mlflow.example/base/#/experiments (choose mine, then Model training)"


@pytest.mark.parametrize(
    ("name", "value", "config"),
    [
        ("MLFLOW_EXPERIMENT_ID", "3", TrackConfig()),
        ("MLFLOW_RUN_ID", "abc", TrackConfig()),
        ("MLFLOW_TRACKING_URI", "http://me:secret@b", TrackConfig(tracking_uri="http://a")),
        ("MLFLOW_EXPERIMENT_NAME", "theirs", TrackConfig(experiment="mine")),
    ],
)
def test_a_variable_of_mlflow_that_says_something_else_is_named(
    name: str, value: str, config: TrackConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=name) as caught:
        config.check()
    assert "secret" not in str(caught.value)
    dataclasses.replace(config, mlflow=False).check()
    key = {"MLFLOW_TRACKING_URI": "tracking_uri", "MLFLOW_EXPERIMENT_NAME": "experiment"}.get(name)
    if key:
        dataclasses.replace(config, **{key: value}).check()  # the same
        TrackConfig().check()  # said by the variable alone


@pytest.mark.parametrize("name", ["MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"])
def test_a_number_of_mlflow_that_is_none_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "ten")
    with pytest.raises(UserError, match=f"{name}: ten: write a whole number"):
        TrackConfig().check()


@pytest.mark.parametrize(
    ("uri", "whole"),
    [
        ("sqlite:///x.db", "sqlite:///{}/x.db"),
        ("sqlite:///x.db?timeout=5", "sqlite:///{}/x.db?timeout=5"),
        ("file:mlruns", "{}/mlruns"),
        ("./mlruns", "{}/mlruns"),
        *(
            (same, same)
            for same in ("sqlite:////x.db", "sqlite:///:memory:", "/mlruns", "file:///x", "http://a:5000/x")
        ),
        *((same, same) for same in ("databricks", "databricks://profile", "postgresql://u@h/d")),
    ],
)
def test_a_store_is_the_same_in_any_directory(uri: str, whole: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert TrackConfig(tracking_uri=uri).absolute().tracking_uri == whole.format(tmp_path)
    assert TrackConfig().absolute() == TrackConfig()


def test_a_name_that_begins_as_an_option_does_reaches_the_shipper(tmp_path: Path) -> None:
    journal = start_run(tmp_path)
    shipper = tracker.spawn(tmp_path, TrackConfig(experiment="-x"))
    end_run(journal)
    assert shipper.wait() == 0, (tmp_path / tracker.LOG_NAME).read_text()
