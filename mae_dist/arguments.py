"""The command line of the commands that take options, not a config: mistakes in one line, and what a value may be."""

import argparse
import os
import re
import shutil
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

from mae_dist.errors import UserError, note
from mae_dist.local import check_local, naming
from mae_dist.manual import WIDTH

MOST_SEED = 2**63 - 1  # seeds are keys of 64 bits


class Parser(argparse.ArgumentParser):
    """Mistakes are UserErrors: one line, no usage dump. Options are written whole."""

    def __init__(self, prog: str, description: str, examples: str = "") -> None:
        """`examples`: lines that the help ends with."""
        width = min(shutil.get_terminal_size((WIDTH, 0)).columns, WIDTH)
        super().__init__(prog, description=textwrap.fill(description, width), allow_abbrev=False)
        self.formatter_class = partial(argparse.RawDescriptionHelpFormatter, max_help_position=30, width=width)
        self.epilog = f"examples:\n{examples}" if examples else None

    def error(self, message: str):
        raise UserError(f"{self.prog}: {message.removeprefix('argument ')}; see {self.prog} --help")

    def add_workers(self) -> None:
        """`--workers N`, by default as many as this process may use: SLURM gives a share of the machine."""
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self.add_argument("--workers", type=whole(1, 1024), default=cpus, metavar="N", help="processes (%(default)s)")

    def add_allow(self) -> None:
        """`--data.allow_commands true`, as of the commands that take a config, or its variable."""
        self.add_argument("--data.allow_commands", dest="allow_commands", type=truth, metavar="true",
                          default=os.environ.get("MAE_DIST_DATA__ALLOW_COMMANDS", "false"),
                          help="run the commands, read the paths and other servers that a manifest names")  # fmt: skip

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse's. What would be dropped or counted double in silence is an error, or is said."""
        words = list(args or ())
        if any(word == "" or re.fullmatch(r"--[\w.-]+=", word) for word in words):
            self.error("an empty argument; is a variable of your shell not set?")
        found, rest = self.parse_known_args(words, namespace)
        for word in rest:
            name = word.partition("=")[0]
            begun = [option for option in self._option_string_actions if option.startswith(name)]
            near = begun or get_close_matches(name, self._option_string_actions, n=1, cutoff=0.5)
            self.error(f"{word}: unexpected" + (f"; did you mean {near[0]}?" if near else ""))
        for action in self._actions:
            name = "/".join(action.option_strings) or action.dest.upper()
            value = getattr(found, action.dest, None)
            if isinstance(value, list) and (twice := [str(v) for v, n in Counter(value).items() if n > 1]):
                self.error(f"{name}: {', '.join(twice)} is there twice; write each once")
            if sum(word.partition("=")[0] in action.option_strings for word in words) > 1:
                note(f"{name}: given twice; the later one is used")
        return found


def whole(low: int, high: int = MOST_SEED) -> Callable[[str], int]:
    """A type for argparse: a whole number in that range."""

    def convert(text: str) -> int:
        if not re.fullmatch(r"[-+]?\d+", text) or not low <= int(text) <= high:
            most = f" and at most {high}" if high < MOST_SEED else ""
            raise argparse.ArgumentTypeError(f"{text}: write a whole number of at least {low}{most}")
        return int(text)

    return convert


def truth(text: str) -> bool:
    """`true` or `false`, as in a config."""
    from mae_dist.values import BOOLS

    if text.lower() not in BOOLS:
        raise argparse.ArgumentTypeError(f"{text}: write true or false")
    return BOOLS[text.lower()]


def share(text: str) -> float:
    """A number in (0, 1]."""
    if not re.fullmatch(r"\d*\.?\d+(e-?\d+)?", text, re.IGNORECASE) or not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text}: write a share above 0 and at most 1, such as 0.1")
    return float(text)


def share_or_none(text: str) -> float:
    """A number in [0, 1]."""
    return 0.0 if re.fullmatch(r"0+(\.0*)?", text) else share(text)


def ratio(text: str) -> float:
    """A share of patches to hide, in (0, 1)."""
    if (value := share(text)) == 1:
        raise argparse.ArgumentTypeError(f"{text}: some patches must be seen; write a share below 1, such as 0.75")
    return value


def part(text: str) -> tuple[int, int]:
    """`2/8` -> (2, 8)."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    i, n = map(int, found.groups()) if found else (0, 0)
    if i >= n:
        raise argparse.ArgumentTypeError(f"{text}: write I/N; of four the parts are 0/4, 1/4, 2/4 and 3/4")
    return i, n


def size(text: str) -> int | tuple[int, int]:
    """`224` -> 224, `224x160` -> (224, 160)."""
    if not re.fullmatch(r"[1-9]\d{0,4}(x[1-9]\d{0,4})?", text):
        raise argparse.ArgumentTypeError(f"{text}: write pixels, such as 224, or height x width, such as 224x160")
    sides = tuple(map(int, text.split("x")))
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def resize(text: str) -> str:
    """What `Conversion.resize` takes."""
    if text != "none" and not re.fullmatch(r"(shortest|only-if-bigger):[1-9]\d{0,4}", text):
        raise argparse.ArgumentTypeError(f"{text}: write none, shortest:256 or only-if-bigger:512")
    return text


def picture(text: str) -> Path:
    """A file that pictures can be written to; its directory is made. Raises UserError for what is none."""
    from PIL import Image

    path = Path(text)
    check_local(text, "a picture")
    bare = Path(path.name.lstrip("."))  # dots in front begin no suffix
    try:
        Image.new("RGB", (1, 1)).save(BytesIO(), Image.registered_extensions()[bare.suffix.lower()])
    except (KeyError, OSError, ValueError):
        name = path.parent / f"{bare.stem or 'picture'}.png"
        raise UserError(f"{text}: no picture can be written under this name; write {name}") from None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{text}: its directory cannot be made: {error.strerror}; write another name") from None
    if path.is_dir():
        raise UserError(f"{text}: is a directory; write a file in it, such as {path / 'picture.png'}")
    return path


def save_picture(image: Any, path: Path) -> None:
    """Write a PIL image under a name that `picture` took, and print the name. Raises OSError that has the name too."""
    with naming(path, path):
        image.save(path)
    print(path)
