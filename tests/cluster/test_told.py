"""What a person or a log is told while commands run: every measurement a line, how to watch, no bars in files."""

from tests.conftest import TINY, mae_dist


def test_a_run_tells_what_it_measures_and_where_to_look(shards, tmp_path):
    runs = tmp_path / "runs"
    watched = [option for option in TINY if "mlflow" not in option]
    done = mae_dist(
        "pretrain", *watched, f"--data.shards={shards}", "--data.val_shards=1", f"--train.runs_dir={runs}",
        "--train.name=told", "--train.steps=6", "--train.global_batch_size=10", "--train.eval_every=3",
        "--train.save_every=3", "--train.knn_every=1", timeout=600,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    page = "http://127.0.0.1:5000/#/experiments/1/runs?workflowType=machine_learning"
    assert f"MLflow: mlflow ui --backend-store-uri sqlite:///{runs}/mlflow.db    then open {page}" in lines[:2]
    begun = [line.rsplit(" ", 1)[0] for line in lines]
    for step in (3, 6):
        assert f"step {step}: validation loss" in begun
        assert any(line.startswith(f"step {step}: checkpoint saved, ") for line in lines)
    assert "step 6: k-NN accuracy (k=20)" in begun
    checked = mae_dist("verify", shards, "--workers=2", timeout=600)
    scored = mae_dist("knn", runs / "told", "--k=5", timeout=600)
    for command in (done, checked, scored):
        assert "\r" not in command.stdout + command.stderr
