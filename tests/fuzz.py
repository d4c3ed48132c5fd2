"""Inputs made wrong at random, from fixed seeds: what comes of each is right, named as bad, or one line and status 2.

    python -m tests.fuzz [--kinds tars labels manifests configs] [--first 0] [--count 1000] [--keep DIR]

A case is (kind, seed): it writes an input of which it knows what is in it, runs the command line in this process and
looks at what came out. Nothing else may happen: no traceback, no hang, no image without a word, no other label.
"""

import argparse
import io
import json
import random
import re
import shutil
import sys
import tarfile
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from mae_dist import cli
from mae_dist.errors import UserError


class Finding(AssertionError):
    """What went wrong with a case."""


class Done(NamedTuple):
    """How a command ended."""

    refused: str
    """The line of status 2; empty: it did what it was asked."""
    printed: str


def command(*arguments: object) -> Done:
    """One command, in this process. Raises Finding for whatever is neither success nor one line of a user's mistake."""
    printed = io.StringIO()
    name, *rest = map(str, arguments)
    try:
        with redirect_stdout(printed), redirect_stderr(printed):
            code = cli.COMMANDS[name](rest)
    except UserError as error:
        text = str(error)
        if not text.strip() or "Traceback" in text or len(text.strip().splitlines()) > 12:
            raise Finding(f"{name}: no message of one line: {text!r}") from error
        return Done(text, printed.getvalue())
    except SystemExit as error:
        raise Finding(f"{name}: exit {error.code}") from error
    except BaseException as error:
        raise Finding(f"{name}: {type(error).__name__}: {error}\n{traceback.format_exc()}") from error
    if code not in (0, 1):
        raise Finding(f"{name}: status {code}")
    return Done("" if code == 0 else f"status {code}: {printed.getvalue()}", printed.getvalue())


def picture(number: int, kind: str = "PNG", size: tuple[int, int] = (32, 24)) -> bytes:
    """An image of one colour, which says its number; of more blocks of a tar than `damage` takes away."""
    out = io.BytesIO()
    Image.new("RGB", size, colour(number)).save(out, kind, compress_level=0)
    return out.getvalue()


def colour(number: int) -> tuple[int, int, int]:
    return number % 7 * 40, number // 7 % 7 * 40, number // 49 * 40 % 256


def damage(draw: random.Random, data: bytes) -> bytes:
    """One thing that disks, networks and editors do to bytes."""
    at = draw.randrange(max(1, len(data)))
    block, count = at // 512 * 512, 512 * draw.randint(1, 3)
    return draw.choice([
        lambda: data[:at],
        lambda: data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :],
        lambda: data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :] if data else data,
        lambda: data[:block] + data[block + count :],
        lambda: data[:block] + data[block : block + count] + data[block:],
        lambda: data[:block] + bytes(count) + data[block + count :],
        lambda: data[:at] + draw.randbytes(draw.randint(1, 40)) + data[at:],
        lambda: data + data,
        lambda: data + draw.randbytes(draw.randint(1, 2000)),
        lambda: data[at:] + data[:at],
        lambda: b"",
    ])()  # fmt: skip


CASES: dict[str, Callable[[random.Random, Path], str]] = {}
"""By kind: makes one case in an empty directory; returns what came of it in a word, or raises Finding."""


def case(run: Callable[[random.Random, Path], str]) -> Callable[[random.Random, Path], str]:
    CASES[run.__name__] = run
    return run


class Stored(NamedTuple):
    colour: tuple[int, ...]
    """Empty: it cannot be decoded, which training and verify name."""
    label: int


def stored(shards: Path) -> list[Stored]:
    """The images of a directory of shards, as training reads them."""
    from mae_dist.data.decode import decode
    from mae_dist.shards.mirror import load_manifest
    from mae_dist.shards.store import open_store

    manifest = load_manifest(str(shards))
    store, found = open_store(manifest), []
    for shard, count in enumerate(manifest.counts.tolist()):
        for row in range(count):
            data, label = store.read(shard, row)
            try:
                pixels = np.asarray(decode(data, 3)).reshape(-1, 3)
                found.append(Stored(tuple(round(value / 40) * 40 for value in pixels.mean(0).tolist()), label))
            except Exception:  # decoders raise what they like
                found.append(Stored((), label))
    return found


