"""Images into tar shards: a plan, then many processes that carry it out, then one rename.

All is written into `OUT.partial`: `plan/` (the plan, one small record a finished shard) and `shards/`, which becomes
OUT when it is whole. A start that finds a plan goes on with it; so do other machines, each with its `--part`.
"""

import glob
import json
import os
import shutil
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import Any

from filelock import FileLock, Timeout

from mae_dist.errors import UserError, unreadable
from mae_dist.local import fsync, write_file
from mae_dist.shards.convert import Conversion
from mae_dist.shards.inputs import recognise
from mae_dist.shards.manifest import FILE_NAME, Manifest, Shard, with_checksum
from mae_dist.shards.notes import Notes
from mae_dist.shards.one_shard import Done, already_done, write_shard
from mae_dist.shards.plan import Plan, Recipe, make_plan
from mae_dist.shards.processes import find_ray, in_order, in_processes, on_ray
from mae_dist.shards.progress import Progress
from mae_dist.shards.publish import claim, is_empty, make_directory, named, read_if_there, release, upload
from mae_dist.shards.remote import is_remote
from mae_dist.shards.sources import refuse_changed
from mae_dist.urls import masked

BAD_NAME, SHOWN = "bad_images.txt", 3  # what was unreadable, and how many of them an error names
COUNTS_NAME = "counts.json"  # in OUT: what became of all that IMAGES holds
RECIPE_NAME = "recipe.json"  # in OUT: what made it, and how a late start knows that it is done


@dataclass(frozen=True)
class Place:
    """OUT, and the directory in which it is made: beside it, or inside it where OUT is a mount point."""

    out: str
    aside: Path

    @property
    def remote(self) -> bool:
        return is_remote(self.out)

    @property
    def url(self) -> str:
        """A remote OUT as a file may keep it; empty for a local one."""
        return masked(self.out.rstrip("/")) if self.remote else ""

    @property
    def plan(self) -> Path:
        return self.aside / "plan"

    @property
    def shards(self) -> Path:
        return self.aside / "shards"

    @property
    def inside(self) -> bool:
        return self.aside.parent == Path(self.out)

    @property
    def is_empty(self) -> bool:
        """Whether OUT is, but for what is at work inside it and what mkfs leaves. Raises UserError."""
        if not self.inside:
            return is_empty(self.out)
        names = [path.name for path in Path(self.out).iterdir()]
        return all(name == "lost+found" or name.startswith(self.aside.name) for name in names)

    def lock(self, name: str = "all", timeout: float = -1) -> FileLock:
        """Between the starts on all machines; the kernel takes it from a start that was killed."""
        return FileLock(self.aside / f"{name}.lock", timeout=timeout)

    def remove(self) -> None:
        """In one step for the other parts: they find all of it, or none."""
        if self.remote and (plan := Plan.load(self.plan)) and plan.mark:
            release(self.out, plan.mark)
        gone = f"{self.aside.name}.gone-"
        with suppress(FileNotFoundError):  # another part was faster
            self.aside.rename(self.aside.with_name(f"{gone}{socket.gethostname()}-{os.getpid()}"))
        for directory in self.aside.parent.glob(f"{glob.escape(gone)}*"):  # also of one that was killed right here
            shutil.rmtree(directory, ignore_errors=True)


def place_of(out: str | Path, aside: str | Path | None = None) -> Place:
    """OUT.partial beside a local OUT; NAME.partial in the current directory, or `aside`, for a remote one.

    A link stands for what it leads to. A mount point, which no rename can replace, has its .partial inside.
    Raises UserError for an `aside` where it would be of no use.
    """
    if not is_remote(str(out)):
        if aside:
            raise UserError(f"--aside is for a remote OUT; for {out} it is {out}.partial")
        path = Path(os.path.realpath(out)) if Path(out).is_symlink() else Path(out).absolute()
        return Place(str(path), path / ".partial" if path.is_mount() else Path(f"{path}.partial"))
    name = str(out).rstrip("/").rsplit("/", 1)[-1]
    return Place(str(out), Path(aside or f"{name}.partial").absolute())


