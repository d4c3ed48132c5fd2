"""What a reviewer sees: a run opened in MLflow with a real browser shows its loss curve and its reconstructions.

Set SCREENSHOTS=DIR to keep the pictures and look at them.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.conftest import TINY, mae_dist

pytestmark = pytest.mark.system
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
# Nothing that looks for the network: the page is on this machine.
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@pytest.fixture(scope="module")
def runs(shards, tmp_path_factory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    tracked = [argument for argument in TINY if "mlflow" not in argument]
    mae_dist(
        "pretrain", *tracked, f"--data.shards={shards}", f"--train.runs_dir={runs}", "--train.name=reviewed",
        "--train.steps=30", "--train.global_batch_size=16", "--train.eval_every=10", "--track.close_timeout=90",
    )  # fmt: skip
    return runs


@pytest.fixture(scope="module")
def server(runs):
    """A real `mlflow server` on the run's sqlite file."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{s.getsockname()[1]}"
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", url.rsplit(":", 1)[1]]
    process = subprocess.Popen(
        [*command, "--backend-store-uri", f"sqlite:///{runs}/mlflow.db"],
        env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5)
            break
        except OSError:
            assert time.monotonic() < deadline and process.poll() is None, "mlflow server did not start"
            time.sleep(0.5)
    yield url
    process.terminate()
    process.wait(30)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_the_loss_curve_and_the_reconstructions_are_on_the_runs_page(runs, server):
    playwright = pytest.importorskip("playwright.sync_api")
    from mlflow import MlflowClient

    client = MlflowClient(server)
    experiment = client.get_experiment_by_name("mae_dist")
    assert experiment
    run = client.search_runs([experiment.experiment_id])[0].info
    assert run.status == "FINISHED"
    keep = Path(os.environ.get("SCREENSHOTS", runs))
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page = browser.new_page(viewport={"width": 1500, "height": 1300})
        page.goto(f"{server}/#/experiments/{experiment.experiment_id}/runs/{run.run_id}/model-metrics")
        loss = page.get_by_text("reviewed (loss/train)", exact=True)
        loss.first.wait_for(timeout=90_000)  # the legend under the drawn curve
        page.locator(".js-plotly-plot .scatterlayer path.js-line").first.wait_for(state="attached", timeout=60_000)
        page.screenshot(path=keep / "mlflow-metrics.png")
        picture = page.locator("img[src*='get-artifact'], img[src^='blob:']").first
        for _ in range(60):  # cards are drawn when they are scrolled to,
            page.mouse.move(600, 800)
            page.mouse.wheel(0, 600)  # and only while they are seen
            if picture.count() and picture.evaluate("image => image.naturalWidth") > 100:
                break
            page.wait_for_timeout(1000)
        page.screenshot(path=keep / "mlflow-reconstructions.png")
        assert picture.evaluate("image => image.naturalWidth") > 100
        browser.close()
