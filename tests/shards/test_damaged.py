"""Tars that somebody else wrote and something damaged: what the real commands say, and with which status they end."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from tests.conftest import TINY, losses, mae_dist, write_images

pytestmark = pytest.mark.dist
SHARDS, EACH = 5, 200
BAD = range(7, SHARDS * EACH, 50)  # 2 %


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1000 samples, indexed; every 50th JPEG is cut in half."""
    out = tmp_path_factory.mktemp("damaged")
    images = sorted(write_images(out / "images", 4, SHARDS * EACH // 4).rglob("*.jpg"))
    for index in range(SHARDS):
        with tarfile.open(out / f"part-{index}.tar", "w") as tar:
            for sample in range(index * EACH, (index + 1) * EACH):
                image = images[sample].read_bytes()
                image = image[: len(image) // 2] if sample in BAD else image
                for suffix, data in (("jpg", image), ("cls", str(sample % 4).encode())):
                    member = tarfile.TarInfo(f"{sample:05d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    mae_dist("index", out / "part-{0..4}.tar", "--out", out)
    return out


def pretrain(shards: Path, runs: Path, *more: str) -> tuple[int, str]:
    """Status and last line of one epoch over the shards."""
    own = [f"--data.shards={shards}", f"--train.runs_dir={runs}", "--train.name=t", "--train.global_batch_size=20"]
    done = mae_dist("pretrain", *TINY, *own, "--train.steps=50", *more, check=False)
    last = (done.stdout + done.stderr).strip().splitlines()[-1]
    print(f"pretrain {' '.join(more)}: status {done.returncode}: {last}")
    return done.returncode, last


def listed(runs: Path) -> list[int]:
    lines = (runs / "t" / "bad_samples.jsonl").read_text().splitlines()
    return sorted(json.loads(line)["sample"] for line in lines)


def test_verify_names_each_bad_image(damaged):
    done = mae_dist("verify", damaged, check=False)
    assert done.returncode == 1
    assert [f"{k:05d}: unreadable image" for k in BAD if f"{k:05d}: unreadable image" not in done.stdout] == []
    assert done.stdout.count("unreadable image") == len(BAD)


def test_two_percent_of_bad_images_stop_a_run_that_allows_less(damaged, tmp_path):
    status, last = pretrain(damaged, tmp_path)
    assert status == 2
    assert last.startswith("error: 11 bad samples among ")
    assert "more than data.max_bad_fraction 0.0001 allows (10)" in last and "part-" in last
    assert "object at 0x" not in last
    assert len(listed(tmp_path)) >= 11 and set(listed(tmp_path)) <= set(BAD)  # some are found ahead of training


def test_and_are_replaced_and_listed_in_a_run_that_allows_them(damaged, tmp_path):
    status, last = pretrain(damaged, tmp_path, "--data.max_bad_fraction=0.05")
    assert status == 0 and "20 bad samples" in last
    assert listed(tmp_path) == list(BAD)
    assert len(losses(tmp_path / "t")) == 50


def test_a_tar_cut_in_the_middle_is_named_by_every_command(damaged, tmp_path):
    for file in damaged.glob("*.*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    cut = tmp_path / "part-1.tar"
    size = cut.stat().st_size
    with cut.open("r+b") as file:
        file.truncate(size // 2)

    status, last = pretrain(tmp_path, tmp_path / "runs")
    assert status == 2 and f"{cut}: cut short, {size // 2} bytes where the manifest says {size}" in last
    for command in (("verify", tmp_path), ("index", tmp_path / "part-{0..4}.tar", "--out", tmp_path / "again")):
        done = mae_dist(*command, check=False)
        said = [line for line in (done.stdout + done.stderr).splitlines() if f"{cut}: cut short" in line]
        print(f"{command[0]}: status {done.returncode}: {said}")
        assert done.returncode == {"verify": 1, "index": 2}[command[0]] and len(said) == 1
    assert not (tmp_path / "again" / "manifest.json").exists()