def make_recipe(images: str | Path, labels: str | Path | None = None, **settings: Any) -> Recipe:
    """Recipe of absolute paths; `settings`: its other fields and those of Conversion. Raises UserError for bad ones."""
    how = {key: settings.pop(key) for key in ("resize", "quality", "exif_rotate", "max_pixels") if key in settings}
    if is_remote(str(images)):
        raise UserError(
            f"{images}: images are sharded from a local or mounted disk; for shards that lie elsewhere: mae-dist index"
        )
    absolute = [str(Path(path).absolute()) if path else None for path in (images, labels)]
    return Recipe(absolute[0] or "", absolute[1], conversion=Conversion(**how), **settings)


def refuse_inside(wanted: Recipe, place: Place) -> None:
    """Raises UserError when shards would be made among the images: another start would take them for some."""
    images, made = Path(wanted.images), place.aside if place.remote else Path(place.out)
    if images.is_dir() and Path(os.path.realpath(made)).is_relative_to(images.resolve()):
        name = "--aside" if place.remote else "OUT"
        raise UserError(f"{name} {made}: lies inside IMAGES, {images}; write a directory elsewhere")


def shard(
    images: str | Path,
    out: str | Path,
    workers: int = 1,
    max_bad: int = 0,
    part: tuple[int, int] = (0, 1),
    ray: str = "",
    aside: str | Path | None = None,
    **recipe: Any,
) -> Manifest | None:
    """Turn images into shards. The bytes depend on the images and the recipe alone; see `recognise` and `make_recipe`.

    `max_bad`: how many unreadable images to leave out before giving up. `part` (i, n): make shards i, i + n, ... only;
    None is returned while other parts are at work, and the part that ends last completes OUT. `ray`: address of a
    cluster to work on instead of `workers` processes. Raises UserError for any mistake in the input, with nothing left
    behind, unless shards were finished or other parts may be at work. A start that is killed or met too many unreadable
    images leaves OUT.partial, and the next goes on with it, whatever its `max_bad`.
    """
    if workers < 1 or max_bad < 0 or not 0 <= part[0] < part[1]:
        raise UserError(f"--workers {workers}, --max-bad {max_bad}, --part {part[0]}/{part[1]}: at least 1, 0, i < n")
    wanted, place = make_recipe(images, labels=recipe.pop("labels", None), **recipe), place_of(out, aside)
    refuse_inside(wanted, place)
    if ray:
        find_ray(ray)
    if finished := _finished_before(place, wanted):
        return finished
    with named(str(place.aside)):
        place.aside.mkdir(parents=True, exist_ok=True)
    try:
        with place.lock(f"part-{part[0]}-of-{part[1]}", timeout=0):
            plan = prepare(place, wanted, workers)
            for line in plan.notes.lines():  # before the hours that writing takes
                print(line, flush=True)
            carry_out(place, plan, workers, max_bad, part, ray)
            return finish(place, plan, max_bad, part)
    except Timeout:
        raise UserError(
            f"{place.aside}: another mae-dist shard is at work here; wait for it, or write --part"
        ) from None
    except OSError as error:
        if finished := _finished_before(place, wanted):
            return finished  # our shards were there, so the other parts completed OUT, and tidied up under us
        raise unreadable(
            error, f"{error}; start the same command again to go on: finished shards stay in {place.aside}"
        ) from error


def _finished_before(place: Place, wanted: Recipe) -> Manifest | None:
    """OUT, when an earlier start, or the other parts, have completed it by the same recipe: then this start is done.

    Raises UserError when OUT holds anything else and is not ours to go on with, or cannot be looked at.
    """
    with named(str(place.aside)):
        in_place = place.remote or place.inside  # then OUT fills up before all is done
        if (in_place and Plan.load(place.plan) is not None) or place.is_empty:
            return None
        recipe, text = (read_if_there(place.out, name) for name in (RECIPE_NAME, FILE_NAME))
        sources = sources_in(recipe)
        if recipe != wanted.text(sources) or not text:
            begun = "give the --aside that it was begun with, " if place.remote else ""
            raise UserError(
                f"{place.out}: already exists and is not empty; {begun}write a new directory or remove this one"
            )
        for line in refuse_changed(sources, wanted.labels, place.out).lines():
            print(line, flush=True)
        place.remove()  # left when a start was killed between completing OUT and tidying up
    return Manifest.parse(text, Path(place.out), place.out) if place.remote else Manifest.load(place.out)


