"""The options of commands: each value in its range or refused in one line, nothing abbreviated, doubled or dropped."""

import sys

import pytest

from mae_dist import cli
from mae_dist.arguments import Parser
from mae_dist.errors import UserError

LINES = [
    ("shard a b --shard 3", "--shard: unexpected; did you mean --shard-size?"),
    ("shard a b --dry", "--dry: unexpected; did you mean --dry-run?"),
    ("shard a b c", "c: unexpected"),
    ("shard a", "required: out"),
    ("shard a b --part 9/4", "--part: 9/4: write I/N"),
    ("shard a b --part 4/4", "--part: 4/4: write I/N"),
    ("shard a b --part x", "--part: x: write I/N"),
    ("shard a b --part -1/4", "--part: expected one argument"),
    ("shard a b --part 1", "--part: 1: write I/N"),
    ("shard a b --part /32", "--part: /32: write I/N"),
    ("shard a b --part 1/2/3", "--part: 1/2/3: write I/N"),
    ("shard a b --part 0/0", "--part: 0/0: write I/N"),
    ("shard a b --workers 0", "--workers: 0: write a whole number of at least 1 and at most 1024"),
    ("shard a b --workers -1", "--workers: -1: write a whole number of at least 1"),
    ("shard a b --workers 100000", "--workers: 100000: write a whole number of at least 1 and at most 1024"),
    ("shard a b --workers 2.5", "--workers: 2.5: write a whole number"),
    ("shard a b --shard-size 0", "--shard-size: 0: write a whole number of at least 1"),
    ("shard a b --shard-size 1e3", "--shard-size: 1e3: write a whole number of at least 1"),
    ("shard a b --seed -1", "--seed: -1: write a whole number of at least 0"),
    ("shard a b --seed 99999999999999999999", "--seed: 99999999999999999999: write a whole number"),
    ("shard a b --max-bad -1", "--max-bad: -1: write a whole number of at least 0"),
    ("shard a b --quality 0", "--quality: 0: write a whole number of at least 1 and at most 100"),
    ("shard a b --quality 101", "--quality: 101: write a whole number"),
    ("shard a b --resize 256", "--resize: 256: write none, shortest:256 or only-if-bigger:512"),
    ("shard a b --resize shortest:0", "--resize: shortest:0: write none"),
    ("shard a b --resize longest:256", "--resize: longest:256: write none"),
    ("shard a b --resize shortest:-3", "--resize: shortest:-3: write none"),
    ("shard a b --for-ranks 0", "--for-ranks: 0: write a whole number of at least 1"),
    ("shard a b --labels=", "an empty argument"),
    ("shard a b --label x", "--label: unexpected; did you mean --labels?"),
    ("shard a b --labels", "--labels: expected one argument"),
    ("index a.tar a.tar", "URLS: a.tar is there twice"),
    ("index a.tar --max-bad -1", "--max-bad: -1"),
    ("index a.tar --workers 0", "--workers: 0"),
    ("verify a --workers 0", "--workers: 0"),
    ("verify a b", "b: unexpected"),
    ("verify", "required: shards"),
    ("info a --sheet x.txt", "x.txt: no picture can be written under this name; write x.png"),
    ("knn r --k 0", "--k: 0: write a whole number of at least 1"),
    ("knn r --k 10 10", "--k: 10 is there twice"),
    ("knn r --seeds 0 0", "--seeds: 0 is there twice"),
    ("knn r --of pixels pixels", "--of: pixels is there twice"),
    ("knn r --of pixel", "--of: invalid choice: 'pixel'"),
    ("knn r --fraction 0", "--fraction: 0: write a share above 0 and at most 1"),
    ("knn r --fraction 2", "--fraction: 2: write a share"),
    ("knn r --fraction nan", "--fraction: nan: write a share"),
    ("knn r --fraction 1e-400", "--fraction: 1e-400: write a share"),
    ("knn r --per-class 0", "--per-class: 0: write a whole number of at least 1"),
    ("knn r --per-class 5 --fraction 0.5", "not allowed with argument"),
    ("knn r --data.max_bad_fraction 2", "--data.max_bad_fraction: 2: write a share"),
    ("export r --to timm --out x --img-size 0x0", "--img-size: 0x0: write pixels"),
    ("export r --to timm --out x --img-size 224x", "--img-size: 224x: write pixels"),
    ("export r --to timm --out x --img-size 1x2x3", "--img-size: 1x2x3: write pixels"),
    ("export r --to timm --out x --img-size -224", "--img-size: -224: write pixels"),
    ("export r --to tim --out x", "--to: invalid choice: 'tim'"),
    ("import f --from timm --out x --enc-heads 0", "--enc-heads: 0: write a whole number"),
    ("import f --from timm --out x --mask-ratio 1", "--mask-ratio: 1: some patches must be seen"),
    ("import f --from timm --out x --trained-size 0", "--trained-size: 0: write pixels"),
    ("reconstruct r a.jpg --mask-ratio 1.5", "--mask-ratio: 1.5: write a share"),
    ("reconstruct r a.jpg --seed -1", "--seed: -1: write a whole number of at least 0"),
    ("reconstruct r a.jpg --seed 1 1", "--seed: 1 is there twice"),
    ("reconstruct r a.jpg b.jpg a.jpg", "IMAGES: a.jpg is there twice"),
    ("sync r --tracking sqlite:///x", "--tracking: unexpected; did you mean --tracking-uri?"),
    ("info a --sheet ..png", "..png: no picture can be written under this name; write png.png"),
    ("verify a\nb\x1b[31m", "a\\nb\\x1b[31m: no manifest.json here"),
    ("sync a\nb", "a\\nb/config.yaml: missing"),
    ("demo --dir=", "an empty argument"),
    ("demo x", "x: unexpected"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "says"), LINES, ids=[line for line, _ in LINES])
