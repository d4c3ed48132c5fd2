"""The real Dockerfile builds and its command line starts as a user that is not root.

Needs neither a Docker daemon nor a registry: debootstrap makes the base image, buildah builds in a chroot. It downloads
torch and CUDA, so it runs only when asked to:

    TEST_IMAGE=1 pytest -m system tests/system/test_image.py

IMAGE_BUILD_ARGS holds more arguments for `buildah bud`, for example a pip configuration of one's own:
"-v /home/me/pip.conf:/etc/pip.conf:ro".
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
BASE = "localhost/mae-dist-base"
IMAGE = "localhost/mae-dist"

pytestmark = pytest.mark.system

Run = Callable[..., str]


def run(*command: str | Path, seconds: float = 3600) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds)
    assert done.returncode == 0, f"{command}: exit status {done.returncode}\n{done.stdout[-5000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def image() -> Iterator[Run]:
    """Builds the image; yields a function that runs a command in a container of it."""
    if os.environ.get("TEST_IMAGE") != "1":
        pytest.skip("downloads gigabytes: set TEST_IMAGE=1 to build the image")
    if os.geteuid() != 0:
        pytest.skip("debootstrap and buildah's chroot isolation need root")
    if missing := [tool for tool in ("debootstrap", "buildah") if shutil.which(tool) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")

    # Not pytest's tmp_path, which is kept: this is many gigabytes.
    with tempfile.TemporaryDirectory(prefix="mae-image-", ignore_cleanup_errors=True) as folder:
        root = Path(folder)
        buildah = ["buildah", f"--root={root}/images", f"--runroot={root}/run", "--storage-driver=overlay"]
        build = [*buildah, "bud", "--isolation=chroot", "--network=host"]
        context = root / "base"
        context.mkdir()
        run("debootstrap", "--variant=minbase", "bookworm", root / "debian")
        run("tar", "-C", root / "debian", "-cf", context / "base.tar", ".")
        (context / "Dockerfile").write_text("FROM scratch\nADD base.tar /\n")
        try:
            run(*build, "-t", BASE, context)
            arguments = [f"--build-arg=BASE_IMAGE={BASE}", "--build-arg=GIT_COMMIT=c0ffee"]
            run(*build, *arguments, *shlex.split(os.environ.get("IMAGE_BUILD_ARGS", "")), "-t", IMAGE, REPOSITORY)
            container = run(*buildah, "from", "--pull-never", IMAGE).split()[-1]
            yield lambda *command: run(*buildah, "run", "--isolation=chroot", container, "--", *command, seconds=300)
        finally:
            run(*buildah, "rm", "--all")  # it unmounts, so that the folder can be deleted


def test_command_line(image: Run) -> None:
    # `buildah run` leaves the ENTRYPOINT out.
    assert "pretrain" in image("mae-dist", "--help")


def test_runs_as_an_ordinary_user(image: Run) -> None:
    assert image("id", "-u").strip() == "10001"


def test_knows_its_commit(image: Run) -> None:
    assert image("printenv", "MAE_DIST_GIT_COMMIT").strip() == "c0ffee"


def test_trains(image: Run) -> None:
    """With the launcher and a configuration of the image, by a user that is not root, under a name nobody resolves."""
    arguments = [
        "--config",
        "configs/demo.yaml",
        "--data.fake",
        "true",
        "--train.steps",
        "4",
        "--train.global_batch_size",
        "8",
    ]
    image("env", "NPROC=2", "launch/torchrun.sh", *arguments)
    assert "step-" in image("ls", "runs/digits/checkpoints")
