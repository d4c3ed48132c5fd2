"""Killed, split over machines, started twice: the same bytes in the end, and OUT is whole or not there."""

import errno
import fcntl
import json
import os
import pty
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from filelock import FileLock

from mae_dist.errors import UserError
from mae_dist.shards import processes, write
from mae_dist.shards.one_shard import write_shard
from mae_dist.shards.write import make_recipe, place_of, prepare, shard
from tests.conftest import mae_dist, write_images


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def records(out: Path) -> int:
    return len(list(Path(f"{out}.partial").glob("plan/*.done")))


def kill_at(command: list[str], out: Path, shards: int) -> int:
    """Start, SIGKILL when so many more shards are done (some are then half-written); returns how many are done."""
    before = records(out)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None and records(out) < before + shards:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    _, said = process.communicate(timeout=60)  # returns when the workers have gone too: they hold the pipe
    assert process.returncode == -signal.SIGKILL, said
    assert not out.exists()
    return records(out)


def test_killed_five_times_and_finished_gives_the_bytes_of_an_uninterrupted_run(tmp_path):
    images = write_images(tmp_path / "in", classes=3, each=80, size=64)
    settings = ["--shard-size", "4", "--resize", "shortest:200", "--seed", "3"]
    mae_dist("shard", images, tmp_path / "whole", "--workers", 1, *settings)
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "mae_dist", "shard", str(images), str(out), "--workers", "3", *settings]
    choose = random.Random()
    done = [kill_at(command, out, choose.randint(0, 8)) for _ in range(5)]
    assert done == sorted(done)
    mae_dist(*command[3:])
    assert content(out) == content(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "killed", "whole"]
    print(f"shards done at each kill: {done}, of 60; {len(content(out))} files equal")


def test_a_restart_writes_only_what_is_missing(images, tmp_path):
    out = tmp_path / "out"
    place = place_of(out)
    place.aside.mkdir()
    plan = prepare(place, make_recipe(images, shard_size=10), workers=1)
    for i in (0, 3):
        write_shard(place.aside, "", i)
    kept = {path: path.stat().st_mtime_ns for path in place.shards.iterdir()}
    (place.shards / f"{plan.shard_name(3)}.tar").write_bytes(b"cut")  # as by a disk that lied: its size says so
    time.sleep(0.01)
    shard(images, out, shard_size=10)
    for path, written in kept.items():
        now = (out / path.name).stat().st_mtime_ns
        assert (now == written) == ("00000" in path.name), path.name


@pytest.mark.parametrize("leads_to", ["empty", "nothing"])
def test_out_may_be_a_link(images, shards, tmp_path, leads_to):
    if leads_to == "empty":
        (tmp_path / "there").mkdir()
    (tmp_path / "out").symlink_to("there")
    assert shard(images, tmp_path / "out", shard_size=10).num_samples == 46
    assert (tmp_path / "out").is_symlink()
    assert content(tmp_path / "there") == content(shards)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "there"]


def test_out_may_be_a_mount_point_and_killed_there_while_it_is_filled(images, shards, tmp_path, monkeypatch):
    out, honest = tmp_path / "out", Path.rename
    (out / "lost+found").mkdir(parents=True)
    monkeypatch.setattr(Path, "is_mount", lambda path: path == out)  # a real one takes rights that tests lack

    def no_rename_of_a_mount_point(path, target):
        if Path(target) == out:
            raise OSError("Device or resource busy")
        if Path(target) == out / "train-00003.tar":
            raise KeyboardInterrupt
        return honest(path, target)

    monkeypatch.setattr(Path, "rename", no_rename_of_a_mount_point)
    with pytest.raises(KeyboardInterrupt):
        shard(images, out, shard_size=10)
    assert not (out / "manifest.json").exists()
    monkeypatch.setattr(Path, "rename", honest)
    monkeypatch.setattr(write, "write_shard", lambda *_: 1 / 0)  # none is made twice
    (out / "lost+found").rmdir()
    for _ in range(2):  # the second finds that all is done
        assert shard(images, out, shard_size=10).num_samples == 46
        assert content(out) == content(shards)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_other_settings_do_not_go_on_with_an_unfinished_start(images, tmp_path):
    out = tmp_path / "out"
    shard(images, out, shard_size=10, part=(0, 2))
    with pytest.raises(UserError, match=r"seed 0 \(now 1\), resize none \(now shortest:8\); give the same options"):
        shard(images, out, shard_size=10, seed=1, resize="shortest:8")
    assert records(out) == 3  # nothing lost by asking