@case
def labels(draw: random.Random, folder: Path) -> str:
    """A file of labels for ten images, and what an editor or a spreadsheet makes of it."""
    n = 10
    images = folder / "images"
    images.mkdir()
    for i in range(n):
        (images / f"img{i:02d}.png").write_bytes(picture(i))
    named, words = draw.random() < 0.6, draw.random() < 0.4
    truth = [draw.randrange(3) for _ in range(n)]
    truth[draw.randrange(n)] = 0
    word = (lambda label: f"class{label}") if words else str
    rows = [[f"img{i:02d}.png", word(truth[i])] if named else [word(truth[i])] for i in range(n)]
    separator = draw.choice([" ", "\t", ",", ", "]) if named else ""
    if named and draw.random() < 0.5:
        draw.shuffle(rows)
    if named and separator.startswith(",") and draw.random() < 0.5:
        rows.insert(0, ["filename", "label"])
    edit = draw.choice(["none", "drop", "double", "other", "lack", "odd", "name", "bytes", "blank", "case"])
    at = draw.randrange(len(rows))
    if edit == "drop":
        del rows[at]
    elif edit == "double":
        rows.append([*rows[at][:-1], word((truth[at % n] + 1) % 3)])
    elif edit == "lack":
        rows[at] = rows[at][:-1]
    elif edit == "odd":
        odd = draw.choice(["-1", "2.5", "1e3", "99999999999999999999", "nan", "", "?", "1 2"])
        rows[at] = [*rows[at][:-1], odd]
    elif edit == "name" and named:
        rows[at] = [draw.choice(["other.png", "images/", "IMG00.PNG", "img.png"]), rows[at][-1]]
    elif edit == "blank":
        rows.insert(at, [""])
    text = draw.choice(["\n", "\r\n"]).join(separator.join(row) for row in rows) + draw.choice(["", "\n"])
    data = text.encode(draw.choice(["utf-8", "utf-8", "utf-8-sig", "utf-16"]))
    data = damage(draw, data) if edit == "bytes" else data
    (folder / "labels").write_bytes(data)
    done = command("shard", images, folder / "out", "--labels", folder / "labels", "--workers", 1)
    if done.refused:
        if edit in ("none", "blank"):
            raise Finding(f"a good file is refused: {done.refused}: {data!r}")
        return "refused"
    if edit in ("drop", "double", "lack"):
        raise Finding(f"{edit} is taken: {data!r}")
    got = {each.colour: each.label for each in stored(folder / "out")}
    expected = {colour(i): sorted(set(truth)).index(truth[i]) if words else truth[i] for i in range(n)}
    if edit in ("none", "blank") and got != expected:
        raise Finding(f"labels {got} for {expected}: {data!r}")
    if len(got) != n:
        raise Finding(f"{len(got)} images of {n}")
    return "right" if got == expected else "as the file says"


