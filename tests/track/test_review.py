"""The reconstruction grid: every pixel where it belongs, large enough to see, nearly square."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_dist.track import journal
from mae_dist.track.review import MIN_TILE, THIN, WIDE, Album, open_picture, reconstruction_grid, save_picture


def triple(count: int, height: int, width: int, channels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    noise = np.random.default_rng(0)
    shape = (3, count, height, width, channels)
    a, b, c = noise.integers(0, 256, shape, dtype=np.uint8)
    return a, b, c


@pytest.mark.parametrize("count", [1, 2, 5, 16])
@pytest.mark.parametrize(("height", "width", "channels"), [(8, 8, 1), (32, 32, 3), (224, 224, 3), (40, 64, 3)])
def test_every_pixel_is_in_its_place(count: int, height: int, width: int, channels: int) -> None:
    kinds = triple(count, height, width, channels)
    picture = reconstruction_grid(*kinds)
    pixels = np.asarray(picture)
    factor = -(-MIN_TILE // max(height, width)) if max(height, width) < MIN_TILE else 1
    cell_width, cell_height = 3 * width * factor + 2 * THIN + WIDE, height * factor + WIDE
    across = (picture.width - WIDE) // cell_width
    top = picture.height - -(-count // across) * cell_height
    assert 10 < top < 60
    for i in range(count):
        for k in range(3):
            x = WIDE + i % across * cell_width + k * (width * factor + THIN)
            y = top + i // across * cell_height
            tile = pixels[y : y + height * factor : factor, x : x + width * factor : factor]
            assert (tile == kinds[k][i]).all()
    assert max(height, width) * factor >= MIN_TILE


@pytest.mark.parametrize("count", [4, 8, 9, 16, 25, 64])
def test_nearly_square(count: int) -> None:
    picture = reconstruction_grid(*triple(count, 32, 32, 3))
    assert 0.4 < picture.width / picture.height < 2.3


def test_asked_columns_and_captions() -> None:
    kinds = triple(6, 32, 32, 3)
    narrow, wide = (reconstruction_grid(*kinds, columns=columns) for columns in (1, 6))
    assert narrow.width * 5 < wide.width
    caption_row = np.asarray(wide)[: 16 + WIDE // 2]
    assert np.nonzero(caption_row < 128)[1].max() > wide.width * 0.9  # over the last triple too
    assert reconstruction_grid(*kinds, columns=99).size == wide.size


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [((2, 8, 8, 2), "uint8", "C 1 or 3"), ((8, 8, 3), "uint8", "needed"), ((2, 8, 8, 3), "float32", "uint8 is needed")],
)
def test_what_is_no_batch_of_pictures(shape: tuple[int, ...], dtype: str, message: str) -> None:
    array = np.zeros(shape, dtype)
    with pytest.raises(ValueError, match=message):
        reconstruction_grid(array, array, array)


def test_unequal_or_empty_batches() -> None:
    a, b, c = triple(2, 8, 8, 3)
    with pytest.raises(ValueError, match="equal shapes"):
        reconstruction_grid(a, b, c[:1])
    with pytest.raises(ValueError, match="needed"):
        reconstruction_grid(a[:0], b[:0], c[:0])


def test_saved_whole_and_read_back(tmp_path: Path) -> None:
    picture = reconstruction_grid(*triple(3, 32, 32, 3))
    name = save_picture(picture, tmp_path, 1200, "recon/val")
    assert name == "review/recon-val-00001200.png"
    assert [path.name for path in (tmp_path / "review").iterdir()] == ["recon-val-00001200.png"]
    back = open_picture(tmp_path / name)
    assert back is not None
    assert (np.asarray(back) == np.asarray(picture)).all()


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    Image.fromarray(triple(1, 64, 64, 3)[0][0]).save(broken)
    broken.write_bytes(broken.read_bytes()[:5000])
    assert open_picture(broken) is None
    broken.write_text("no picture")
    assert open_picture(broken) is None
    with pytest.raises(FileNotFoundError):
        open_picture(tmp_path / "nothing.png")


def test_pictures_that_cannot_be_written_wait_and_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "review").write_text("a file where the directory belongs")
    opened = journal.Journal(tmp_path / journal.FILE_NAME)
    album, picture = Album(opened, "review/reconstruction"), reconstruction_grid(*triple(1, 8, 8, 3))
    album.add(picture, 1)
    album.add(picture, 2)
    assert capsys.readouterr().err.count("warning: ") == 1
    (tmp_path / "review").unlink()
    album.add(picture, 3)
    records = list(journal.read(opened.path))
    assert [r["step"] for r in records if r["kind"] == "image"] == [1, 2, 3]
    assert all(open_picture(tmp_path / r["path"]) for r in records if r["kind"] == "image")
    assert [r["metrics"]["progress/failed_pictures"] for r in records if r["kind"] == "metrics"] == [1, 2]
    assert sorted(path.suffix for path in (tmp_path / "review").iterdir()) == [".png"] * 3