@pytest.mark.parametrize("written", ["", "{}", "[]", "7", '{"recipe": 1}', "[" * 100_000])
def test_a_damaged_record_of_an_unfinished_start_is_named_or_made_again(images, shards, tmp_path, written):
    """The plan is named; a shard whose record is damaged is made again."""
    out, plan = tmp_path / "out", tmp_path / "out.partial" / "plan"
    shard(images, out, shard_size=10, part=(0, 2))
    whole = (plan / "plan.json").read_text()
    (plan / "plan.json").write_text(written)
    with pytest.raises(UserError, match=r"out.partial/plan.*damaged .*to begin anew"):
        shard(images, out, shard_size=10)
    (plan / "plan.json").write_text(whole)
    (plan / "train-00000.done").write_text(written)
    shard(images, out, shard_size=10)
    assert content(out) == content(shards)


@pytest.mark.parametrize("content", ["7", "[]", "{}", '{"stored": 1, "bad": [], "left_out": {}}', '{"stored": 1, '
                                     '"bad": 0, "left_out": "../x"}', "[" * 100_000])  # fmt: skip
def test_damaged_counts_of_complete_shards_are_said(images, tmp_path, content):
    shard(images, tmp_path / "out", shard_size=10)
    (tmp_path / "out" / write.COUNTS_NAME).write_text(content)
    assert "counts.json is damaged" in write.summary(tmp_path / "out")


@pytest.mark.parametrize("n", [2, 3, 7])
def test_parts_in_any_order_give_the_same_bytes_and_the_last_completes(images, shards, tmp_path, n):
    out = tmp_path / "out"
    order = random.sample(range(n), n)
    results = [shard(images, out, shard_size=10, part=(i, n)) for i in order]
    last = max(order.index(i) for i in range(min(n, 5)))  # 5 shards: parts beyond have nothing to do
    assert [result is None for result in results] == [i < last for i in range(n)]
    assert results[-1].num_samples == 46
    assert content(out) == content(shards)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("step", ["lock", "prepare", "already_done", "carry_out", "finish"])
