"""Shards of other makers: every image found where it lies, and nothing that tar readers lose in silence."""

import contextlib
import gzip
import io
import json
import shutil
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mae_dist.errors import UserError
from mae_dist.shards import Manifest, remote
from mae_dist.shards import index as module
from mae_dist.shards.index import index, scan
from mae_dist.shards.patterns import places
from mae_dist.shards.samples import samples
from mae_dist.shards.tar import BadTar, Digested, decimal, members, number
from tests.conftest import mae_dist

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def make_tar(files: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT, end: bool = True) -> bytes:
    out = io.BytesIO()
    tar = tarfile.TarFile(fileobj=out, mode="w", format=form)
    for name, data in files:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    if not end:
        return out.getvalue()
    tar.close()
    return out.getvalue()


def read(data: bytes) -> list:
    return list(samples(members(Digested(io.BytesIO(data)))))


names = st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=120)


@settings(max_examples=50)
@given(st.lists(st.tuples(names, st.binary(max_size=1500)), max_size=8), st.sampled_from(FORMATS[1:]))
def test_members_are_what_tarfile_finds(files, form):
    data = make_tar(files, form)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar.getmembers()]
    found = list(members(Digested(io.BytesIO(data))))
    assert [(m.name, m.offset, len(m.data)) for m in found] == expected
    assert all(data[m.offset : m.offset + len(m.data)] == m.data for m in found)


@pytest.mark.parametrize("form", FORMATS)
def test_directories_links_and_long_names(form):
    out = io.BytesIO()
    long = "d" * 90 + "/" + "n" * 60 + ".jpg"
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name, kind, target in (("dir", tarfile.DIRTYPE, ""), ("link.jpg", tarfile.SYMTYPE, "x" * 90)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
        info = tarfile.TarInfo(long)
        info.size = 5
        tar.addfile(info, io.BytesIO(b"image"))
    link, found = members(Digested(io.BytesIO(out.getvalue())))
    assert (found.name, found.data) == (long, b"image")
    assert link.name == "link.jpg" and f"symbolic link to '{'x' * 90}'" in link.fault


FILES = [(f"{i:03d}.{suffix}", b"%d" % i * size) for i in range(4) for suffix, size in (("jpg", 700), ("cls", 1))]


def test_a_cut_at_any_byte_is_noticed():
    """The first block of zeros is the end that tarfile pads to 10 kB: up to the second, every cut is one."""
    data = make_tar(FILES)
    end = len(make_tar(FILES, end=False)) + 2 * 512
    for cut in [*range(0, end, 97), *range(0, end, 512)]:
        with pytest.raises(BadTar, match=f"cut short: ends at byte {cut} "):
            read(data[:cut])
    assert len(read(data[:end])) == 4


@given(st.integers(0, 7), st.integers(0, 511), st.integers(0, 7))
def test_any_flipped_bit_of_any_header_is_noticed(header, byte, bit):
    """But for those of the checksum's own padding, which change nothing."""
    data = bytearray(make_tar(FILES))
    at = [0, 1536, 2560, 4096, 5120, 6656, 7680, 9216][header]
    assert data[at + 257 : at + 262] == b"ustar"
    data[at + byte] ^= 1 << bit
    if 148 <= byte < 156:
        with contextlib.suppress(BadTar):
            assert len(read(bytes(data))) == 4
    else:
        with pytest.raises(BadTar):
            read(bytes(data))


def test_numbers_too_large_for_octal_digits():
    assert number(b"\x80" + (2**40).to_bytes(11)) == 2**40
    assert number(b"0000017 \0") == decimal(b"17") - 2 == 15
    for wrong in (b"-0000017", b"0o17", b"1_7", b"\xff" * 8):
        with pytest.raises(BadTar, match="where a number belongs"):
            number(wrong)


def test_a_sparse_file_is_refused():
    info = tarfile.TarInfo("a.jpg")
    info.type = tarfile.GNUTYPE_SPARSE
    with pytest.raises(BadTar, match=r"'a\.jpg' is a sparse file"):
        read(info.tobuf(tarfile.GNU_FORMAT) + bytes(10240))


def test_a_damaged_header_is_noticed():
    data = bytearray(make_tar(FILES))
    for at in (3, 124, 1536, 1536 + 130):
        damaged = data.copy()
        damaged[at] ^= 1
        with pytest.raises(BadTar, match="no valid header at byte 1536" if at > 1000 else "is no tar"):
            read(bytes(damaged))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (gzip.compress(make_tar(FILES)), "is compressed"),
        (b"<html>not found</html>" * 50, "is no tar"),
        (make_tar(FILES) + make_tar(FILES), "behind the end of the archive"),
        (make_tar([("a.jpg", b"1"), ("b.jpg", b"2"), ("a.cls", b"3")]), "'a' do not lie together"),
        (make_tar([("a.jpg", b"1"), ("a.JPG", b"2")]), "holds 'a.JPG' twice"),
    ],
)
def test_what_readers_take_silently_or_wrongly_is_named(data, says):
    with pytest.raises(BadTar, match=says):
        read(data)


