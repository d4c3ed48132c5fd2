"""A newcomer's walk through the README: every command and every line of Python runs as it is written, on small data."""

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mae_dist.config import Config
from mae_dist.exchange.runs import write
from mae_dist.model import MAE, MAEConfig
from tests.conftest import mae_dist, write_images
from tests.shards.servers import HTTPServer, S3Server

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
SMALL = {  # instead of what the shipped configs say, so that minutes of two CPU cores do
    "model": {"enc_dim": 32, "enc_depth": 2, "enc_heads": 2, "dec_dim": 32, "dec_depth": 1, "dec_heads": 2},
    "data": {"workers": 1},
    "optim": {"warmup_epochs": 0.1},
    "train": {"global_batch_size": 8, "steps": 3, "epochs": 3, "precision": "fp32", "device": "cpu", "log_every": 1},
    "track": {"close_timeout": 120},
}
AFTER = {  # where no config stands before it
    "mae-dist pretrain --config runs/large": "--train.steps 2 --train.global_batch_size 8 --optim.warmup_epochs 0.1 "
    "--train.device cpu --train.precision fp32 --data.workers 1",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines() if line.strip()]


@pytest.fixture
def there(tmp_path, monkeypatch):
    """A directory with runs/vit_b16."""
    model = MAE(MAEConfig(dec_dim=32, dec_depth=1, dec_heads=1))
    write(tmp_path / "runs" / "vit_b16", Config(model.config), dict(model.state_dict()), {"file": "a test"})
    monkeypatch.chdir(tmp_path)
    return model


def test_using_the_encoder(there):
    section = README.read_text().split("## Use the encoder")[1].split("\n## ")[0]
    blocks = re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL)
    assert [language for language, _ in blocks] == ["python", "bash", "python", "bash"]
    names = {"images": torch.randn(1, 3, 224, 224), "large_images": torch.randn(1, 3, 512, 384), "num_classes": 7}
    for language, code in blocks[:3]:  # the last needs weights that must be downloaded
        if language == "bash":
            mae_dist(*shlex.split(code)[1:])
        else:
            exec(code, names)
    assert names["features"].shape == (1, 197, 768) and names["logits"].shape == (1, 7)
    assert torch.equal(names["features"], there.eval().encode(names["images"]))
    assert [tuple(map_.shape) for map_ in names["maps"]] == [(1, 768, 32, 24)] * 4
    weights = there.state_dict()["encoder.blocks.11.mlp.fc2.weight"]
    assert torch.equal(names["backbone"].model.blocks[11].mlp.fc2.weight, weights)
    loss = names["maps"][-1].mean() + names["logits"].mean()
    loss.backward()  # both train
    assert names["backbone"].model.blocks[0].attn.qkv.weight.grad is not None
    assert names["classifier"].weight.grad is not None


def small_configs(directory: Path) -> None:
    """The shipped configs under their names, with SMALL sizes."""
    for path in (ROOT / "configs").glob("*.yaml"):
        said = yaml.safe_load(path.read_text())
        for section, values in SMALL.items():
            if section != "model" or path.name.startswith("vit_"):
                said[section] = said.get(section, {}) | values
        directory.mkdir(exist_ok=True)
        (directory / path.name).write_text(yaml.safe_dump(said))


