"""The whole configuration: nested frozen dataclasses, filled from the environment, YAML files and the command line.

The dataclasses stand beside what they configure; this file puts them together, loads, checks and prints them. What
is written means what `values` says; every message names the file and line, option or variable, and the key.
"""

import dataclasses
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher, get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml

from mae_dist.data.options import DataConfig
from mae_dist.engine.optim import OptimConfig
from mae_dist.engine.options import EngineConfig
from mae_dist.errors import UserError, note
from mae_dist.manual import MANUALS
from mae_dist.model import MAEConfig
from mae_dist.track import TrackConfig
from mae_dist.train.options import TrainConfig
from mae_dist.urls import masked
from mae_dist.values import Text, Written, read_file, value_of

C = TypeVar("C")
ACCEPT, ALLOW = "train.accept_changes", "data.allow_commands"
PREFIX = "MAE_DIST_"  # MAE_DIST_TRAIN__SEED=1
CONFIG_VARIABLE = "MAE_DIST_CONFIG"  # a file, below those of the command line
REPLACED = {"optim.blr": "optim.lr", "train.epochs": "train.steps"}  # by what, where that is set
OTHER_VARIABLES = (CONFIG_VARIABLE, "MAE_DIST_GIT_COMMIT", "MAE_DIST_TURBOJPEG")  # no keys


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
        self.track.check()
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
    """Every value of a config dataclass as YAML, without secrets, and without what is said for one start."""
    content = plain(dataclasses.asdict(config))
    content["data"] |= {"allow_commands": False}
    content["train"] |= {"accept_changes": False}
    return yaml.safe_dump(content, sort_keys=False)


def plain(value: Any) -> Any:
    """Tuples as lists: YAML has no tuples. Text without its secrets."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, str):
        return masked(value)
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


@lru_cache
def types_of(kind: type) -> dict[str, Any]:
    """The type of every key of a config dataclass."""
    sections = {f.name: type(getattr(kind(), f.name)) for f in dataclasses.fields(kind)}
    return {f"{name}.{key}": hint for name, of in sections.items() for key, hint in get_type_hints(of).items()}


def load(
    arguments: Sequence[str],
    prog: str = "mae-dist pretrain",
    kind: type[C] = Config,
    defaults: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    runs: bool = True,
) -> C:
    """The config of a command line: options win, then --config files (the later one), then the environment.

    `--help` and `--print_config` print and exit 0. `kind`: the dataclass of its sections. `defaults`: values of keys
    that win over the dataclass's own only. `environ`: variables (None: this process's). `runs`: the config is to be
    run, so a file that names a command needs the user's word for it.
    Raises UserError with the file and line, option or variable, the key, what was expected, and the nearest key for a
    misspelt one.
    """
    environ = os.environ if environ is None else environ
    options, files, flags = parse(arguments, prog, kind)
    if "--help" in flags:
        print(MANUALS[prog].text(kind, defaults or {}))
        sys.exit(0)
    check_variables(environ, kind)
    if CONFIG_VARIABLE in environ:
        files.insert(0, said_by(environ, CONFIG_VARIABLE))
    values: dict[str, Any] = dict(flat(kind()))
    values |= defaults or {}
    unused = MANUALS[prog].unused
    without = {key: value for key, value in values.items() if key in unused or key.split(".")[0] in unused}
    layers = [("variable ", checked(variables(environ, kind), kind))]
    values |= layers[0][1]
    brought = ""  # by which file data.shards was
    for file in files:
        found = checked(read_file(Path(file)), kind)
        if found.get(ALLOW):
            raise UserError(
                f"{file}: {ALLOW}: a file cannot give this word; write --{ALLOW} true, or {variable(ALLOW)}"
            )
        if found.pop(ACCEPT, False):  # it would be accepted for ever
            note(f"{file}: {ACCEPT}: true is left out; it is for one start, on its command line")
        values |= found
        layers.append((f"{file}: ", found))
        brought = file if "data.shards" in found else brought
    told = checked(options, kind)
    values |= told
    check_replaced([*layers, ("--", told)], values)
    if brought and runs and "data.shards" not in told and "pipe:" in str(values["data.shards"]) and not values[ALLOW]:
        raise UserError(
            f"{brought}: data.shards: is a command: {values['data.shards']}; if you trust whoever wrote this file, "
            f"write --{ALLOW} true, or --data.shards yourself"
        )
    if idle := [f"{key}: {values[key]}" for key, value in without.items() if values[key] != value]:
        raise UserError(f"{', '.join(idle)}: without effect in {prog}; leave {'it' if len(idle) == 1 else 'them'} out")
    config = with_values(kind(), values)
    if "--print_config" in flags:
        print(to_yaml(config), end="")
        sys.exit(0)
    return config


def check_replaced(layers: Sequence[tuple[str, Mapping[str, Any]]], values: Mapping[str, Any]) -> None:
    """Raise UserError for a key that another one replaces and that is said later, or beside it: it has no effect.

    `layers`: where each is written, and its values, the winning one last. One file may have both: a run's own has all.
    """
    for key, by in REPLACED.items():
        last, other = (max((i for i, (_, of) in enumerate(layers) if name in of), default=-1) for name in (key, by))
        where = layers[last][0]
        beside = last == other and not where.endswith(": ")
        if last >= 0 and values[by] is not None and (last > other or beside) and values["data.mode"] == "exact":
            raise UserError(
                f"{where}{key}: {values[key]}, but {by} is {values[by]}, which replaces it; leave {key} out, or "
                f"write --{by} null"
            )


def with_values(config: C, values: Mapping[str, Any]) -> C:
    """A config with other values of some keys; lists are tuples in it."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = tuple(value) if isinstance(value, list) else value
    changed = {name: dataclasses.replace(getattr(config, name), **of) for name, of in sections.items()}
    return dataclasses.replace(config, **changed)  # type: ignore[type-var]