def test_labels_and_images():
    found = read(
        make_tar([
            ("__meta__", b""), ("no_suffix", b""),
            ("d/a.cls", b" 7\n"), ("d/a.txt", b"9"), ("d/a.PNG", b"image"),
            ("b.json", b'{"label": 3, "cls": 4}'), ("b.jpeg", b"image"), ("b.png", b"other"),
            ("c.json", b'{"cls": 5}'), ("c.webp", b"image"),
            ("d.json", b"[1]"), ("d.jpg", b"image"),
            ("f.json", b'{"label": 1}'), ("f.mask.png", b"no image of its own"),
        ])
    )  # fmt: skip
    assert [(s.key, s.label) for s in found] == [("d/a", 7), ("b", 3), ("c", 5), ("d", -1), ("f", -1)]
    assert [s.image.data if s.image else None for s in found] == [b"image"] * 4 + [None]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a-{08..11}.tar", ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]),
        ("{a,b}-{0..1}.tar", ["a-0.tar", "a-1.tar", "b-0.tar", "b-1.tar"]),
        ("pipe:cat ${DIR}/{x}.tar", ["pipe:cat ${DIR}/{x}.tar"]),
    ],
)
def test_patterns(pattern, expected):
    assert [place.removeprefix(f"{Path.cwd()}/") for place in places([pattern])] == expected


def test_a_backward_range_is_a_mistake():
    with pytest.raises(UserError, match=r"write \{3..5\}"):
        places(["a-{5..3}.tar"])


@pytest.fixture
def copy(shards, tmp_path) -> Path:
    """The tars alone, as another maker would leave them."""
    (tmp_path / "copy").mkdir()
    for tar in shards.glob("*.tar"):
        shutil.copy(tar, tmp_path / "copy")
    return tmp_path / "copy"


def test_indexing_our_own_shards_gives_our_own_index(shards, copy):
    ours, done = Manifest.load(shards), index([f"{copy}/train-{{00000..00004}}.tar"], workers=2)
    again = Manifest.load(copy)
    assert done.manifest.shards == again.shards == ours.shards
    assert again.digest == ours.digest
    assert not done.notes
    for i in range(5):
        np.testing.assert_array_equal(np.load(again.index_path(i)), np.load(ours.index_path(i)))
    for name in ("wids.json", "_info.json", "sizes.json"):
        assert (copy / name).read_bytes() == (shards / name).read_bytes()


def test_files_of_other_readers_stay_as_they_are(copy):
    (copy / "_info.json").write_text("theirs")
    index([f"{copy}/train-00000.tar"])
    assert (copy / "_info.json").read_text() == "theirs"


def test_what_index_wrote_for_other_readers_follows_its_manifest(copy):
    (copy / "_info.json").write_text("theirs")
    index([str(copy)])
    tar = copy / "train-00001.tar"
    tar.write_bytes(tar.read_bytes()[:5000])
    index([str(copy)], max_bad=1)
    assert list(json.loads((copy / "sizes.json").read_text())) == [f"train-0000{i}.tar" for i in (0, 2, 3, 4)]
    assert len(json.loads((copy / "wids.json").read_text())["shardlist"]) == 4
    assert (copy / "_info.json").read_text() == "theirs"


