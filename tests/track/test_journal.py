"""The journal is valid JSON, survives torn tails and cuts, and never stops its writer."""

import errno
import json
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mae_dist.track import journal
from mae_dist.track.journal import Journal, read

pytestmark = pytest.mark.usefixtures("quick_disk")

text = st.text(max_size=8).filter(lambda s: s not in journal.NON_FINITE)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
times = st.floats(0, 2e9)
kinds = text.filter(lambda s: s not in journal.FIELDS)
stepped = st.fixed_dictionaries({"kind": kinds, "time": times, "step": st.integers(0, 20), "more": values})
stepless = st.fixed_dictionaries({"kind": kinds, "time": times, "more": values})
records = st.lists(stepped | stepless, max_size=12)
torn = st.binary(max_size=40).map(lambda tail: tail.replace(b"\n", b""))


def same(left: object, right: object) -> bool:
    """Equal, with nan equal to nan."""
    return repr(left) == repr(right)


def filled(tmp: Path, content: list[dict], tail: bytes = b"") -> Path:
    path = tmp / f"{os.urandom(6).hex()}.jsonl"
    opened = Journal(path)
    for record in content:
        opened.write(record)
    opened.close()
    with path.open("ab") as file:
        file.write(tail)
    return path


@pytest.fixture(scope="module")
def tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("journals")


@given(content=records, tail=torn)
def test_what_is_written_is_read_and_a_torn_tail_is_not(tmp: Path, content: list[dict], tail: bytes) -> None:
    path = filled(tmp, content, tail)
    assert same(list(read(path)), content)
    for line in path.read_bytes().split(b"\n")[: len(content)]:
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@given(content=records, tail=torn, step=st.integers(-1, 21), after=records)
def test_a_cut_drops_later_steps_and_nothing_else(
    tmp: Path, content: list[dict], tail: bytes, step: int, after: list[dict]
) -> None:
    path = filled(tmp, content, tail)
    opened = Journal(path)
    opened.cut(step)
    kept = [record for record in content if record.get("step", step) <= step]
    assert same(list(read(path)), kept)
    for record in after:
        opened.write(record)
    opened.cut(100)
    opened.close()
    assert same(list(read(path)), kept + after)
    assert not path.with_name(f"{path.name}.cut").exists()


def test_a_cut_keeps_starts_and_says_how_many_steps_are_run_again(tmp: Path) -> None:
    content = [{"kind": "start", "step": 4, "time": 1.0}, *({"step": k, "time": 2.0} for k in range(1, 8))]
    opened = Journal(filled(tmp, content))
    assert [opened.cut(step) for step in (9, 7, 5, 2)] == [0, 0, 2, 3]
    opened.close()
    assert [record["step"] for record in read(opened.path)] == [4, 1, 2]


@given(content=records, tail=torn, after=records)
def test_a_new_writer_repairs_the_tail(tmp: Path, content: list[dict], tail: bytes, after: list[dict]) -> None:
    path = filled(tmp, content, tail)
    opened = Journal(path)
    for record in after:
        opened.write(record)
    opened.close()
    assert same(list(read(path)), content + after)


def test_a_kept_line_keeps_its_bytes(tmp: Path) -> None:
    path = filled(tmp, [{"step": 1, "time": 1.0, "x": 0.1}, {"step": 2, "time": 2.0}])
    first = path.read_bytes().splitlines()[0]
    opened = Journal(path)
    opened.cut(1)
    opened.close()
    assert path.read_bytes() == first + b"\n"


def test_a_cut_that_dies_leaves_the_old_journal(tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = filled(tmp, [{"step": 1, "time": 1.0}, {"step": 2, "time": 2.0}])
    before = path.read_bytes()
    opened = Journal(path)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="killed here"):
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed here")))
        opened.cut(1)
    assert path.read_bytes() == before


def test_time_numbers_and_unknown_things(tmp: Path) -> None:
    path = filled(
        tmp, [{"a": np.float32(0.5), "b": torch.tensor(3), "c": np.float64("nan"), "d": Path("x"), "e": (1,)}]
    )
    (record,) = read(path)
    assert record["time"] > 1.7e9
    assert (record["a"], record["b"], record["d"], record["e"]) == (0.5, 3, "x", [1])
    assert math.isnan(record["c"])


def test_zeros_of_a_power_cut_are_passed_over(tmp: Path) -> None:
    path = filled(tmp, [{"step": 1, "time": 1.0}], b"\0\0\0\0\n[1]\n" + b'{"step":2,"time":2.0}\n')
    assert [record["step"] for record in read(path)] == [1, 2]