class Newcomer:
    """A directory like a fresh clone, with `mae-dist` on the path and stand-ins for what the README's reader has."""

    def __init__(self, home: Path, http: HTTPServer, s3: S3Server):
        self.home, self.http = home, http
        small_configs(home / "configs")
        (home / "launch").symlink_to(ROOT / "launch")
        for name in ("imagenet/train", "imagenet21k"):
            write_images(home / "data" / name, classes=3, each=8, size=230)
        flat = write_images(home / "val", classes=1, each=6, size=230, seed=1) / "class_0"
        names = sorted(path.name for path in flat.iterdir())
        subprocess.run(["tar", "cf", home / "ILSVRC2012_img_val.tar", "-C", flat, *names], check=True)
        labels = "".join(f"class_{i % 3}\n" for i in range(6))
        (home / "imagenet_2012_validation_synset_labels.txt").write_text(labels)
        for name, photo in zip(names, ("photo.jpg", "another.jpg"), strict=False):
            shutil.copy(flat / name, home / photo)
        gone = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self.environment = gone | s3.environment | {"PATH": path, "PYTHONPATH": str(ROOT), "NPROC": "2"}
        for section, values in SMALL.items():
            for key in values.keys() & {"global_batch_size", "steps", "warmup_epochs", "workers", "close_timeout"}:
                self.environment[f"MAE_DIST_{section}__{key}".upper()] = str(values[key])

    def run(self, line: str) -> str:
        """What a line prints. Raises AssertionError when it fails."""
        for ours, stand_in in (
            ("/data/", f"{self.home}/data/"),
            ("https://host/imagenet1k-train-{0000..1023}", f"{self.http.url}/train-{{00000..00001}}"),
            ("TRAIN ", f"{self.home}/data/shards/train "),
            (" VAL", f" {self.home}/data/shards/val"),
        ):
            line = line.replace(ours, stand_in)
        more = next((more for start, more in AFTER.items() if line.startswith(start)), "")
        done = subprocess.run(
            ["bash", "-c", f"set -euo pipefail; {line} {more}"],
            cwd=self.home, env=self.environment, capture_output=True, text=True, timeout=1800,
        )  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def watch(self, line: str) -> None:
        """`mlflow ui`, until it answers."""
        port = free_port()
        process = subprocess.Popen(
            [*shlex.split(line, comments=True), "--port", str(port)], cwd=self.home, env=self.environment,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 600
            while True:
                try:
                    assert urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=60).status == 200
                    return
                except OSError:
                    assert time.monotonic() < deadline and process.poll() is None
                    time.sleep(1)
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # the server has processes of its own
            process.wait()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def newcomer(tmp_path, shards) -> Any:
    http, s3 = HTTPServer(shards), S3Server(shards)
    s3.system.mkdir("bucket")
    yield Newcomer(tmp_path, http, s3)
    http.stop()
    s3.stop()


@pytest.mark.slow
@pytest.mark.dist
def test_every_command_runs_as_it_is_written(newcomer):
    ran = 0
    for line in COMMANDS:
        if line.startswith("make "):  # each is what CI runs; here: that there is such a target
            assert subprocess.run(["make", "-n", line.split()[1]], cwd=ROOT, capture_output=True).returncode == 0, line
        elif line.startswith(". .venv/bin/activate"):
            activate = newcomer.home / ".venv/bin/activate"
            activate.parent.mkdir(parents=True)
            activate.write_text(f"PATH={Path(sys.executable).parent}:$PATH")
            assert "mae-dist" in newcomer.run(f"{line} && command -v mae-dist && mae-dist --help")
        elif line.startswith(
            "sbatch --array"
        ):  # what a task of the array runs; SLURM itself: tests/system/test_slurm.py
            newcomer.run(f"export SLURM_ARRAY_TASK_ID=3; {shlex.split(line)[-1]}")
        elif line.startswith("sbatch"):
            continue  # tests/system/test_slurm.py
        elif line.startswith("mlflow ui"):
            newcomer.watch(line)
        else:
            if line.startswith("mae-dist import"):  # the file that the reader has downloaded
                newcomer.run("mae-dist export runs/vit_b16 --to official --out mae_visualize_vit_large.pth")
            if line.startswith("mae-dist index /data/wds"):  # shards that somebody else made
                newcomer.run("mkdir /data/wds; cp /data/shards/train/*.tar /data/wds/")
            newcomer.run(line)
            ran += 1
            if line.startswith("mae-dist shard") and "--dry-run" not in line and "imagenet/train" in line:
                newcomer.run("mae-dist shard /data/imagenet/train /data/shards/val --seed 1")
    assert ran >= 15


def test_no_line_of_the_readme_is_left_out():
    """The walk above and `test_using_the_encoder` have every block; what is not run is one of a few known kinds."""
    languages = set(re.findall(r"^```(\w+)", README.read_text(), re.MULTILINE))
    assert languages == {"bash", "python"}
    section = README.read_text().split("## Use the encoder")[1].split("\n## ")[0]
    assert all(block in section for block in blocks("python"))
    programs = {shlex.split(line, comments=True)[0] for line in COMMANDS}
    assert programs == {"make", ".", "mae-dist", "sbatch", "launch/torchrun.sh", "mlflow"}