def test_a_part_under_which_another_completes_and_tidies_up_is_done(images, shards, tmp_path, monkeypatch, step):
    out, where = tmp_path / "out", write.Place if step == "lock" else write
    shard(images, out, shard_size=10, part=(0, 2))
    honest = getattr(where, step)

    def late(*arguments, **options):
        if not out.exists():
            shutil.copytree(shards, out)
            write.place_of(out).remove()
        return honest(*arguments, **options)

    monkeypatch.setattr(where, step, late)
    assert shard(images, out, shard_size=10, part=(0, 2)).num_samples == 46
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_parts_at_the_same_time(images, shards, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "mae_dist", "shard", str(images), str(out), "--shard-size", "10", "--workers", "1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    parts = [subprocess.Popen([*command, "--part", f"{i}/3"], **pipes) for i in range(3)]
    said = [process.communicate(timeout=120) for process in parts]
    assert [process.returncode for process in parts] == [0, 0, 0], said
    assert content(out) == content(shards)
    assert 1 <= sum("46 images" in line for line, _ in said) <= 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_second_start_beside_a_running_one_is_refused(images, tmp_path):
    place = place_of(tmp_path / "out")
    place.aside.mkdir()
    with FileLock(place.aside / "part-0-of-1.lock"), pytest.raises(UserError, match="another mae-dist shard"):
        shard(images, tmp_path / "out")


def test_a_start_killed_between_the_rename_and_tidying_up_is_done(images, shards, tmp_path):
    out = tmp_path / "out"
    shard(images, out, shard_size=10, part=(0, 2))
    shutil.rmtree(tmp_path / "out.partial" / "shards")  # it has become OUT
    shutil.copytree(shards, out)
    assert shard(images, out, shard_size=10).num_samples == 46
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_killed_worker_is_an_error_and_no_hang(images, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="one of 2 processes was killed"):
        list(processes.in_processes(kill_yourself, [1, 2, 3], workers=2))


def kill_yourself(job: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_too_many_bad_images_in_a_part_leave_the_other_parts_their_work(images, tmp_path):
    copy = tmp_path / "in"
    shutil.copytree(images, copy)
    for path in copy.rglob("*.jpg"):
        path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(
        UserError, match=r"\d+ unreadable images: .*--max-bad N .* finished shards stay in .*out.partial"
    ):
        shard(copy, tmp_path / "out", shard_size=10, part=(1, 2), max_bad=3)
    with pytest.raises(UserError, match="none of the 46 images is readable"):
        shard(copy, tmp_path / "out", shard_size=10, max_bad=100)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_parts_are_over_the_limit_together_and_each_makes_its_mended_ones_again(images, tmp_path):
    """One bad image in each of two parts: neither completes OUT without them, and neither waits for the other."""
    copy, out = tmp_path / "in", tmp_path / "out"
    shutil.copytree(images, copy)
    whole = shard(copy, tmp_path / "undisturbed", shard_size=1)
    assert whole
    stored = [whole.tar_path(i).read_bytes() for i in (0, 1)]  # a shard of each part
    bad = {path: path.read_bytes() for path in copy.rglob("*.jpg") if any(path.read_bytes() in tar for tar in stored)}
    for path in bad:
        path.write_bytes(b"x")
    assert shard(copy, out, shard_size=1, part=(0, 2), max_bad=1) is None
    with pytest.raises(UserError, match="2 unreadable images"):
        shard(copy, out, shard_size=1, part=(1, 2), max_bad=1)
    for path, data in bad.items():
        path.write_bytes(data)
    with pytest.raises(UserError, match="1 unreadable image"):
        shard(copy, out, shard_size=1, part=(0, 2))
    assert shard(copy, out, shard_size=1, part=(1, 2)) is not None
    assert content(out) == content(tmp_path / "undisturbed")


def test_when_nobody_wants_more_results_in_order_nobody_waits_for_them():
    results = processes.in_order(time.sleep, [0.0, 0.0, *[1000.0] * 6], workers=2)
    assert next(results) is None
    results.close()  # as Ctrl-C does; returns


@pytest.mark.parametrize("mended", [False, True])
def test_after_too_many_bad_images_the_same_command_goes_on(images, tmp_path, mended):
    """With a higher --max-bad, or with the images mended: the bytes of a run that nothing disturbed."""
    copy, out = tmp_path / "in", tmp_path / "out"
    shutil.copytree(images, copy)
    bad = [copy / "class_0" / f"{i:03d}.jpg" for i in range(5)]
    for path in bad:
        path.write_bytes(b"x")
    with pytest.raises(UserError, match=r"\d+ unreadable images?: .*/in/class_0/00\d.jpg: .*--max-bad N"):
        shard(copy, out, shard_size=2)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.partial" / "shards").glob("*.tar")}
    listed = (tmp_path / "out.partial" / "bad_images.txt").read_text()
    assert kept and "/in/class_0/00" in listed
    if mended:
        for path in bad:
            shutil.copy(images / "class_0" / path.name, path)
    shard(copy, out, shard_size=2, max_bad=0 if mended else 5)
    if mended:
        shard(images, tmp_path / "undisturbed", shard_size=2)
    else:
        shard(copy, tmp_path / "undisturbed", shard_size=2, max_bad=5)
        assert all((out / path.name).stat().st_mtime_ns == written for path, written in kept.items())
    found, expected = content(out), content(tmp_path / "undisturbed")
    found.pop("recipe.json"), expected.pop("recipe.json")  # says where the images lay
    assert found == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "undisturbed"]


@pytest.mark.parametrize("failure", [errno.EIO, errno.ESTALE])
def test_storage_that_fails_is_no_bad_image(images, shards, tmp_path, monkeypatch, failure):
    honest = Path.read_bytes

    def fails(path: Path) -> bytes:
        if path == images / "class_0" / "003.jpg":
            raise OSError(failure, os.strerror(failure), str(path))
        return honest(path)

    monkeypatch.setattr(Path, "read_bytes", fails)
    with pytest.raises(UserError, match=r"\[Errno .*class_0/003.jpg'; start the same command again to go on"):
        shard(images, tmp_path / "out", shard_size=10, max_bad=46)
    monkeypatch.undo()
    shard(images, tmp_path / "out", shard_size=10, max_bad=46)
    assert content(tmp_path / "out") == content(shards)


def test_a_broken_link_is_a_bad_image(images, tmp_path):
    shutil.copytree(images, tmp_path / "in")
    (tmp_path / "in" / "class_0" / "x.jpg").symlink_to("nowhere")
    assert shard(tmp_path / "in", tmp_path / "out", max_bad=1).num_samples == 46
    assert "class_0/x.jpg" in (tmp_path / "out" / "bad_images.txt").read_text()


def test_without_a_terminal_progress_is_json_lines(images, tmp_path):
    done = mae_dist("shard", images, tmp_path / "out", "--workers", 2, "--shard-size", 10)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert lines[-1]["images"] == lines[-1]["of"] == 46
    assert lines[-1].keys() >= {"images_per_s", "mb_per_s", "eta_s", "seconds"}


def test_a_dry_run_writes_nothing_and_comes_close(images, shards, tmp_path):
    done = mae_dist("shard", images, tmp_path / "out", "--shard-size", 10, "--dry-run", "--for-ranks", 2)
    assert "46 images, 2 classes\n5 shards, about" in done.stdout
    assert "warning: 5 shards of 10 are too few for 2 ranks x 8 workers" in done.stdout
    assert not list(tmp_path.iterdir())
    said = float(re.search(r"about ([\d.]+) GB", done.stdout)[1]) * 1e9
    real = sum(path.stat().st_size for path in shards.glob("*.tar"))
    assert abs(said - real) < 0.3 * real + 1e6


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--resize", "256"], "write none, shortest:256 or only-if-bigger:512"),
        (["--resize", "shortest:0"], "write none"),
        (["--quality", "0"], "--quality: 0: write a whole number of at least 1 and at most 100"),
        (["--part", "2/2"], "--part: 2/2: write I/N"),
        (["--part", "x"], "--part"),
        (["--shard-size", "0"], "--shard-size: 0: write a whole number of at least 1"),
        (["--labels", "nowhere.txt"], "--labels is for one flat directory"),
        (["--aside", "elsewhere"], "--aside is for a remote OUT"),
    ],
)
def test_a_wrong_option_is_one_line_and_leaves_nothing(images, tmp_path, options, says):
    done = mae_dist("shard", images, tmp_path / "out", *options, check=False)
    assert done.returncode == 2
    assert says in done.stderr.strip().splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_on_a_terminal_progress_is_a_bar_with_speed_and_time_left(images, tmp_path):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 120, 0, 0))
    command = [sys.executable, "-m", "mae_dist", "shard", str(images), str(tmp_path / "o"), "--shard-size", "10"]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    said = b""
    try:
        while block := os.read(ours, 4096):
            said += block
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(ours)
    assert process.wait(timeout=60) == 0
    last = [line for line in said.decode().replace("\r", "\n").splitlines() if "46/46" in line][-1]
    assert re.search(r"100%.*46/46 \[\d\d:\d\d<\d\d:\d\d, .*image/s, [\d.]+ MB/s\]", last)


def test_ctrl_c_says_nothing_and_keeps_what_is_done(tmp_path):
    images = write_images(tmp_path / "in", classes=2, each=100, size=64)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "mae_dist", "shard", str(images), str(out), "--shard-size", "2"]
    command += ["--resize", "shortest:400", "--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while records(out) < 2:
        assert process.poll() is None
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "Traceback" not in said
    assert records(out) >= 2 and not out.exists()
