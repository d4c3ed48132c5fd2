"""What storage does besides holding files: FIFOs that never end, errors that are no damage, files that shrink."""

import os
import threading
from pathlib import Path

import pytest

from mae_dist.errors import UserError
from mae_dist.shards import Manifest, remote
from mae_dist.shards.index import index
from mae_dist.shards.verify import verify
from mae_dist.shards.write import shard
from tests.conftest import write_images


def fifo(path: Path) -> Path:
    """A FIFO in place of what is there. Whoever opens it finds it empty, so that nothing waits for ever."""

    def feed() -> None:
        while True:
            path.open("wb").close()

    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)
    threading.Thread(target=feed, daemon=True).start()
    return path


@pytest.mark.parametrize("name", ["a.tar", "a.parquet"])
def test_a_fifo_among_tars_or_parquet_files_is_named_and_never_opened(tmp_path, name):
    fifo(tmp_path / "in" / name)
    with pytest.raises(UserError, match=rf"{name}: a FIFO, not a file"):
        shard(tmp_path / "in", tmp_path / "out")
    with pytest.raises(UserError, match=f"{name}: .*a FIFO, not a file|no shards but parquet"):
        index([str(tmp_path / "in")])


def test_a_fifo_in_place_of_a_shard_its_table_or_the_manifest_is_named_and_never_opened(tmp_path):
    manifest = shard(write_images(tmp_path / "in", classes=1, each=4), tmp_path / "out", shard_size=2)
    assert manifest
    fifo(manifest.tar_path(0))
    fifo(manifest.index_path(1))
    said = " ".join(map(str, verify(Manifest.load(tmp_path / "out", check=False))))
    assert said.count("a FIFO, not a file") == 2
    with pytest.raises(ValueError, match="a FIFO, not a file"):
        remote.open_stream(f"file://{manifest.tar_path(0)}")
    fifo(tmp_path / "out" / "manifest.json")
    with pytest.raises(UserError, match=r"manifest\.json: a FIFO, not a file"):
        Manifest.load(tmp_path / "out")
