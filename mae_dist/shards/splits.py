"""What the names of files and folders say: splits side by side, which must not be mixed, and files that are missing."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from mae_dist.errors import UserError

WORDS = ("train(?:ing)?", "val(?:id|idation)?|dev|eval(?:uation)?|held_?out", "test(?:ing)?")
IN_FILES = [re.compile(rf"(?<![a-z])(?:{words})(?:set)?(?![a-z])", re.IGNORECASE) for words in WORDS]
IMAGES = "(?:images?|imgs?|data)"
FOLDERS = [  # `train`, `val2017`, `test_256`, `ILSVRC2012_img_train`, and no `bullet_train`
    re.compile(rf"(?:\S*{IMAGES}[-_ ]?)?(?:{words})(?:set)?(?:[-_ ]?(?:{IMAGES}|\d\S*))?", re.IGNORECASE)
    for words in WORDS
]
PART = re.compile(r"(.*?)(\d+)-of-(\d+)\D.*")  # how Hugging Face and TensorFlow number files


def one_split(where: str | Path, files: Sequence[Path]) -> None:
    """Raises UserError for training beside held-out files: mixing them would be silent."""
    found = [next(filter(None, (split.search(file.name) for file in files)), None) for split in IN_FILES]
    words = [match[0] for match in found if match]
    if len(words) > 1:
        pattern = f"{files[0].parent}/*{words[0]}*{files[0].suffix}"
        raise UserError(f"{where}: holds the splits {', '.join(words)}; shard one at a time, for example '{pattern}'")


def of_any_split(pattern: str) -> bool:
    """Whether the last part of a pattern says which splits it means."""
    return any(split.search(Path(pattern).name) for split in IN_FILES)


def splits_among(folders: Iterable[str]) -> tuple[list[str], int]:
    """Those that are called as splits are, and how many of training, validation and test they are."""
    kinds = {name: i for name in folders for i, split in enumerate(FOLDERS) if split.fullmatch(name)}
    return list(kinds), len(set(kinds.values()))


def holds_splits(path: Path, splits: Sequence[str]) -> UserError:
    return UserError(
        f"{path}: holds the {'splits' if len(splits) > 1 else 'split'} {', '.join(splits)}, not class folders; "
        f"shard one at a time, for example '{path / splits[0]}'"
    )


def all_parts(path: Path, files: Iterable[Path]) -> None:
    """Raises UserError where names tell of more files than there are (`-00000-of-00005`)."""
    numbers: dict[tuple[str, str], set[str]] = {}
    for file in files:
        if match := PART.fullmatch(file.name):
            numbers.setdefault((match[1], match[3]), set()).add(match[2])
    for (front, total), found in numbers.items():
        if len(found) < int(total):
            raise UserError(
                f"{path}: holds {len(found)} of the {int(total)} files {front}*-of-{total}*; download the others, or "
                f"write a pattern such as '{path}/{front}*' for those there are"
            )