def parse(arguments: Sequence[str], prog: str, kind: type) -> tuple[list[Written], list[str], set[str]]:
    """What a command line says: options, the files of --config, and flags. Raises UserError for what is neither."""
    options: list[Written] = []
    files: list[str] = []
    flags: set[str] = set()
    words = list(arguments)
    while words:
        name, equals, value = words.pop(0).partition("=")
        name = "--help" if name == "-h" else name
        if not name.startswith("--") or name == "--":
            raise UserError(f"{prog}: {name}: no option stands before it; write --SECTION.KEY VALUE, see {prog} --help")
        if name in ("--help", "--print_config") and not equals:
            flags.add(name)
            continue
        if name != "--config":
            check_key(name[2:], "--", kind)
        if not equals and words and not words[0].startswith("--"):
            value = words.pop(0)
        if not value.strip():
            raise UserError(f"{name}: no value; write {name} " + ("FILE" if name == "--config" else "VALUE"))
        files.append(value) if name == "--config" else options.append(Written("--", name[2:], Text(value)))
    return options, files, flags


def variables(environ: Mapping[str, str], kind: type) -> list[Written]:
    """What the environment says of the keys of `kind`."""
    named = {variable(key): key for key in keys_of(kind)}
    found = {name: said_by(environ, name) for name in named if name in environ}
    return [Written(f"{name}: ", named[name], Text(text)) for name, text in found.items()]


def said_by(environ: Mapping[str, str], name: str) -> str:
    """What a variable says. Raises UserError for an empty one: is another variable, which it was to have, not set?"""
    if not environ[name].strip():
        raise UserError(f"{name}: empty; write a value, null where there is to be none, or unset it")
    return environ[name]


def variable(key: str) -> str:
    """train.seed -> MAE_DIST_TRAIN__SEED"""
    return PREFIX + key.replace(".", "__").upper()


def checked(layer: Iterable[Written], kind: type) -> dict[str, Any]:
    """The values of one layer by key. Raises UserError for an unknown key and for a wrong value.

    Of an option that is given twice, as scripts do with those of their callers, the later one is used, and said so.
    """
    values: dict[str, Any] = {}
    for written in layer:
        where, key, _ = written
        check_key(key, where, kind)
        value = value_of(types_of(kind)[key], written)
        if key in values and values[key] != value:
            note(masked(f"{where}{key}: given twice, as {values[key]} and as {value}; the later one is used"))
        values[key] = value
    return values


def check_variables(environ: Mapping[str, str], kind: type | None) -> None:
    """Raise UserError for a variable that looks like one of ours and is none, with the nearest.

    Those of keys that another command has are named. `kind`: of the command's config; None: it has none.
    """
    from mae_dist.evaluate.options import FinetuneConfig, LinearConfig  # which import this

    ours = [name for name in environ if name.upper().replace("_", "").startswith("MAEDIST") and name != PREFIX[:-1]]
    every = dict.fromkeys(variable(key) for k in (Config, FinetuneConfig, LinearConfig) for key in keys_of(k))
    for name in ours:
        if name not in every and name not in OTHER_VARIABLES:
            bare = name.upper().removeprefix(PREFIX)
            near = get_close_matches(bare, [known.removeprefix(PREFIX) for known in (*every, *OTHER_VARIABLES)], n=1)
            hint = f"did you mean {PREFIX}{near[0]}?" if near else f"keys are written as {variable('train.seed')}"
            raise UserError(f"{name}: no such variable, {hint} Or unset it")
    taken = {variable(key) for key in keys_of(kind)} if kind else set()
    taken |= {variable(ALLOW)}  # by commands with no config too
    if unused := [name for name in ours if name in every and name not in taken]:
        note(f"not used by this command: {', '.join(unused)}")


def check_key(key: str, where: str, kind: type = Config) -> None:
    """Raise UserError when no config has this key, with the nearest one."""
    sections = [f.name for f in dataclasses.fields(kind)]
    keys = keys_of(kind)
    if key in keys:
        return
    if key in sections:
        raise UserError(f"{where}{key}: is a section; write its keys indented below it, or --{key}.KEY VALUE")
    section, _, name = key.rpartition(".")
    similar = {
        k: SequenceMatcher(None, name, k.split(".")[1]).ratio() + 0.1 * (k.split(".")[0] == section) for k in keys
    }
    best = sorted((k for k in keys if similar[k] >= 0.65), key=lambda k: -similar[k])
    if section not in sections:
        near = get_close_matches(key, keys if section else sections, n=1)
    else:
        near = []
    near = near or (best[:1] if best and similar[best[0]] > 0.9 else best[:4])  # one clear answer, or a few
    hint = f"did you mean {' or '.join(near)}?" if near else f"the sections are {', '.join(sections)}"
    raise UserError(f"{where}{key}: unknown key, {hint}")
