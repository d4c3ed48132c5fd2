"""A checkpoint exists or it does not, and what exists is known to be whole.

Every rank writes its files into one hidden directory, fsyncs them, and then says so in a file beside them: the size and
SHA-256 of each. When all ranks have, rank 0 puts what they say into `meta.json` and renames the directory, once. That
takes no collective, so it may go on beside the training. Nothing points at a checkpoint: the newest is found by
looking, and its bytes are compared with `meta.json` before they are used.

The hidden directory's name has a word that the ranks of one attempt agreed on: what a rank of an earlier attempt left,
or still writes, is never taken for a part of this one's.
"""

import hashlib
import json
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any, Protocol

import torch

from mae_dist.engine.world import World
from mae_dist.errors import MachineFault, UserError, machine_fault
from mae_dist.local import allow_as_umask, fsync, make_directory, naming, write_file

COMMITTED = re.compile(r"step-(\d{8})")
META = "meta.json"
UNFINISHED = (".step-*", ".old-*")  # of a process that was killed while saving or deleting
DAMAGED = ".damaged-"
LOOK = 0.05  # seconds between two looks for the other ranks' files


def step_of(checkpoint: Path) -> int:
    """Updates done when it was written."""
    match = COMMITTED.fullmatch(checkpoint.name)
    if not match:
        raise ValueError(f"{checkpoint} is not named like a checkpoint (step-00000100)")
    return int(match[1])


def committed(root: Path) -> list[Path]:
    """The checkpoints under `root`, oldest first; none where there is no `root`. Raises OSError: `glob` would not."""
    try:
        return sorted((path for path in root.iterdir() if COMMITTED.fullmatch(path.name)), key=step_of)
    except FileNotFoundError:
        return []


def surplus(steps: list[int], keep: int, keep_every: int | None) -> list[int]:
    """Of `steps` (rising), those to delete: not among the last `keep`, and no multiple of `keep_every`."""
    return [step for step in steps[: -max(1, keep)] if not keep_every or step % keep_every]


def read_meta(checkpoint: Path) -> dict:
    with naming(checkpoint / META):
        return json.loads((checkpoint / META).read_text())


def digest(path: Path) -> dict[str, Any]:
    with naming(path), path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def check_alien(checkpoint: Path, meta: dict) -> None:
    """Raise UserError for what a hand has done to a whole checkpoint: another step's name, a file of another one."""
    if meta["step"] != step_of(checkpoint):
        own = f"step-{meta['step']:08d}"
        raise UserError(f"{checkpoint}: {META} says that it was written at step {meta['step']}; name it {own}, "
                        "or move it away")  # fmt: skip
    if alien := sorted(path.name for path in checkpoint.glob("*.safetensors") if path.name not in meta["files"]):
        raise UserError(f"{checkpoint}: {', '.join(alien)}: not written with this checkpoint ({META} lists others); "
                        "remove it")  # fmt: skip


def write_meta(checkpoint: Path, meta: dict, files: dict[str, dict[str, Any]]) -> None:
    """`files`: the `digest` of each, by name."""
    content = meta | {"files": files}
    write_file(checkpoint / META, as_json(content | {"seal": seal(content)}))


def as_json(content: dict) -> str:
    return json.dumps(content, indent=1) + "\n"