def tar_of(members: list[tuple[str, bytes, bytes, str]]) -> bytes:
    """(name, type, data, link) each; PAX, GNU or USTAR headers as tarfile writes them."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, kind, data, link in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, link, len(data) if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


@case
def tars(draw: random.Random, folder: Path) -> str:
    """A tar of a few images with odd things between them, or whole and then damaged; `shard` and `index` of it."""
    n, labelled = draw.randint(1, 7), draw.random() < 0.5
    regular, members, truth = tarfile.REGTYPE, [], {}
    damaged = draw.random() < 0.5
    for i in range(n):
        truth[colour(i + 1)] = draw.randrange(4) if labelled else -1
        stem = f"{draw.choice(['', '', 'a/', './'])}{i:03d}"
        members.append((f"{stem}.{draw.choice(['png', 'png', 'PNG', 'jpg'])}", regular, picture(i + 1), ""))
        if labelled:
            members.append((f"{stem}.cls", regular, str(truth[colour(i + 1)]).encode(), ""))
        if not damaged and draw.random() < 0.4:
            members.append(odd_member(draw, stem, i, members[-1 - labelled][0]))
    data = tar_of(members)
    whole = data
    if damaged:
        data = damage(draw, data)
    (folder / "t.tar").write_bytes(data)
    links = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE)
    extra = [m for m in members if m[1] in links or (m[1] == regular and m[2][:4] in (b"GIF8", b"\x89PNG", b""))]
    possible = truth | {colour(100 + i): -1 for i in range(n)}
    outcomes = []
    for name, arguments in (
        ("shard", [folder / "t.tar", folder / "out"]),
        ("index", [folder / "t.tar", "--out", folder / "out-i"]),
    ):
        more = ["--max-bad", 5] if draw.random() < 0.5 else []
        done = command(name, *arguments, "--workers", 1, *more)
        if done.refused:
            if data == whole and len(members) == n * (1 + labelled):
                raise Finding(f"{name} refuses a good tar: {done.refused}")
            outcomes.append("refused")
            continue
        there = stored(Path(arguments[-1]))
        got = [each for each in there if each.colour]
        if name == "shard" and len(got) < len(there):
            raise Finding(f"shard stores what nobody can decode: {[m[0] for m in members]}")
        named = sum(int(count) for count in re.findall(r"(?:left out: |\+ )(\d+) ", done.printed))
        named += len(there) - len(got)
        wrong = [each for each in got if each.label not in (possible.get(each.colour, -2), -1)]
        if wrong or (any(each.label == -1 and each.colour in truth for each in got) and labelled and not named):
            raise Finding(f"{name}: {wrong or 'labels lost'}: {[m[0] for m in members]}; {done.printed}")
        lost = n - len({each.colour for each in got} & truth.keys())
        short = lost > named or len(got) + named < len(extra)
        if short and not (damaged and named):  # of a torn tar nobody knows what was in it
            raise Finding(f"{name}: {len(got)} stored, {named} named, of {[m[:2] for m in members]}: {done.printed}")
        if len(got) > len({each.colour for each in got}) + sum(m[1] in links for m in members):
            raise Finding(f"{name}: an image is there twice: {[m[0] for m in members]}")
        outcomes.append("named" if named else "right")
    return f"shard {outcomes[0]}, index {outcomes[1]}"


def odd_member(draw: random.Random, stem: str, i: int, image: str) -> tuple[str, bytes, bytes, str]:
    """Something that may lie beside an image."""
    out = io.BytesIO()
    Image.new("RGB", (8, 8), colour(100 + i)).save(out, "GIF")
    regular = tarfile.REGTYPE
    return draw.choice([
        (f"{stem}.seg.png", regular, picture(100 + i), ""),
        (f"{stem}x.gif", regular, out.getvalue(), ""),
        (f"{stem}.txt", regular, b"a caption", ""),
        (f"{stem}y", regular, picture(100 + i), ""),
        (f"._{i:03d}.png", regular, b"\0\5\x16\7", ""),
        (f"{stem}z.png", regular, b"", ""),
        (f"{stem}z.png", regular, b"no picture", ""),
        (f"{stem}z.png", tarfile.LNKTYPE, b"", image),
        (f"{stem}z.png", tarfile.SYMTYPE, b"", Path(image).name),
        (f"{stem}z.png", tarfile.SYMTYPE, b"", "nowhere.png"),
        (f"{stem}z.png", tarfile.FIFOTYPE, b"", ""),
        (f"{stem}z.png", tarfile.DIRTYPE, b"", ""),
        (f"{stem}.json", regular, draw.choice([b"{}", b"{", b"[1]", b'{"label": "x"}', b"\xff"]), ""),
        (image, regular, picture(i + 1), ""),
        ("/etc/passwd.png", regular, picture(100 + i), ""),
        (f"../{i}up.png", regular, picture(100 + i), ""),
        (f"{'d' * 150}/{i}.png", regular, picture(100 + i), ""),
        (f"caf\udce9{i}.png", regular, picture(100 + i), ""),
    ])  # fmt: skip


def good_shards(folder: Path) -> Path:
    """Two shards of six images, made once a process."""
    there = folder.parent / "good-shards"
    if not there.exists():
        images = folder.parent / "good-images"
        for i in range(12):
            (images / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
            (images / f"class{i % 2}" / f"{i:02d}.png").write_bytes(picture(i))
        done = command("shard", images, there, "--workers", 1, "--shard-size", 6)
        assert not done.refused, done
    return there


def tiny(shards: Path, runs: Path, *more: str) -> list[str]:
    return [
        "--model.enc_name=vit_tiny_patch16_224", "--model.img_size=8", "--model.patch_size=4", "--model.enc_dim=8",
        "--model.enc_depth=1", "--model.enc_heads=1", "--model.dec_dim=8", "--model.dec_depth=1",
        "--model.dec_heads=1", "--data.workers=0", "--optim.lr=1e-3", "--optim.warmup_epochs=0",
        "--train.precision=fp32", "--train.device=cpu", "--track.mlflow=false", f"--data.shards={shards}",
        f"--train.runs_dir={runs}", "--train.name=t", "--train.global_batch_size=12", "--train.steps=1",
        "--data.max_bad_fraction=0", *more,
    ]  # fmt: skip


@case
def manifests(draw: random.Random, folder: Path) -> str:
    """A directory of shards in which one file was damaged, lost or edited."""
    shards = folder / "shards"
    shutil.copytree(good_shards(folder), shards)
    files = sorted(path for path in shards.iterdir() if path.name != "bad_images.txt")
    target = draw.choice([path for path in files if "manifest" in path.name or path.suffix in (".npy", ".tar")])
    how = draw.choice(["bytes", "bytes", "gone", "value", "swap"])
    before = target.read_bytes()
    if how == "gone":
        target.unlink()
    elif how == "swap" and target.suffix != ".json":
        other = next(path for path in files if path.suffix == target.suffix and path != target)
        target.write_bytes(other.read_bytes())
    elif how == "value" and target.name == "manifest.json":
        content = json.loads(before)
        edit_json(draw, content)
        target.write_text(json.dumps(content))
    else:
        target.write_bytes(damage(draw, before))
    harmless = target.exists() and target.read_bytes() == before
    train = command("pretrain", *tiny(shards, folder / "runs"))
    check = command("verify", shards, "--workers", 1)
    if not train.refused:
        truth = Counter(stored(good_shards(folder)))
        if Counter(stored(shards)) != truth and target.suffix != ".tar":  # nobody hashes terabytes before a step
            raise Finding(f"{target.name} {how}: trained on other images or labels")
        if not check.refused and not harmless:
            meaning = target.suffix == ".json" and json.loads(target.read_bytes()) == json.loads(before)
            if not meaning:
                raise Finding(f"{target.name} {how}: neither training nor verify say a word")
        return "right" if harmless else "trained on the right images; verify names it"
    if harmless:
        raise Finding(f"nothing wrong, yet {train.refused}")
    if not check.refused:
        raise Finding(f"{target.name} {how}: pretrain refuses ({train.refused}), verify finds nothing")
    return "refused"


def edit_json(draw: random.Random, content: object) -> None:
    """Change one value, key or entry somewhere in it."""
    here = content
    while True:
        keys = list(here) if isinstance(here, dict) else list(range(len(here)))  # type: ignore[call-overload, arg-type]
        if not keys:
            return
        key = draw.choice(keys)
        if isinstance(here[key], dict | list) and here[key] and draw.random() < 0.7:  # type: ignore[index]
            here = here[key]  # type: ignore[index]
            continue
        if draw.random() < 0.25:
            del here[key]  # type: ignore[attr-defined]
        else:
            here[key] = draw.choice([None, -1, 0, 7, 10**30, 1.5, "", "x", "../x", "/etc/passwd", [], {}, True])  # type: ignore[index]
        return


CONFIG = """\
model:
  enc_name: vit_tiny_patch16_224
  img_size: 8
  patch_size: 4
  enc_dim: 8
  enc_depth: 1
  enc_heads: 1
  dec_dim: 8
  dec_depth: 1
  dec_heads: 1
  mask_ratio: 0.75