def test_a_mistake_in_an_option_is_named(line, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command, *arguments = line.split(" ")
    with pytest.raises(UserError) as caught:
        cli.COMMANDS[command](arguments)
    message = str(caught.value)
    assert says in message and "\n" not in message
    assert not any(tmp_path.iterdir())


def test_an_option_given_twice_is_said(capsys):
    with pytest.raises(UserError, match="nowhere"):
        cli.verify(["nowhere", "--workers", "2", "--workers=1"])
    assert capsys.readouterr().err == "note: --workers: given twice; the later one is used\n"


@pytest.mark.parametrize("command", [name for name in cli.COMMANDS if name not in ("pretrain", "linear", "finetune")])
def test_help(command, capsys, monkeypatch):
    """Every option has a meaning, and there is an example."""
    monkeypatch.setenv("COLUMNS", "100")
    parsers = []
    monkeypatch.setattr(Parser, "print_help", lambda self: parsers.append(self) or print(self.format_help()))
    with pytest.raises(SystemExit) as end:
        cli.COMMANDS[command](["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and max(map(len, text.splitlines())) <= 120
    assert f"\n  mae-dist {command} " in text or command == "demo"
    parser = parsers[0]
    assert all(action.help and len(action.help.split()) > 1 for action in parser._actions if action.dest != "out")


@pytest.mark.parametrize("command", ["info", "shard", "knn", "pretrain", "linear"])
def test_every_command_refuses_a_misspelt_variable(command, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("MAE_DIST_TRAIN__STEP", "3")
    monkeypatch.setattr(sys, "argv", ["mae-dist", command, str(tmp_path)])
    monkeypatch.setattr(cli, "leave", sys.exit)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    if command not in ("pretrain", "linear"):
        said = "error: MAE_DIST_TRAIN__STEP: no such variable, did you mean MAE_DIST_TRAIN__STEPS? Or unset it\n"
        assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("shard {here} {here}/loop", "loop"),
        ("sync {here}/loop", "loop/config.yaml: missing"),
        ("info {shards} --sheet /proc/self/sheet.png", "/proc/self/sheet.png: no file can be made there"),
    ],
)
def test_a_path_that_leads_nowhere_is_one_line(line, says, shards, tmp_path, monkeypatch, capsys):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "0.jpg").write_bytes((shards / "train-00000.tar").read_bytes()[512:2048])
    monkeypatch.setattr(sys, "argv", ["mae-dist", *line.format(here=tmp_path, shards=shards).split()])
    monkeypatch.setattr(cli, "leave", sys.exit)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and says in error and error.count("\n") == 1


def test_a_working_directory_that_is_gone_is_said_where_it_is_needed(tmp_path, monkeypatch, capsys):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    monkeypatch.setattr(cli, "leave", sys.exit)
    for name, says in (("shards", "the current directory is gone"), (str(tmp_path / "shards"), "no manifest.json")):
        monkeypatch.setattr(sys, "argv", ["mae-dist", "pretrain", "--train.device=cpu", f"--data.shards={name}"])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 2 and says in capsys.readouterr().err
