"""Pictures for people: what went in, what the model saw, what it made of it."""

import math
from collections.abc import Iterable, Mapping
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mae_dist.local import Secondary, make_directory, write_file
from mae_dist.shards.encoded import open_image
from mae_dist.track.journal import Journal

MIN_TILE = 96  # pixels; smaller images are enlarged by a whole factor, so that each of their pixels stays a square
THIN, WIDE = 2, 10  # pixels between the pictures of one image, and around them
BACKGROUND, INK = (255, 255, 255), (40, 40, 40)


def reconstruction_grid(
    images: np.ndarray, masked: np.ndarray, reconstructions: np.ndarray, columns: int | None = None
) -> Image.Image:
    """`picture_grid` of triples (input | masked | reconstruction)."""
    return picture_grid({"input": images, "masked": masked, "reconstruction": reconstructions}, columns)


def picture_grid(kinds: Mapping[str, np.ndarray], columns: int | None = None) -> Image.Image:
    """What was made of each image side by side, these rows in a grid with a caption row, as an RGB picture.

    `kinds`: caption -> (n, H, W, C) uint8, C 1 or 3, all of one shape. `columns`: images a row; None: as many as make
    the grid nearly square (MLflow shows a wide strip as a thin one). Raises ValueError for other shapes or types.
    """
    arrays = list(kinds.values())
    images = arrays[0]
    if len({a.shape for a in arrays}) != 1 or images.ndim != 4 or images.shape[3] not in (1, 3) or not images.size:
        shapes = ", ".join(str(array.shape) for array in arrays)
        raise ValueError(f"equal shapes (n, H, W, C) with C 1 or 3 are needed, found {shapes}")
    if any(array.dtype != np.uint8 for array in arrays):
        raise ValueError(f"uint8 is needed, found {', '.join(str(array.dtype) for array in arrays)}")
    count, height, width = images.shape[:3]
    factor = max(1, math.ceil(MIN_TILE / max(height, width)))
    tile_width, tile_height = width * factor, height * factor
    cell_width = len(kinds) * (tile_width + THIN) - THIN + WIDE
    cell_height = tile_height + WIDE
    across = min(count, columns) if columns else square_columns(count, cell_width, cell_height)
    font = caption_font(tile_width, kinds)
    baseline, top = WIDE // 2 + font.getbbox("A")[3], WIDE + font.getbbox("Ag")[3]
    size = (across * cell_width + WIDE, top + math.ceil(count / across) * cell_height)
    grid = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(grid)
    for i in range(count):
        for k, (caption, array) in enumerate(kinds.items()):
            x = WIDE + (i % across) * cell_width + k * (tile_width + THIN)
            if i < across:
                draw.text((x + tile_width / 2, baseline), caption, INK, font, anchor="ms")
            tile = np.broadcast_to(array[i], (height, width, 3)).repeat(factor, 0).repeat(factor, 1)
            grid.paste(Image.fromarray(tile), (x, top + (i // across) * cell_height))
    return grid


def square_columns(count: int, cell_width: int, cell_height: int) -> int:
    """Cells a row that bring the grid's width and height closest, in ratio."""

    def stretch(columns: int) -> float:
        return abs(math.log(columns * cell_width / (math.ceil(count / columns) * cell_height)))

    return min(range(1, count + 1), key=stretch)


def caption_font(tile_width: int, captions: Iterable[str]) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, as large as looks right, and no wider than a tile allows."""
    size = max(12, tile_width // 10)
    while True:
        font = ImageFont.load_default(size)
        if size <= 6 or max(map(font.getlength, captions)) <= tile_width:
            return font
        size -= 1


def save_picture(picture: Image.Image, run_dir: Path | str, step: int, key: str = "reconstruction") -> str:
    """Write `<run_dir>/review/<key>-<step>.png`. Returns its path from run_dir, for the journal. Raises OSError."""
    name = f"review/{key.replace('/', '-')}-{step:08d}.png"
    make_directory((Path(run_dir) / name).parent)
    encoded = BytesIO()
    picture.save(encoded, format="PNG")
    write_file(Path(run_dir) / name, encoded.getvalue())
    return name


class Album:
    """A run's pictures: written, then named in its journal. What cannot be written waits for the next picture."""

    def __init__(self, journal: Journal, key: str):
        self.journal, self.key = journal, key
        self.output = Secondary(journal.path.parent / "review")
        self.waiting: list[tuple[int, Image.Image]] = []

    def add(self, picture: Image.Image, step: int) -> None:
        """Write it, and those that wait. Raises nothing for the disk: training goes on without pictures."""
        self.waiting.append((step, picture))
        failures = self.output.failures
        with self.output.attempt():
            while self.waiting:
                drawn, waiting = self.waiting[0]
                path = save_picture(waiting, self.journal.path.parent, drawn)
                self.journal.write({"kind": "image", "step": drawn, "key": self.key, "path": path})
                del self.waiting[0]
        if self.output.failures > failures:
            metrics = {"progress/failed_pictures": float(self.output.failures)}
            self.journal.write({"kind": "metrics", "step": step, "metrics": metrics})


def open_picture(path: Path) -> Image.Image | None:
    """A picture, decoded; None for a file that is none. Raises OSError where the disk fails."""
    data = path.read_bytes()
    try:
        picture = open_image(data)
        picture.load()
    except (OSError, SyntaxError, ValueError):
        return None
    return picture