def seal(meta: dict) -> str:
    """A checksum of all that `meta.json` says, but of the checksum itself."""
    rest = {key: value for key, value in meta.items() if key != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def problems(checkpoint: Path, of: slice = slice(None), names: Iterable[str] | None = None) -> list[str]:
    """What is damaged, a line each: `meta.json`, and of the files it lists those in `of` or `names` (all of them).

    Damaged is what is missing, or was read and is something else. Raises OSError for what cannot be read: that says
    nothing of the bytes.
    """
    try:
        meta = read_meta(checkpoint)
        if meta["seal"] != seal(meta):
            return [f"{checkpoint / META}: not what was written (checksum)"]
        files = meta["files"]
    except FileNotFoundError:
        return [f"{checkpoint / META}: missing"]
    except (ValueError, KeyError, TypeError):
        return [f"{checkpoint / META}: not what was written (no list of files)"]
    found = (problem(checkpoint / name, files.get(name)) for name in (sorted(files)[of] if names is None else names))
    return [text for text in found if text]


def problem(path: Path, expected: dict[str, Any] | None) -> str | None:
    try:
        size = path.stat().st_size
        if expected is None:
            return f"{path}: missing"
        if size != expected["bytes"]:
            return f"{path}: {size} bytes, {expected['bytes']} were written"
        return None if digest(path) == expected else f"{path}: not the bytes that were written (checksum)"
    except FileNotFoundError:
        return f"{path}: missing"


class Share(Protocol):
    """One rank's part of a checkpoint."""

    @property
    def broken(self) -> str:
        """The first tensor of the whole state that is not finite, the same on every rank; empty: none."""
        ...

    def write(self, directory: Path) -> list[Path]:
        """Write it into an existing directory; returns the files. Talks to no other rank."""
        ...


class Checkpoints:
    """The checkpoints of one run, in `root`. Every rank makes one."""

    def __init__(self, root: Path, world: World, keep: int, keep_every: int | None = None):
        self.root, self.world, self.keep, self.keep_every = root, world, keep, keep_every
        self.attempt = world.broadcast(secrets.token_hex(4))
        if world.is_main:
            make_directory(root)
            for leftover in (path for pattern in UNFINISHED for path in root.glob(pattern)):
                shutil.rmtree(leftover, ignore_errors=True)
        world.barrier()

    def newest(self) -> Path | None:
        """The newest whole checkpoint, the same on all ranks; damaged ones are named and set aside. Collective.

        Raises UserError when there are only damaged ones: a run does not begin again without being told to. Raises
        MachineFault, on all ranks, where one cannot read its share: then nothing is set aside.
        """
        main, aside = self.world.is_main, False
        while True:
            found = self._readable(lambda: committed(self.root) if main else [])
            newest: Path | None = self.world.broadcast(found[-1] if found else None)
            if newest is None:
                if self.world.broadcast(aside or any(self.root.glob(f"{DAMAGED}*"))):
                    raise UserError(
                        f"{self.root}: only damaged checkpoints ({DAMAGED}step-*); put back a copy of one, or start "
                        "another run with --train.name NAME, or delete them to start this one from the beginning"
                    )
                return None
            bad = self._readable(partial(problems, newest, slice(self.world.rank, None, self.world.size)))
            for line in bad:
                if main or META not in line:  # which every rank reads
                    print(f"warning: damaged checkpoint: {line}", file=sys.stderr, flush=True)
            if not self.world.max(torch.tensor(float(bool(bad)), device=self.world.device)):
                return newest
            if main:
                aside = True
                self._set_aside(newest)

    def _readable(self, look: Callable[[], list]) -> list:
        """What `look` finds, unless any rank could not read: the first one's reason is raised on all. Collective."""
        found, fault = [], None
        try:
            found = look()
        except OSError as error:
            fault = machine_fault(error) or MachineFault(str(error))
        blind = int(
            self.world.max(torch.tensor(0.0 if fault is None else 1.0 + self.world.rank, device=self.world.device))
        )
        if blind:
            reason = self.world.broadcast(fault and (str(fault), fault.status), source=blind - 1)
            raise MachineFault(*reason)
        return found

    def _set_aside(self, damaged: Path) -> None:
        name, count = f"{DAMAGED}{damaged.name}", 1
        while (self.root / name).exists():
            name, count = f"{DAMAGED}{damaged.name}-{count}", count + 1
        damaged.rename(self.root / name)
        fsync(self.root)
        left = committed(self.root)
        use = f"; going on from {left[-1].name}" if left else ""
        print(f"warning: {damaged} is damaged: set aside as {name}{use}", file=sys.stderr, flush=True)

    def aside(self, step: int) -> Path:
        """Where the ranks write the checkpoint of `step` until it is whole."""
        return self.root / f".step-{step:08d}.{self.attempt}"

    def write_share(self, step: int, snapshot: Share) -> None:
        """Write this rank's files and, last, what they are. Raises OSError."""
        aside, word = self.aside(step), share_name(self.world.rank)
        aside.mkdir(exist_ok=True)
        files = {}
        for path in snapshot.write(aside):
            allow_as_umask(path)
            fsync(path)
            files[path.name] = digest(path)
        write_file(aside / word, as_json({"files": files}))

    def commit(self, step: int, meta: dict, abort: Event, patience: float) -> int:
        """On rank 0: wait for every rank's files and make them a checkpoint; returns its bytes.

        Raises OSError when a rank could not write, or after `patience` seconds, or when told to `abort`.
        """
        aside, final = self.aside(step), self.root / f"step-{step:08d}"
        words = self._words(aside, abort, patience)
        files = {name: file for word in words.values() for name, file in word["files"].items()}
        for name in words:
            (aside / name).unlink()
        write_meta(aside, {"step": step} | meta, files)  # and with it the names of all files survive a power cut
        aside.rename(final)
        fsync(self.root)
        return sum(file["bytes"] for file in files.values())

    def _words(self, aside: Path, abort: Event, patience: float) -> dict[str, dict]:
        """What every rank says of its files."""
        missing, deadline = {share_name(rank) for rank in range(self.world.size)}, time.monotonic() + patience
        words: dict[str, dict] = {}
        over = False
        while True:
            for name in sorted(missing & {path.name for path in aside.iterdir()}):
                words[name] = json.loads((aside / name).read_text())
                if "error" in words[name]:
                    raise OSError(words[name]["error"])
            missing -= words.keys()
            if not missing:
                return words
            if over:
                ranks = ", ".join(str(int(name[5:10])) for name in sorted(missing))
                waited = "" if abort.is_set() else f" after {patience:.0f} s"
                raise OSError(f"{aside}: no files from rank {ranks}{waited}")
            # Then one more look: the word may have come meanwhile.
            over = abort.wait(LOOK) or time.monotonic() > deadline

    def discard(self, step: int, why: str = "") -> None:
        """Delete what was written for `step`. Other ranks, with `why`: their own files alone, and tell rank 0 why.

        Raises OSError when it cannot be told.
        """
        aside, rank = self.aside(step), self.world.rank
        if self.world.is_main or not why:
            shutil.rmtree(aside, ignore_errors=True)
            return
        for path in aside.glob(f"*-{rank:05d}-of-*"):  # first: on a full disk, this makes room for the word
            path.unlink()
        write_file(aside / share_name(rank), as_json({"error": f"rank {rank}: {why}"}))

    def retire(self) -> None:
        """On rank 0: delete what is not to be kept; never half a checkpoint under a committed name."""
        there = {step_of(path): path for path in committed(self.root)}
        for step in surplus(list(there), self.keep, self.keep_every):
            try:
                doomed = there[step].rename(self.root / f".old-{there[step].name}")
                shutil.rmtree(doomed)
            except OSError as error:  # the new one is there all the same
                print(f"warning: an old checkpoint cannot be deleted: {error}", file=sys.stderr, flush=True)


def share_name(rank: int) -> str:
    return f"rank-{rank:05d}.json"