data:
  workers: 0
  flip: 0.5
  crop_scale: [0.2, 1.0]
optim:
  lr: 1e-3
  warmup_epochs: 0
  betas: [0.9, 0.95]
train:
  precision: fp32
  device: cpu
  global_batch_size: 12
  steps: 1
  epochs: 1
  log_every: 1
track:
  mlflow: false
"""
ODD = [
    "null", "-1", "0", "0.0", "1", "2", "3.5", "4", "8", "12", "0.5", "0.75", "16", "[0.3, 0.9]",
    "1e-3", "1e30", ".nan", ".inf", "-.inf", "''", "x", "[1, 2]", "[]",
    "{}", "{a: 1}", "true", "no", "'1'", "0x10", "010", "1_000", "12:30", "2024-01-01", "!!python/name:os.system", "*a",
    "&a 1", "|", "99999999999999999999", "[0.5]", "[.nan, 1]", "~", "@x", "%x", "'", '"', "é", "\x07",
]  # fmt: skip


@case
def configs(draw: random.Random, folder: Path) -> str:
    """A config file in which one line was edited, doubled, misspelt, moved or torn."""
    lines = CONFIG.splitlines()
    at = draw.choice([i for i, line in enumerate(lines) if line.startswith(" ")])
    key, _, _ = lines[at].partition(": ")
    how = draw.choice(
        ["value", "value", "value", "misspelt", "double", "section twice", "indent", "bytes", "drop", "moved"]
    )
    if how == "value":
        lines[at] = f"{key}: {draw.choice(ODD)}"
    elif how == "misspelt":
        letters = list(key.strip())
        letters[draw.randrange(len(letters))] = draw.choice("abcxyz_")
        lines[at] = lines[at].replace(key.strip(), "".join(letters), 1)
        how = how if "".join(letters) != key.strip() else "none"
    elif how == "double":
        lines.insert(at + 1, lines[at])
    elif how == "section twice":
        lines += ["train:", "  seed: 3"]
    elif how == "indent":
        lines[at] = draw.choice(["", "    ", "\t", " "]) + lines[at].strip()
    elif how == "drop":
        del lines[at]
    elif how == "moved":
        lines.insert(draw.randrange(len(lines)), lines.pop(at))
    data = "\n".join(lines).encode("utf-8", "surrogateescape") + b"\n"
    (folder / "config.yaml").write_bytes(damage(draw, data) if how == "bytes" else data)
    more = [f"--data.shards={good_shards(folder)}", f"--train.runs_dir={folder / 'runs'}", "--train.name=t"]
    done = command("pretrain", "--config", folder / "config.yaml", *more)
    if done.refused:
        if how in ("none", "drop") and "config.yaml" not in done.refused and "--" not in done.refused:
            return "refused for what is missing"
        return "refused"
    if how in ("misspelt", "double", "section twice"):
        raise Finding(f"{how} of {key.strip()} is taken")
    if not list((folder / "runs" / "t" / "checkpoints").glob("step-*")):
        raise Finding(f"{how} of {lines[at]!r}: it trained nothing, and says nothing")
    return "right"


def run(kind: str, seed: int, folder: Path) -> str:
    """What came of one case. Raises Finding."""
    folder.mkdir(parents=True)
    return CASES[kind](random.Random(f"{kind} {seed}"), folder)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=[*CASES], default=[*CASES])
    parser.add_argument("--first", type=int, default=0, help="seed of the first case")
    parser.add_argument("--count", type=int, default=1000, help="cases of each kind")
    parser.add_argument("--keep", type=Path, help="where the inputs of findings stay")
    given = parser.parse_args()
    found, outcomes = 0, Counter()
    with tempfile.TemporaryDirectory() as place:
        for kind in given.kinds:
            began = time.monotonic()
            for seed in range(given.first, given.first + given.count):
                folder = Path(given.keep or place, kind, str(seed))
                try:
                    outcomes[kind, run(kind, seed, folder)] += 1
                except Finding as finding:
                    found += 1
                    print(f"{kind} {seed}: {finding}", flush=True)
            print(f"{kind}: {given.count} cases in {time.monotonic() - began:.0f} s", file=sys.stderr)
    for (kind, outcome), count in sorted(outcomes.items()):
        print(f"{kind:10} {outcome:50} {count:5}")
    print(f"{found} findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