def test_a_pattern_takes_in_a_tar_that_came_later(copy):
    index([f"{copy}/train-{{00000..00003}}.tar"])
    again = index([str(copy)])
    assert again.manifest.num_samples == 40
    assert any("a pattern for all, such as '*.tar', takes them in" in line for line in again.notes.lines())
    with pytest.raises(UserError, match=r"already exists, and lists .*train-00000\.tar, which is not given"):
        index([f"{copy}/train-00004.tar"])
    assert index([f"{copy}/*.tar"]).manifest.num_samples == 46
    assert len(json.loads((copy / "sizes.json").read_text())) == 5


def test_a_tar_that_changed_in_its_middle_is_read_again(copy, tmp_path):
    """And its own records of an unfinished start are no hidden files of the user's."""
    noise = np.random.default_rng(0).bytes(200_000)

    def write(label: bytes) -> None:
        files = [("a.jpg", noise), ("b.jpg", b"x"), ("b.cls", label), ("c.jpg", noise)]
        (copy / "train-00000.tar").write_bytes(make_tar(files))

    write(b"1")
    whole = (copy / "train-00001.tar").read_bytes()
    (copy / "train-00001.tar").write_bytes(whole[:5000])
    with pytest.raises(UserError, match="1 of 5 shards"):
        index([str(copy)])
    (copy / "train-00001.tar").write_bytes(whole)
    write(b"2")
    done = index([str(copy)])
    assert done.manifest.table(0)[:, 2].tolist() == [-1, 2, -1]
    assert not any("hidden" in line for line in done.notes.lines())


def test_remote_shards_and_pipes_have_a_local_manifest(shards, tmp_path):
    """Two shards of one file name get tables of two names."""
    urls = [
        f"file://{shards}/train-00000.tar",
        f"pipe:cat {shards}/train-00001.tar",
        f"pipe:cat {shards}/train-00000.tar",
    ]
    manifest = index(urls, tmp_path / "out").manifest
    assert manifest.shards == Manifest.load(tmp_path / "out").shards
    assert [manifest.place(i) for i in range(3)] == urls
    assert manifest.counts.tolist() == [10, 10, 10]
    assert len({manifest.index_path(i) for i in range(3)}) == 3
    assert all(manifest.index_path(i).is_file() for i in range(3))
    offset, length, _ = np.load(manifest.index_path(0))[3].tolist()
    assert remote.read_range(manifest.place(0), offset, offset + length)[:2] == b"\xff\xd8"
    train, held_out = manifest.split(1)  # a part finds its tables all the same
    assert [*map(train.index_path, range(2)), held_out.index_path(0)] == [*map(manifest.index_path, range(3))]
    assert not (tmp_path / "out" / "_info.json").exists()