def sources_in(recipe: str) -> dict[str, str]:
    """Those that a recipe.json was written with; none in that of an earlier version, or of somebody else."""
    with suppress(ValueError, AttributeError):
        return json.loads(recipe).get("sources", {})
    return {}


def prepare(place: Place, wanted: Recipe, workers: int) -> Plan:
    """The plan: an earlier start's, or a new one. Raises UserError when the earlier one was of another recipe."""
    with place.lock():
        plan = Plan.load(place.plan)
        if plan is None:
            if _finished_before(place, wanted):
                raise FileNotFoundError(f"{place.plan}: gone")
            try:
                for directory in (place.plan, place.shards):
                    shutil.rmtree(directory, ignore_errors=True)
                    directory.mkdir()
                if place.remote:
                    make_directory(place.out)
                source = recognise(wanted.images, **wanted.reading())
                pieces = source.pieces(partial(in_order, workers=workers))
                plan = make_plan(place.plan, wanted, source, pieces, place.url, token_hex(8) if place.remote else "")
                claim(place.out, plan.mark)
                return plan
            except UserError:
                place.remove()
                raise
        if plan.out and plan.out != place.url:
            raise UserError(
                f"{place.aside}: holds an unfinished start with OUT {plan.out}; write another --aside DIR, or remove it"
            )
        claim(place.out, plan.mark)
    if plan.recipe != wanted:
        before, now = ({**asdict(r), **asdict(r.conversion)} for r in (plan.recipe, wanted))
        changed = [key for key in now if now[key] != before[key] and key != "conversion"]
        differences = ", ".join(f"{key} {before[key]} (now {now[key]})" for key in changed)
        raise UserError(
            f"{place.aside}: holds an unfinished start with {differences}; give the same options, or remove it"
        )
    refuse_changed(plan.sources, plan.recipe.labels, str(place.aside))
    return plan


def carry_out(place: Place, plan: Plan, workers: int, max_bad: int, part: tuple[int, int], ray: str) -> None:
    """Write the shards of this part that are missing. Raises UserError beyond `max_bad` unreadable images in them."""
    every = already_done(place.aside, plan, place.out)
    mended = len(all_bad(plan, every)) > max_bad  # perhaps: shards with unreadable images are made again
    mine = range(part[0], plan.num_shards, part[1])
    done = {i: record for i, record in every.items() if i in mine and not (mended and record.bad)}
    missing = [i for i in mine if i not in done]
    bad = all_bad(plan, done)
    total = sum(min(plan.recipe.shard_size, plan.count - i * plan.recipe.shard_size) for i in mine)
    progress = Progress(f"shard {Path(place.out).name}", total, sum(record.images for record in done.values()))
    work = partial(write_shard, place.aside, place.out if place.remote else "")
    results = on_ray(work, missing, ray) if ray else in_processes(work, missing, workers)
    try:
        for record in results if len(bad) <= max_bad else ():
            if record:
                progress.add(record.images, record.shard.num_bytes if record.shard else 0)
                bad += record.bad
            progress.tick()
            if len(bad) > max_bad:
                break
    finally:
        results.close()  # what is being written is finished first, so that it counts
        progress.close()
    if len(bad) > max_bad:
        raise too_many_bad(place, plan, part)


def all_bad(plan: Plan, done: Mapping[int, Done]) -> list[str]:
    """What was unreadable in the input and in these shards, in their order."""
    return [*plan.bad, *(line for i in sorted(done) for line in done[i].bad)]


def too_many_bad(place: Place, plan: Plan, part: tuple[int, int]) -> UserError:
    """The error, which names the first of them. OUT.partial stays, with a list of all, unless no shard is finished."""
    done = already_done(place.aside, plan, place.out)
    bad = all_bad(plan, done)
    first = f"{len(bad)} unreadable image{'s'[: len(bad) > 1]}: {'; '.join(bad[:SHOWN])}"
    advice = f"leave such images out with --max-bad N (so far {len(bad)})"
    if not any(record.shard for record in done.values()) and part[1] == 1:
        place.remove()
        return UserError(f"{first}; mend or remove it, or {advice}")
    listing = place.aside / BAD_NAME
    write_list(listing, bad)
    more = f"; all are in {listing}" if len(bad) > SHOWN else ""
    return UserError(
        f"{first}{more}; mend them, or {advice}: the same command then "
        f"goes on, and finished shards stay in {place.aside} (remove it if images come or go, or a tar was mended)"
    )


