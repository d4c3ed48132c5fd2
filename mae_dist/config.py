"""The whole configuration: nested frozen dataclasses, filled from the environment, YAML files and the command line.

The dataclasses stand beside what they configure; this file puts them together, loads, checks and prints them. Parsing
and type checks are jsonargparse's; the messages are ours: file, key, what was expected, what was probably meant.
"""

import dataclasses
import math
import re
from argparse import ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher, get_close_matches
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentParser

from mae_dist.data.options import DataConfig
from mae_dist.engine.base import OptimConfig
from mae_dist.engine.options import EngineConfig
from mae_dist.errors import UserError
from mae_dist.model import MAEConfig
from mae_dist.track import TrackConfig
from mae_dist.train.options import TrainConfig

C = TypeVar("C")
ENVIRONMENT_PREFIX = "MAE_DIST"  # MAE_DIST_TRAIN__SEED=1


@dataclass(frozen=True)
class Config:
    model: MAEConfig = field(default_factory=MAEConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    track: TrackConfig = field(default_factory=TrackConfig)

    def check(self) -> None:
        """Raise UserError for everything that is wrong whatever the machine."""
        self.model.check()
        self.data.check(self.model.in_chans)
        self.optim.check()
        self.train.check()
        self.engine.check()
        if self.data.mode == "webdataset" and not self.data.epoch_size and not self.train.steps:
            raise UserError(
                "data.epoch_size: not set, and a list of shards does not say how many images it holds; "
                "write --data.epoch_size N, or how long to train: --train.steps N"
            )

    def with_epoch_size(self) -> "Config":
        """The same with `data.epoch_size` said where it follows from `train.steps`."""
        if self.data.mode == "exact" or self.data.epoch_size or not self.train.steps:
            return self
        size = math.ceil(self.train.steps * self.train.global_batch_size / self.train.epochs)
        return dataclasses.replace(self, data=dataclasses.replace(self.data, epoch_size=size))

    def to_yaml(self) -> str:
        """Every value, defaults too; loading it gives this config again."""
        return to_yaml(self)


def to_yaml(config: Any) -> str:
    """Every value of a config dataclass as YAML."""
    return yaml.safe_dump(plain(dataclasses.asdict(config)), sort_keys=False)


def plain(value: Any) -> Any:
    """Tuples as lists: YAML has no tuples."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, tuple | list) else value


def flat(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("data.shards", value) for every leaf of a config."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from flat(value, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, value


@lru_cache
def keys_of(kind: type) -> list[str]:
    """Every key of a config dataclass: section.name."""
    return [key for key, _ in flat(kind())]


def parser(prog: str = "mae-dist pretrain", kind: type = Config) -> ArgumentParser:
    """The command line of everything that takes a config of this kind."""
    made = ArgumentParser(
        prog=prog,
        exit_on_error=False,
        default_env=True,
        env_prefix=ENVIRONMENT_PREFIX,
        description="Any key can be set on the command line (--data.shards DIR) and in the environment "
        f"({ENVIRONMENT_PREFIX}_DATA__SHARDS=DIR); the command line wins, then --config files, then the environment.",
    )
    made.add_argument("--config", action="config", help="YAML file; may be given several times, later files win.")
    made.add_class_arguments(kind)
    return made


def load(
    arguments: Sequence[str],
    prog: str = "mae-dist pretrain",
    kind: type[C] = Config,
    defaults: Mapping[str, Any] | None = None,
) -> C:
    """The config of a command line. `--help` and `--print_config` print and exit 0.

    `kind`: the dataclass of its sections. `defaults`: values of keys that win over the dataclass's own only.
    Raises UserError with the file or option, the key, what was expected, and the nearest key for a misspelt one.
    """
    for path in config_files(arguments):
        check_file(Path(path), kind)
    for option in (argument.split("=")[0] for argument in arguments):
        if option.startswith("--") and "." in option:
            check_key(option[2:], "--", kind)
    made = parser(prog, kind)
    made.set_defaults(dict(defaults or {}))
    try:
        sections = made.instantiate(made.parse_args(list(arguments)))
        return kind(**{f.name: sections[f.name] for f in dataclasses.fields(kind)})  # type: ignore[arg-type]
    except (ArgumentError, TypeError) as error:
        raise UserError(readable(str(error), "")) from None


def config_files(arguments: Sequence[str]) -> list[str]:
    """The values of `--config FILE` and `--config=FILE`."""
    spread = [
        word for argument in arguments for word in (argument.split("=", 1) if "--config=" in argument else [argument])
    ]
    return [value for option, value in pairwise(spread) if option == "--config"]


def check_file(path: Path, kind: type = Config) -> None:
    """Parse one file alone, so that a message can name it."""
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror}; write --config FILE, such as configs/demo.yaml"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}; write sections such as\ntrain:\n  seed: 0")
    for section, values in content.items():
        keys = [f"{section}.{key}" for key in values] if isinstance(values, dict) else [str(section)]
        for key in keys:
            check_key(key, f"{path}: ", kind)
    try:
        parser(kind=kind).parse_object(content)
    except (ArgumentError, TypeError) as error:
        raise UserError(readable(str(error), f"{path}: ")) from None


def check_key(key: str, where: str, kind: type = Config) -> None:
    """Raise UserError when no config has this key, with the nearest one."""
    sections = [f.name for f in dataclasses.fields(kind)]
    keys = keys_of(kind)
    if key in keys:
        return
    if key in sections:
        raise UserError(f"{where}{key}: is a section; write its keys indented below it")
    section, _, name = key.rpartition(".")
    similar = {
        k: SequenceMatcher(None, name, k.split(".")[1]).ratio() + 0.1 * (k.split(".")[0] == section) for k in keys
    }
    best = sorted((k for k in keys if similar[k] >= 0.65), key=lambda k: -similar[k])
    if section not in sections:
        near = get_close_matches(key, [*sections, *keys], n=1)
    else:  # one clear answer, or a few
        near = best[:1] if best and similar[best[0]] > 0.9 else best[:4]
    hint = f"did you mean {' or '.join(near)}?" if near else f"the sections are {', '.join(sections)}"
    raise UserError(f"{where}{key}: unknown key, {hint}")


def readable(message: str, where: str) -> str:
    """jsonargparse's message in one line of ours."""
    message = " ".join(message.split())
    found = re.search(r'Parser key "([\w.]+)":? (.*)', message)
    if not found:
        return where + message
    key, text = found.groups()
    text = re.sub(r"a <class '(\w+)'>", r"\1", text).replace("typing.", "")
    return f"{where}{key}: {text[:1].lower()}{text[1:]}"