@pytest.fixture
def http(shards):
    """The address of a web server on loopback that has the shards."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(shards))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_shards_on_a_web_server(shards, http, tmp_path):
    out = tmp_path / "out"
    done = mae_dist("index", f"{http}/train-{{00000..00004}}.tar", "--out", out, "--workers", 2)
    assert f"{out}: 46 images in 5 shards" in done.stdout
    ours, there = Manifest.load(shards), Manifest.load(out)
    assert there.digest == ours.digest
    assert [there.place(i) for i in range(5)] == [f"{http}/{entry.name}" for entry in ours.shards]
    assert [path.name for path in sorted(out.glob("*.npy"))] == [f"train-0000{i}.idx.npy" for i in range(5)]
    assert "nothing wrong" in mae_dist("verify", out, "--workers", 2).stdout
    assert "--data.lanes 256" in mae_dist("info", out).stdout
    missing = mae_dist("index", f"{http}/train-00005.tar", "--out", tmp_path / "none", check=False)
    assert missing.returncode == 2 and "train-00005.tar: cannot be read: FileNotFoundError" in missing.stderr


def test_broken_shards_are_listed_or_left_out(copy):
    first, second = copy / "train-00001.tar", copy / "train-00003.tar"
    first.write_bytes(first.read_bytes()[:5000])
    second.write_bytes(make_tar([("a.txt", b"1")]))
    pattern = f"{copy}/train-{{00000..00005}}.tar"
    done = mae_dist("index", pattern, "--workers", 2, "--max-bad", 2, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: 3 of 6 shards cannot be used: ")
    assert "train-00001.tar: cut short: ends at byte 5000 inside" in last
    assert "train-00003.tar: holds no images" in last
    assert "train-00005.tar: cannot be read: FileNotFoundError" in last
    assert not (copy / "manifest.json").exists()
    done = mae_dist("index", pattern, "--workers", 2, "--max-bad", 3)
    assert (
        "26 images in 3 shards" in done.stdout
        and len([line for line in done.stdout.splitlines() if line.startswith("left out: ")]) == 3
    )
    assert Manifest.load(copy).num_samples == 26


def test_started_again_it_reads_only_what_is_missing(copy, monkeypatch):
    """A shard that was broken and one that changed are read, the others are not; nothing is left lying about."""
    tars, read = sorted(copy.glob("*.tar")), []
    whole = tars[1].read_bytes()
    tars[1].write_bytes(whole[:5000])
    pattern = f"{copy}/train-{{00000..00004}}.tar"
    with pytest.raises(UserError, match="1 of 5 shards"):
        index([pattern])
    tars[1].write_bytes(whole)
    tars[3].write_bytes(make_tar([("a.jpg", b"new")]))
    scan_really = module.scan
    monkeypatch.setattr(module, "scan", lambda place: read.append(Path(place)) or scan_really(place))
    manifest = index([pattern]).manifest
    assert read == [tars[1], tars[3]]
    assert manifest.counts.tolist() == [10, 10, 10, 1, 6]
    assert not list(copy.glob(".*"))


def test_a_killed_worker_is_an_error_and_no_hang(shards, tmp_path):
    """What kills it is the shard's own command, as the kernel does when memory runs out."""
    kill = "pipe:kill -9 $PPID; sleep 1"
    done = mae_dist("index", kill, f"pipe:cat {shards}/train-00000.tar", "--out", tmp_path, "--workers", 2, check=False)
    assert done.returncode == 2 and "error: one of 2 processes was killed" in done.stderr


def test_a_command_that_fails_is_a_broken_shard(shards, tmp_path):
    with pytest.raises(UserError, match="ended with status 3"):
        index([f"pipe:cat {shards}/train-00000.tar; exit 3"], tmp_path / "out")


def test_a_command_that_falls_silent_is_a_broken_shard(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "SILENCE", 0.2)
    monkeypatch.setattr(module, "PAUSES", ())
    place = f"pipe:head -c 5000 {shards}/train-00000.tar; sleep 1000"
    with pytest.raises(UserError, match=r"pipe:head .* TimeoutError: .* sent no byte for 0.2 seconds and was killed"):
        index([place], tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{shards}/train-00000.tar"], "manifest.json: already exists"),
        (["{shards}/train-00000.tar", "pipe:true"], "write --out DIR"),
        (["{shards}/train-00000.tar", "{shards}/train-00000.tar", "--out", "{out}"], "twice"),
        ([], "required: urls"),
    ],
)
def test_mistakes(shards, tmp_path, arguments, says):
    done = mae_dist("index", *(word.format(shards=shards, out=tmp_path) for word in arguments), check=False)
    assert done.returncode == 2
    assert says in done.stderr and "Traceback" not in done.stderr


def test_the_checksums_are_the_files(shards):
    found = scan(str(shards / "train-00000.tar")).shard
    recorded = Manifest.load(shards).shards[0]
    assert (found.sha256, found.md5, found.num_bytes) == (recorded.sha256, recorded.md5, recorded.num_bytes)


def test_wids_reads_them(shards):
    """wids compares each shard's MD5 sum with ours as it opens it."""
    wids = pytest.importorskip("wids")
    listing = json.loads((shards / "wids.json").read_text())
    assert listing["__kind__"] == "wids-shard-index-v1"
    for entry in listing["shardlist"]:
        reader = wids.wids.IndexedTarSamples(path=str(shards / entry["url"]), md5sum=entry["md5sum"])
        assert len(reader) == entry["nsamples"]
    data = wids.ShardListDataset(str(shards / "wids.json"), keep=True)
    assert len(data) == 46
    assert sorted({int(data[i][".cls"]) for i in range(len(data))}) == [0, 1]