def finish(place: Place, plan: Plan, max_bad: int, part: tuple[int, int]) -> Manifest | None:
    """Complete OUT if every shard is there, whichever part wrote it. None: other parts have not ended yet.

    Raises UserError beyond `max_bad` unreadable images in all of them.
    """
    with place.lock():
        if Plan.load(place.plan) is None:
            raise FileNotFoundError(f"{place.plan}: gone")
        done = already_done(place.aside, plan, place.out)
        if len(done) < plan.num_shards:
            return None
        records: list[Done] = [done[i] for i in range(plan.num_shards)]
        shards = [record.shard for record in records if record.shard]
        bad = all_bad(plan, done)
        if not shards:
            place.remove()
            raise UserError(f"{plan.recipe.images}: none of the {plan.count} images is readable, such as {bad[0]}")
        if len(bad) > max_bad:
            raise too_many_bad(place, plan, part)
        notes = refuse_changed(plan.sources, plan.recipe.labels, str(place.aside))
        for found in (plan.notes, *(record.notes for record in records)):
            notes.update_from(found)
        manifest = complete(place, plan, shards, bad, notes)
        place.remove()
        return manifest


def write_list(path: Path, lines: Sequence[str]) -> None:
    """A line each; names as the file system has them, but for line breaks."""
    write_file(path, "".join(line.replace("\n", "\\n") + "\n" for line in lines).encode(errors="surrogateescape"))


def summary(out: str | Path) -> str:
    """What became of all that IMAGES holds, in one line. `out`: complete, of this version."""
    if not (text := read_if_there(str(out), COUNTS_NAME)):
        return ""
    try:
        counts = json.loads(text)
        stored, bad, notes = counts["stored"], counts["bad"], Notes(counts["left_out"]).lines()
        named = f" + {bad} bad, listed in {BAD_NAME}" if bad else ""
        return "; ".join((f"{stored + bad} images in = {stored} stored{named}", *notes))
    except (ValueError, TypeError, KeyError, RecursionError):
        return f"{out}: {COUNTS_NAME} is damaged: what was left out of the shards is not known"


def complete(place: Place, plan: Plan, shards: Sequence[Shard], bad: Sequence[str], notes: Notes) -> Manifest:
    """All that lies in OUT beside the shards, and OUT. Done again, it does the same."""
    manifest = Manifest(place.shards, shards, plan.classes)
    shards = [with_checksum(shard, manifest.index_path(i), Path(place.out)) for i, shard in enumerate(shards)]
    manifest = replace(manifest, shards=shards)
    indexes = {manifest.index_path(i) for i in range(len(shards))}
    expected = indexes | {manifest.tar_path(i) for i in range(len(shards))}
    for path in place.shards.iterdir():
        if path not in expected:
            path.unlink()  # half-written by a start that was killed
    if bad:
        write_list(place.shards / BAD_NAME, bad)
    counts = {"stored": manifest.num_samples, "bad": len(bad), "left_out": notes}
    write_file(place.shards / COUNTS_NAME, json.dumps(counts, indent=1) + "\n")
    write_file(place.shards / RECIPE_NAME, plan.recipe.text(plan.sources))
    manifest.save()
    if place.remote:
        others = (path for path in place.shards.iterdir() if path not in indexes)
        for path in sorted(others, key=lambda path: path.name == FILE_NAME):  # the manifest last: then OUT is whole
            upload(path, place.out)
        return manifest
    out = Path(place.out)
    if place.inside:
        for path in sorted(place.shards.iterdir(), key=lambda path: path.name == FILE_NAME):  # the manifest last
            if path.name == FILE_NAME:
                fsync(out)
            path.rename(out / path.name)
    else:
        if out.exists():
            out.rmdir()
        place.shards.rename(out)
    fsync(place.aside.parent)
    return Manifest(out, shards, plan.classes)
