"""Every image of an input is stored, or named, or counted by reason; `shard` and `index` follow one rule."""

import io
import os
import socket
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest
from PIL import Image

from mae_dist import cli
from mae_dist.errors import UserError
from mae_dist.shards import Manifest
from mae_dist.shards.index import index
from mae_dist.shards.patterns import local_files, places
from mae_dist.shards.store import LocalStore
from mae_dist.shards.verify import verify
from mae_dist.shards.write import COUNTS_NAME, shard, summary

LINK, SYMLINK, FIFO = tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE


def picture(i: int, form: str = "JPEG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (24, 20), (i * 37 % 256, 90, 80)).save(out, form)
    return out.getvalue()


def tar(*entries: tuple[str, bytes | tuple[bytes, str] | None]) -> bytes:
    """Files by name; (type, target) for a link or a device, None for a directory."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as made:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            if content is None:
                info.type = tarfile.DIRTYPE
            elif isinstance(content, tuple):
                info.type, info.linkname = content
            else:
                info.size = len(content)
            made.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return out.getvalue()


def put(directory: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return directory


def pairs(manifest: Manifest | None) -> list[tuple[bytes, int]]:
    assert manifest is not None
    store = LocalStore(manifest)
    return sorted(store.read(i, j) for i, n in enumerate(manifest.counts) for j in range(n))


def both(path: Path, tmp_path: Path) -> list[tuple[bytes, int]]:
    """What `shard` stores of a tar, after looking that `index` and `verify` find the same."""
    stored = pairs(shard(path, tmp_path / "out"))
    made = index([str(path)], tmp_path / "index")
    assert pairs(made.manifest) == stored
    assert not list(verify(made.manifest))
    return stored


def refused(path: Path, says: str, by_index: str = "") -> None:
    """Both commands name it (`index` in words of its own), and nothing is stored."""
    with pytest.raises(UserError, match=says):
        shard(path, path.parent / "refused")
    assert not (path.parent / "refused").exists()
    with pytest.raises(UserError, match=by_index or says):
        index([str(path)], path.parent / "index-refused")


def said(path: Path, bad: int = 0) -> str:
    """What became of all that was found, as `shard` says at its end."""
    text, stored = summary(path / "out"), Manifest.load(path / "out").num_samples
    assert text.startswith(f"{stored + bad} images in = {stored} stored" + (f" + {bad} bad" if bad else ""))
    return text


@pytest.mark.parametrize(
    "data",
    [
        tar(("a.jpg", picture(1))) + tar(("b.jpg", picture(2))),
        tar(("a.jpg", picture(1))) + bytes(5120) + tar(("b.jpg", picture(2))) + tar(("c.jpg", picture(3))),
        tar(("a.jpg", picture(1))) + b"\0" * 511 + b"x",
    ],
)
def test_joined_tars_are_refused_by_both(tmp_path, data):
    (tmp_path / "x.tar").write_bytes(data)
    refused(tmp_path / "x.tar", r"x\.tar: holds data behind the end of the archive at byte 2048")
    shard(tmp_path / "x.tar", tmp_path / "out", max_bad=1)
    assert "what lies behind that is not read" in (tmp_path / "out" / "bad_images.txt").read_text()


@pytest.mark.parametrize("kind", [LINK, SYMLINK])
def test_links_in_tars_are_what_they_name(tmp_path, kind):
    """To an image and to a label before them, by any spelling and over several links."""
    up = "../d/" if kind == SYMLINK else "./d/"
    data = tar(
        ("./d/0.jpg", picture(0)), ("./d/0.cls", b"1"),
        ("d/1.jpg", (kind, f"{up}0.jpg")), ("d/1.cls", (kind, f"{up}0.cls")),
        ("d/2.jpg", (kind, f"{up}1.jpg")), ("d/2.json", b'{"label": 2}'),
    )  # fmt: skip
    (tmp_path / "x.tar").write_bytes(data)
    assert both(tmp_path / "x.tar", tmp_path) == [(picture(0), 1), (picture(0), 1), (picture(0), 2)]


@pytest.mark.parametrize(
    ("name", "what", "says"),
    [
        ("1.jpg", (LINK, "nowhere.jpg"), "'1.jpg' is a hard link to 'nowhere.jpg'"),
        ("1.jpg", (SYMLINK, "2.jpg"), "'1.jpg' is a symbolic link to '2.jpg'"),
        ("1.jpg", (SYMLINK, "/etc/passwd"), "'1.jpg' is a symbolic link to '/etc/passwd'"),
        ("0.json", (SYMLINK, "/nowhere"), "'0.json' is a symbolic link to '/nowhere'"),
        ("0.cls", (LINK, "0.txt"), "'0.cls' is a hard link to '0.txt'"),
        ("1.jpg", (FIFO, ""), "'1.jpg' is a device or FIFO"),
    ],
)
def test_a_member_without_bytes_is_named_and_the_others_are_read(tmp_path, name, what, says):
    (tmp_path / "x.tar").write_bytes(tar(("0.jpg", picture(0)), (name, what), ("2.jpg", picture(2))))
    refused(tmp_path / "x.tar", says)
    left = [picture(0), picture(2)] if name[0] == "1" else [picture(2)]
    assert pairs(shard(tmp_path / "x.tar", tmp_path / "out", max_bad=1)) == sorted((d, -1) for d in left)
    assert said(tmp_path, bad=1)


@pytest.mark.parametrize("form", ["gnu", "posix --sparse-version=0.0", "posix --sparse-version=0.1", "posix"])
def test_sparse_members_are_named(tmp_path, form):
    put(tmp_path, {"a.jpg": picture(1), "b.jpg": picture(2)})
    os.truncate(tmp_path / "a.jpg", 300_000)
    subprocess.run(
        ["tar", "-S", *f"--format={form}".split(), "-cf", "x.tar", "a.jpg", "b.jpg"], cwd=tmp_path, check=True
    )
    refused(tmp_path / "x.tar", r"'a\.jpg' is a sparse file")
    assert pairs(shard(tmp_path / "x.tar", tmp_path / "out", max_bad=1)) == [(picture(2), -1)]


SEVERAL = [
    (["a.2x.jpg", "a.3x.jpg", "a.4x.jpg"], ["a.2x.jpg", "a.3x.jpg", "a.4x.jpg"], "note: 3 images with dots"),
    (["a.b.jpg", "a.b.cls", "c.d.jpg"], ["a.b.jpg", "c.d.jpg"], "note: 2 images with dots"),
    (["0.jpg", "0.seg.png", "1.jpg", "1.seg.png"], ["0.jpg", "1.jpg"], "left out: 2 .seg.png files beside"),
    (["0.jpg", "0.seg.png", "1.seg.png"], ["0.jpg"], "left out: 1 samples without an image (.seg.png)"),
    (["x.jpg", "x.seg.png", "a.1.jpg", "a.seg.png"], ["x.jpg", "a.1.jpg"], "left out: 2 .seg.png files beside"),
    (["a.1.jpg", "a.2.cls"], ["a.1.jpg"], "left out: 1 .N.cls files beside"),
    (["a.1.jpg", "a.9.gif"], ["a.1.jpg"], "left out: 1 .N.gif files beside"),
    (["0.jpg", "0.png", "0.gif"], ["0.jpg"], "left out: 1 .png files beside"),
    (["f.json", "f.mask.png", "g.jpg"], ["g.jpg"], "left out: 1 samples without an image (.json+.mask.png)"),
    (
        ["a.jpg", "b.gif", "c", "d.jpg?w=1"],
        ["a.jpg"],
        "left out: 1 samples without an image (.jpg?...), such as d.jpg?",
    ),
    (["d/._x.jpg", "d/x.JPG", "__MACOSX/x.jpg", ".DS_Store"], ["d/x.JPG"], "left out: 3 hidden files"),
    (["/abs/a.jpg", "../b.jpg", "x/../c.jpg"], ["/abs/a.jpg", "../b.jpg", "x/../c.jpg"], ""),
]


@pytest.mark.parametrize(("names", "taken", "says"), SEVERAL)
def test_one_rule_for_what_is_an_image_in_a_tar(tmp_path, names, taken, says):
    contents = {name: b"1" if name.endswith((".cls", ".json")) else picture(i) for i, name in enumerate(names)}
    (tmp_path / "x.tar").write_bytes(tar(*contents.items()))
    label = {"a.b.jpg": 1}
    assert both(tmp_path / "x.tar", tmp_path) == sorted((contents[name], label.get(name, -1)) for name in taken)
    assert says in said(tmp_path)
    assert says in "".join(index([str(tmp_path / "x.tar")], tmp_path / "again").notes.lines())


def test_several_images_of_one_key_that_words_tell_apart_are_refused(tmp_path):
    (tmp_path / "x.tar").write_bytes(tar(("0.img.jpg", picture(1)), ("0.mask.png", picture(2))))
    refused(tmp_path / "x.tar", r"several images of the key '0' \(\.img\.jpg, \.mask\.png\); call one 0\.jpg")


INNER = tar(("a.jpg", picture(1)))


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ([("n00000001.tar", INNER), ("loose.jpg", picture(2))], "holds images beside tars"),
        ([("loose.jpg", picture(2)), ("n00000001.tar", INNER)], "holds images beside tars"),
        ([("n00000001.tar", tar(("m.tar", INNER)))], "x.tar: n00000001.tar: holds images beside tars"),
        ([("a/n00000001.tar", INNER), ("b/n00000001.tar", INNER)], "b/n00000001.tar has the name of another class tar"),
        ([("part-0.tar", INNER), ("part-1.tar", INNER)], "x.tar: part-0 and part-1: parts of one set by their names"),
        ([("n00000001.tar", tar(("a.jpg", picture(1)), ("a.cls", b"5")))], r"n00000001\.tar: a\.cls says a label"),
    ],
)
def test_tars_in_tars_that_cannot_all_be_used_are_refused(tmp_path, entries, says):
    (tmp_path / "x.tar").write_bytes(tar(*entries))
    refused(tmp_path / "x.tar", says, "holds tars")


@pytest.mark.parametrize("names", [("n00000001", "n00000002"), ("n01", "n02"), ("cat", "dog")])
def test_class_tars_in_a_tar_that_begins_with_a_directory(tmp_path, names):
    last = ("b.jpg", picture(2))
    entries = [("./", None), ("./._n2.tar", b"mac"), (f"./{names[1]}.tar", tar(last)), (f"./{names[0]}.tar", INNER)]
    (tmp_path / "x.tar").write_bytes(tar(*entries))
    assert pairs(shard(tmp_path / "x.tar", tmp_path / "out")) == sorted([(picture(1), 0), (picture(2), 1)])
    assert "1 hidden" in said(tmp_path)


def test_links_to_directories_are_followed_once(tmp_path):
    """Up, to itself, in a circle; an ordinary one to elsewhere counts as a folder."""
    put(tmp_path, {"in/a/1.jpg": picture(1), "in/b/2.jpg": picture(2), "else/deep/3.jpg": picture(3)})
    for link, target in {"in/a/up": "..", "in/a/self": ".", "in/c": "../else", "else/deep/back": ".."}.items():
        (tmp_path / link).symlink_to(target)
    assert pairs(shard(tmp_path / "in", tmp_path / "out", workers=2)) == sorted((picture(i), i - 1) for i in (1, 2, 3))
    assert "left out: 3 folders that lead to one read already" in said(tmp_path)


@pytest.mark.parametrize("link", [("in/c", "b"), ("in/a/b", "../b"), ("in/a/b", "../../in/b")])
def test_two_classes_of_one_directory_are_refused(tmp_path, link):
    put(tmp_path, {"in/a/1.jpg": picture(1), "in/b/2.jpg": picture(2)})
    (tmp_path / link[0]).symlink_to(link[1])
    with pytest.raises(UserError, match=r"are one directory \(a link leads there\)"):
        shard(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


OTHERS = {"b.gif": "GIF", "c.jfif": "JPEG", "d.avif": "AVIF", "e.jpe": "JPEG", "noext": "PNG", "f.jpg?w=100": "JPEG"}


@pytest.mark.parametrize("folder", ["", "class"])
def test_files_of_other_suffixes_are_counted_and_taken_when_asked(tmp_path, capsys, folder):
    files = {name: picture(i, form) for i, (name, form) in enumerate(OTHERS.items(), 1)}
    files |= {"G.JPG": picture(0), "README.txt": b"words", "empty": b""}
    put(tmp_path / "in" / folder, files)
    assert cli.shard([str(tmp_path / "in"), str(tmp_path / "out"), "--dry-run", "--workers=1"]) == 0
    dry = capsys.readouterr().out
    shard(tmp_path / "in", tmp_path / "out")
    assert Manifest.load(tmp_path / "out").num_samples == 1
    for kind in ("1 .gif files", "1 .jfif", "1 .avif", "1 .jpe files", "2 files without", "1 .jpg?... files", "1 .txt"):
        assert f"left out: {kind}" in dry
        assert f"left out: {kind}" in said(tmp_path)
    every = shard(tmp_path / "in", tmp_path / "every", all_suffixes=True)
    assert every is not None and every.num_samples == 7
    assert "1 .txt files" in summary(tmp_path / "every") and ".gif" not in summary(tmp_path / "every")
    (tmp_path / "x.tar").write_bytes(tar(*files.items()))
    assert shard(tmp_path / "x.tar", tmp_path / "tarred", all_suffixes=True).num_samples == 7  # type: ignore[union-attr]


def test_what_lies_in_a_folder_and_is_no_file_is_named_and_never_opened(tmp_path):
    put(tmp_path, {"in/a/0.jpg": picture(0), "in/a/dir.jpg/1.jpg": picture(1), "in/a/empty.jpg": b""})
    os.mkfifo(tmp_path / "in/a/fifo.jpg")
    listener = socket.socket(socket.AF_UNIX)
    here = Path.cwd()
    os.chdir(tmp_path / "in/a")  # a socket's path is short
    try:
        listener.bind("s.jpg")
    finally:
        os.chdir(here)
        listener.close()
    (tmp_path / "in/a/gone.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "in/a/circle.jpg").symlink_to("circle.jpg")
    (tmp_path / "in/a/null.jpg").symlink_to("/dev/null")
    assert pairs(shard(tmp_path / "in", tmp_path / "out", max_bad=6)) == sorted((picture(i), 0) for i in (0, 1))
    listed = (tmp_path / "out" / "bad_images.txt").read_text()
    for what in (
        "fifo.jpg: a FIFO",
        "s.jpg: a socket",
        "null.jpg: a device",
        "gone.jpg: ",
        "circle.jpg: ",
        "empty.jpg: ",
    ):
        assert what in listed
    assert "8 images in = 2 stored + 6 bad" in summary(tmp_path / "out")
    os.mkfifo(tmp_path / "x.tar")
    with pytest.raises(UserError, match=r"x\.tar: a FIFO, not a file"):
        shard(tmp_path / "x.tar", tmp_path / "other")
    with pytest.raises(UserError, match=r"x\.tar: .*a FIFO, not a file"):
        index([str(tmp_path / "x.tar")])


def test_hidden_files_and_folders_are_skipped_and_counted(tmp_path):
    names = ["a/._x.jpg", ".DS_Store", "__MACOSX/a/x.jpg", "a/.ipynb_checkpoints/x.jpg", "b/@eaDir/x.jpg/THUMB.jpg"]
    put(tmp_path / "in", dict.fromkeys(names, picture(9)) | {"a/x.jpg": picture(1), "b/x.jpg": picture(2)})
    assert pairs(shard(tmp_path / "in", tmp_path / "out")) == sorted([(picture(1), 0), (picture(2), 1)])
    assert "left out: 5 hidden files or folders" in said(tmp_path)


@pytest.mark.parametrize("notes", [["00000.parquet", "00000_stats.json"], ["00000/0.json", "00001/1.json"]])
def test_folders_of_img2dataset_are_no_classes(tmp_path, notes):
    put(tmp_path / "in", {"00000/0.jpg": picture(0), "00001/1.jpg": picture(1)} | dict.fromkeys(notes, b"{}"))
    manifest = shard(tmp_path / "in", tmp_path / "out")
    assert pairs(manifest) == sorted([(picture(0), -1), (picture(1), -1)]) and not manifest.classes  # type: ignore
    put(tmp_path / "in", {"cats/2.jpg": picture(2)})
    with pytest.raises(UserError, match="00000/ is img2dataset's, and cats/ beside it is not"):
        shard(tmp_path / "in", tmp_path / "other")


def test_tars_of_img2dataset_lie_beside_their_notes(tmp_path):
    files = {f"0000{i}.tar": tar((f"{i}.jpg", picture(i)), (f"{i}.json", b"{}")) for i in range(2)}
    notes = {f"0000{i}{end}": b"{}" for i in range(2) for end in (".parquet", "_stats.json")}
    put(tmp_path / "in", files | notes | {"._00000.tar": b"mac"})
    expected = sorted((picture(i), -1) for i in range(2))
    assert pairs(shard(tmp_path / "in", tmp_path / "out")) == expected
    assert "2 .parquet files" in said(tmp_path) and "1 hidden" in said(tmp_path)
    assert pairs(index([str(tmp_path / "in")]).manifest) == expected
    with pytest.raises(UserError, match=r"already exists, and lists .*\.tar, which is not given"):
        index([str(tmp_path / "in" / "00000.tar")])
    (tmp_path / "in" / "00002.tar").write_bytes(tar(("2.jpg", picture(2))))
    again = index([str(tmp_path / "in")])  # as its manifest says
    assert pairs(again.manifest) == expected
    assert any("1 tars that manifest.json does not list" in line for line in again.notes.lines())


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["n01440764.tar", "extra.tar"], r"extra\.tar: lies beside class tars such as n01440764\.tar"),
        (["x.tar", "y.tar.gz"], r"y\.tar\.gz: compressed"),
        (["x.tar", "y.tgz"], r"y\.tgz: compressed"),
        (["train-0.tar", "test-0.tar"], "holds the splits train, test"),
        (["train-0.tar", "dev-0.tar"], "holds the splits train, dev"),
    ],
)
def test_tars_that_do_not_go_together_are_refused(tmp_path, files, says):
    put(tmp_path / "in", dict.fromkeys(files, INNER))
    refused(tmp_path / "in", says)


def test_tars_of_any_spelling_and_name_are_read(tmp_path):
    put(tmp_path / "[old] {1,2}", {"train-latest-0.TAR": INNER, "train-latest-1.tar": tar(("b.jpg", picture(2)))})
    expected = sorted([(picture(1), -1), (picture(2), -1)])
    for n, given in enumerate(("", "/*", "/*[rR]")):
        pattern = f"{tmp_path}/[old] {{1,2}}{given}"
        assert pairs(shard(pattern, tmp_path / f"out{n}")) == expected
        assert pairs(index([pattern], tmp_path / f"index{n}").manifest) == expected


def test_a_tar_of_two_names_is_refused(tmp_path):
    put(tmp_path / "in", {"a.tar": INNER})
    (tmp_path / "in" / "latest.tar").symlink_to("a.tar")
    refused(tmp_path / "in", r"a\.tar and .*latest\.tar: one and the same file")
    with pytest.raises(UserError, match="one and the same file"):
        shard(tmp_path / "in" / "{a,a}.tar", tmp_path / "out")


def test_an_empty_tar_among_others_is_named(tmp_path):
    put(tmp_path / "in", {"a.tar": INNER, "b.tar": tar(), "c.tar": tar(("x.txt", b"1"))})
    with pytest.raises(UserError, match=r"2 unreadable images: .*b\.tar: holds no images .*c\.tar: holds no images"):
        shard(tmp_path / "in", tmp_path / "out")
    with pytest.raises(UserError, match=r"2 of 3 shards cannot be used: .*b\.tar: holds no images"):
        index([str(tmp_path / "in")])


def test_an_image_of_no_bytes_is_named_by_shard_and_counted_by_index(tmp_path):
    (tmp_path / "x.tar").write_bytes(tar(("a.jpg", b""), ("b.jpg", picture(1))))
    with pytest.raises(UserError, match=r"a\.jpg: no image"):
        shard(tmp_path / "x.tar", tmp_path / "out")
    made = index([str(tmp_path / "x.tar")])
    assert list(made.notes.lines()) == ["left out: 1 images of no bytes, such as a.jpg"]
    assert pairs(made.manifest) == [(picture(1), -1)] and not list(verify(made.manifest))


@pytest.mark.parametrize("out", ["in/out", "in", "in/a/b/out"])
def test_out_inside_images_is_refused_for_what_it_is(tmp_path, out, capsys):
    put(tmp_path / "in", {"a/1.jpg": picture(1)})
    for dry in ([], ["--dry-run"]):
        with pytest.raises(UserError, match=r"OUT .*: lies inside IMAGES"):
            cli.shard([str(tmp_path / "in"), str(tmp_path / out), *dry])
    assert [path.name for path in tmp_path.rglob("*")] == ["in", "a", "1.jpg"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a-{00..04..2}", ["a-00", "a-02", "a-04"]),
        ("{0,{1,2}}", ["0", "1", "2"]),
        ("a.tar::b-{0..1}.tar", ["a.tar", "b-0.tar", "b-1.tar"]),
        ("pipe:cat a::b.tar::pipe:cat c.tar", ["pipe:cat a::b.tar", "pipe:cat c.tar"]),
        ("s3://a/{0..1}.tar::https://b/c.tar", ["s3://a/0.tar", "s3://a/1.tar", "https://b/c.tar"]),
        ("simplecache::s3://a/b.tar", ["simplecache::s3://a/b.tar"]),
        ("x{", ["x{"]),
    ],
)
def test_patterns_of_several_shards(pattern, expected):
    assert [place.removeprefix(f"{Path.cwd()}/") for place in places([pattern])] == expected


def test_patterns_of_local_files(tmp_path):
    put(tmp_path / "[old]", {"a.tar": b"", "b.tar": b"", "._c.tar": b"", "d{1,2}.tar": b""})
    assert local_files(f"{tmp_path}/[old]/?.tar") == [f"{tmp_path}/[old]/a.tar", f"{tmp_path}/[old]/b.tar"]
    assert places([f"{tmp_path}/[old]/d{{1,2}}.tar"]) == [f"{tmp_path}/[old]/d{{1,2}}.tar"]
    with pytest.raises(UserError, match="matches no file"):
        places([f"{tmp_path}/none*"])


RAW = b"caf\xe9"  # as Latin-1 systems wrote it: no UTF-8


def test_names_need_not_be_text(tmp_path):
    name = os.fsdecode(RAW)
    put(tmp_path / name, {f"{name}/{name}.jpg": picture(1), "b/\udcff\n.jpg": b"no image", "c/1.jpg": picture(3)})
    manifest = shard(tmp_path / name, tmp_path / f"{name}-out", max_bad=1)
    assert pairs(manifest) == sorted([(picture(1), 2), (picture(3), 1)])
    assert Manifest.load(tmp_path / f"{name}-out").classes == ["b", "c", name]
    assert (tmp_path / f"{name}-out" / "bad_images.txt").read_bytes().count(b"\n") == 1
    with tarfile.open(manifest.tar_path(0)) as made:  # type: ignore[union-attr]
        assert RAW in [made.extractfile(m).read() for m in made if m.name.endswith(".txt")]  # type: ignore
    (tmp_path / f"{name}.tar").write_bytes(tar((f"{name}.jpg", picture(1)), ("\udce8.jpg", picture(2))))
    assert both(tmp_path / f"{name}.tar", tmp_path) == sorted([(picture(1), -1), (picture(2), -1)])


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("name", ["caf\udce9", "café", "d" * 70 + "/" + "n" * 70, "n" * 130, "plain"])
def test_the_key_of_a_sample_is_its_whole_name(tmp_path, form, name):
    """Where the tar holds it in a header of its own too."""
    with tarfile.open(tmp_path / "x.tar", "w", format=form) as made:
        for i in range(2):
            info = tarfile.TarInfo(f"{name}{i}.jpg")
            info.size = len(picture(i))
            made.addfile(info, io.BytesIO(picture(i)))
    store = LocalStore(index([str(tmp_path / "x.tar")]).manifest)
    assert [store.key(0, i) for i in range(2)] == [f"{name}0", f"{name}1"]


AS_NOBODY = """
import os, sys
from mae_dist import cli
from mae_dist.errors import UserError
from mae_dist.shards import estimate, write
os.getuid() or os.setuid(65534)  # root may list everything
for images, *more in ["in"], ["in", "--max-bad=1"], ["in", "--dry-run"], ["in/a/locked", "--dry-run"]:
    try:
        cli.shard([images, "out", "--workers=1", *more])
    except UserError as error:
        print("error:", error)
"""


def test_a_directory_that_cannot_be_listed_is_named():
    with tempfile.TemporaryDirectory() as name:  # others may not enter pytest's
        path = put(Path(name), {"in/a/1.jpg": picture(1), "in/a/locked/2.jpg": picture(2)})
        path.chmod(0o777)
        (path / "in/a/locked").chmod(0)
        run = [sys.executable, "-c", AS_NOBODY]
        env = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1]), "TMPDIR": name}
        done = subprocess.run(run, cwd=path, env=env, capture_output=True, text=True)
        (path / "in/a/locked").chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("/locked: this directory cannot be read: Permission denied") == 2
    assert "2 images in = 1 stored + 1 bad" in done.stdout
    assert "error: " in done.stdout and "/locked: cannot be read: Permission denied" in done.stdout


def test_counts_are_kept_with_the_shards(tmp_path):
    put(
        tmp_path / "in", {"a/1.jpg": picture(1), "a/2.jpg": b"no image", "a/3.gif": picture(3, "GIF"), "a/._4.jpg": b""}
    )
    shard(tmp_path / "in", tmp_path / "out", max_bad=1)
    first = (tmp_path / "out" / COUNTS_NAME).read_text()
    text = summary(tmp_path / "out")
    assert text.startswith("2 images in = 1 stored + 1 bad, listed in bad_images.txt; ")
    assert "1 .gif files" in text and "1 hidden" in text
    shard(tmp_path / "in", tmp_path / "out", max_bad=1)  # done already
    assert (tmp_path / "out" / COUNTS_NAME).read_text() == first