def test_a_line_is_with_the_system_at_once(tmp: Path) -> None:
    path = tmp / "new" / "journal.jsonl"
    opened = Journal(path)
    opened.write({"step": 1})
    assert len(list(read(path))) == 1
    opened.sync()
    opened.close()
    opened.close()


def test_threads_write_whole_records_and_lose_none(tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, write = Journal(tmp / "threads.jsonl"), os.write

    def slow(fd: int, data: bytearray) -> int:  # a part of a line, while the others want to write too
        with memoryview(data) as taken:
            time.sleep(0.001)
            return write(fd, taken[:20])

    def many(writer: int) -> None:
        for step in range(20):
            opened.write({"writer": writer, "step": step})
            opened.sync()

    monkeypatch.setattr(journal.os, "write", slow)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(many, range(3)))
    opened.close()
    found = list(read(opened.path))
    for writer in range(3):
        assert [record["step"] for record in found if record["writer"] == writer] == list(range(20))


def test_a_full_disk_stops_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    opened = Journal("/dev/full")
    for step in range(3):
        opened.write({"step": step})
    opened.sync()
    assert capsys.readouterr().err.count("No space left") == 1


def test_what_a_full_disk_refused_comes_later_in_its_place(tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp / "full.jsonl"
    opened = Journal(path)
    room = 30
    write = os.write

    def nearly_full(fd: int, data: bytearray) -> int:
        nonlocal room
        if room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = write(fd, bytes(data[:room]))
        room -= taken
        return taken

    with monkeypatch.context() as patch:
        patch.setattr(journal.os, "write", nearly_full)
        for step in range(4):
            opened.write({"step": step, "time": 1.0})
    assert len(list(read(path))) < 4
    opened.write({"step": 4, "time": 1.0})
    opened.close()
    assert [record["step"] for record in read(path)] == [0, 1, 2, 3, 4]


def test_what_never_found_room_is_kept_elsewhere(
    tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp))
    opened = Journal("/dev/full")
    for step in range(3):
        opened.write({"step": step})
    opened.close()
    said = capsys.readouterr().err
    assert "the last 3 lines could not be written, and are in " in said
    (kept,) = tmp.glob("mae_dist-journal-*.jsonl")
    assert str(kept) in said and [record["step"] for record in journal.read(kept)] == [0, 1, 2]


WRONG = ["abc", None, [1], {"a": 1}, True, -1, 0.5, 10**400, math.inf, "nan"]


@pytest.mark.parametrize("wrong", WRONG, ids=repr)
@pytest.mark.parametrize("field", ["time", "step", "metrics", "steps", "path", "tags", "artifacts"])
def test_a_field_of_a_wrong_type_is_no_record(tmp: Path, field: str, wrong: object) -> None:
    """Readers get sound records alone: they may compare, add up and index what they are given."""
    kinds = {"step": "metrics", "steps": "cut", "path": "artifact", "tags": "start", "artifacts": "start"}
    sound = {
        "kind": kinds.get(field, "metrics"),
        "time": 1.0,
        "step": 1,
        "metrics": {"a": 1.0},
        "steps": 1,
        "path": "p",
    }
    path = tmp / f"{os.urandom(6).hex()}.jsonl"
    path.write_text(json.dumps({**sound, field: wrong}) + "\n" + json.dumps(sound) + "\n")
    found = list(read(path))
    assert sound in found
    for record in found:
        assert 0 <= record["time"] < 1e11 and 0 <= record["step"] < 1 << 53 and type(record["step"]) is int
        assert isinstance(record["metrics"], dict) and type(record["steps"]) is int and isinstance(record["path"], str)
        assert isinstance(record.get("tags") or {}, dict) and isinstance(record.get("artifacts") or [], list)


@given(data=st.data())
def test_lines_that_a_disk_has_spoilt_are_counted_and_kept(tmp: Path, data: st.DataObject) -> None:
    """Any bytes flipped in any lines: each line is a record, or is named and still there after a cut."""
    path = filled(tmp, [{"kind": "metrics", "step": k, "time": 1.0, "metrics": {"loss/train": 1.0}} for k in range(8)])
    content = bytearray(path.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 2), max_size=6)):
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    lines = path.read_bytes().splitlines(keepends=True)
    spoilt = [line for line in lines if journal.parse(line) is None and line.endswith(b"\n")]
    opened = Journal(path)
    with redirect_stderr(StringIO()) as said:
        opened.cut(1 << 53)
    opened.close()
    assert path.read_bytes() == bytes(content)
    assert (f"{len(spoilt)} line" in said.getvalue()) == bool(spoilt)


def test_nesting_without_end_is_no_record() -> None:
    assert journal.parse(b"[" * 100_000) is None and journal.parse(b'{"a":' * 100_000) is None
