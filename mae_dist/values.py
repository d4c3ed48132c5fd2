"""What people write, as text, and what a key takes it for: the same rules for files, options and variables."""

import math
import re
import types
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

import yaml

from mae_dist.errors import UserError
from mae_dist.urls import masked

NULLS = ("null", "Null", "NULL", "~", "")
NOT_NULL = "None"  # Python's word: text to YAML, and surely no name for a directory
BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
INT = re.compile(r"[-+]?(0|[1-9][\d_]*)")  # 010 is 8 to some readers of YAML and 10 to others: neither here
FLOAT = re.compile(r"[-+]?((0|[1-9][\d_]*)(\.\d*)?|\.\d+)([eE][-+]?\d+)?")  # 3e-4 too; no nan, no inf
LONGEST = 1_000_000  # bytes of a config file: the whole of any is a few thousand, and /dev/zero has no end
NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "null"}
EXAMPLE = "sections such as train: with keys such as seed: 0 indented below it"


class Text(NamedTuple):
    """One value as it is written. What stands in quotes in a file is neither null nor a number where text may be."""

    text: str
    quoted: bool = False


class Written(NamedTuple):
    """A key with its value, and where it stands, to begin a message with ("x.yaml: line 3: ", "--", "" ...)."""

    where: str
    key: str
    value: Text | list[Text]


def value_of(kind: Any, written: Written) -> Any:
    """What is written, as the type of its key. Raises UserError with what was expected and what was found."""
    try:
        return convert(kind, written.value)
    except ValueError:
        value = written.value
        found = f"[{', '.join(item.text for item in value)}]" if isinstance(value, list) else value.text or "nothing"
        found = found.replace("\n", "\\n")
        message = f"{written.where}{written.key}: expected {describe(kind)}. Got value: {found}"
        raise UserError(masked(message)) from None


def convert(kind: Any, value: Text | list[Text]) -> Any:
    """A value as one of the types of a config's fields. Raises ValueError."""
    if get_origin(kind) in (Union, types.UnionType):
        quoted = isinstance(value, Text) and value.quoted
        for option in sorted(get_args(kind), key=lambda option: (option is str) != quoted):  # anything is text
            with suppress(ValueError):
                return convert(option, value)
        raise ValueError
    if get_origin(kind) is tuple:
        items, of = listed(value), get_args(kind)
        of = of[:1] * len(items) if of[-1] is Ellipsis else of
        return tuple(convert(item, text) for item, text in zip(of, items, strict=True))
    if isinstance(value, list):
        raise ValueError
    text = value.text
    if get_origin(kind) is Literal and text in get_args(kind):
        return text
    if kind is types.NoneType and text in NULLS and not value.quoted:
        return None
    if kind is bool and text.lower() in BOOLS:
        return BOOLS[text.lower()]
    if kind is int and INT.fullmatch(text):
        return int(text)
    if kind is float and FLOAT.fullmatch(text) and math.isfinite(float(text)):
        if not float(text) and re.match(r"[-+.0_]*[1-9]", text):  # 1e-400
            raise ValueError
        return float(text)
    if kind is str and text and (value.quoted or text not in (*NULLS, NOT_NULL)):
        return text
    raise ValueError


def listed(value: Text | list[Text]) -> list[Text]:
    """The items of a list, which an option or a variable holds as `[0.9, 0.95]`. Raises ValueError for no list."""
    if isinstance(value, list):
        return value
    try:
        node = yaml.compose(value.text, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError):
        raise ValueError from None
    return texts(node)


def texts(node: Any) -> list[Text]:
    """The items of a YAML list of plain values. Raises ValueError for anything else."""
    if not isinstance(node, yaml.SequenceNode) or not all(isinstance(item, yaml.ScalarNode) for item in node.value):
        raise ValueError
    return [Text(item.value, item.style is not None) for item in node.value]


def describe(kind: Any) -> str:
    """The type of a key in words: "a whole number or null", "[a number, a number]"."""
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(map(describe, get_args(kind)))
    if get_origin(kind) is Literal:
        *others, last = map(str, get_args(kind))
        return f"{', '.join(others)} or {last}" if others else last
    if get_origin(kind) is tuple:
        return f"[{', '.join('...' if item is Ellipsis else describe(item) for item in get_args(kind))}]"
    return NAMES[kind]


def read_file(path: Path) -> Iterator[Written]:
    """Everything a YAML file says, `section.key` by `section.key`. Raises UserError that names the file and the line.

    A key that stands there twice is refused: readers of YAML take the last and drop the others in silence.
    """
    try:
        with path.open("rb") as file:  # which may be a pipe: --config <(...)
            content = file.read(LONGEST + 1)
        if len(content) > LONGEST:
            raise UserError(f"{path}: more than {LONGEST} bytes; write --config FILE, such as configs/demo.yaml")
        root: Any = yaml.compose(content.decode("utf-8-sig"), Loader=yaml.BaseLoader)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror}; write --config FILE, such as configs/demo.yaml"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not YAML: {error.reason} at byte {error.start}; save it as UTF-8") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if root is None:
        raise UserError(f"{path}: empty; write {EXAMPLE}, or leave --config out")
    if not isinstance(root, yaml.MappingNode):
        kind = "list" if isinstance(root, yaml.SequenceNode) else "single value"
        raise UserError(f"{path}: holds a {kind}; write {EXAMPLE}")
    lines: dict[str, int] = {}
    for where, section, node in entries(path, root, "", lines):
        if not isinstance(node, yaml.MappingNode):
            yield Written(where, section, leaf(where, section, node))
            continue
        if not node.value:
            raise UserError(f"{where}{section}: empty; write its keys, or leave it out")
        for place, key, value in entries(path, node, f"{section}.", lines):
            yield Written(place, key, leaf(place, key, value))


def entries(path: Path, mapping: Any, prefix: str, lines: dict[str, int]) -> Iterator[tuple[str, str, Any]]:
    """Where each key of a YAML mapping stands, its whole name, and its node. `lines`: of the keys before them."""
    for name, node in mapping.value:
        line = name.start_mark.line + 1
        where = f"{path}: line {line}: "
        key = f"{prefix}{name.value}"
        if not isinstance(name, yaml.ScalarNode):
            raise UserError(f"{where}a key that is no name; write {EXAMPLE}")
        if name.value == "<<" and name.style is None:
            raise UserError(f"{where}{key}: keys are not merged here; write them out")
        if key in lines:
            raise UserError(f"{where}{key}: stands on line {lines[key]} too; write it once, with all of it")
        lines[key] = line
        plain = {"tag:yaml.org,2002:str", "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map"}
        if tag := next((n.tag for n in (node, *listed_nodes(node)) if n.tag not in plain), None):
            raise UserError(f"{where}{key}: {tag}: a tag means nothing here; leave it out")
        yield where, key, node


def listed_nodes(node: Any) -> list[Any]:
    return node.value if isinstance(node, yaml.SequenceNode) else []


def leaf(where: str, key: str, node: Any) -> Text | list[Text]:
    """The value of a key. Raises UserError for what no key takes: a mapping, a list of lists."""
    if isinstance(node, yaml.ScalarNode):
        return Text(node.value, node.style is not None)
    try:
        return texts(node)
    except ValueError:
        raise UserError(f"{where}{key}: is no value; write one, or a list such as [0.9, 0.95]") from None
