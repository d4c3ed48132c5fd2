"""The command line: one thin function a command, each importing only what it needs."""

import argparse
import dataclasses
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

from mae_dist.arguments import Parser, picture, ratio, save_picture, share, share_or_none, size, whole
from mae_dist.errors import Ended, UserError, machine_fault
from mae_dist.launched import end_with_launcher, leave, rank_or_zero, take_local_rank
from mae_dist.output import protect
from mae_dist.urls import masked

USAGE = """usage: mae-dist COMMAND ...

  shard        images (folders, tars, parquet) -> WebDataset shards
  index        tar shards that somebody else made -> a manifest, so that they can be trained on as they are
  verify       read shards again and list what is wrong with them
  info         what is in a directory of shards, with a contact sheet if wanted
  pretrain     shards -> a pretrained encoder (alone, or on every process that torchrun starts)
  knn          k-NN accuracy of a run's frozen encoder
  linear       linear probe of a run's frozen encoder; --sweep: many learning rates at once
  finetune     train a run's encoder further on labels, or the same network from scratch
  export       a run's weights -> the files of facebookresearch/mae, timm or Hugging Face
  import       their weights -> a run, for knn, reconstruct and going on with pretraining
  reconstruct  a picture of what a run's model makes of masked images
  sync         copy what MLflow has not got yet of a run's journal
  demo         all of it, in minutes, on images that come with scikit-learn

mae-dist COMMAND --help says more."""


def shard(arguments: Sequence[str]) -> int:
    from mae_dist.shards.command import shard as make

    return make(arguments)


def index(arguments: Sequence[str]) -> int:
    parser = Parser(
        "mae-dist index",
        "Make a manifest and indexes for WebDataset shards made elsewhere; the shards stay as they are.",
        "  mae-dist index 'https://host/train-{0000..1023}.tar' --out /data/imagenet-index\n"
        "  mae-dist index /data/imagenet-wds",
    )
    parser.add_argument("urls", nargs="+", help="tars, a directory of tars, or patterns such as 'DIR/*.tar' or "
                        "'https://host/train-{0000..1023}.tar': local, any fsspec URL, or 'pipe:COMMAND'")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="for the manifest (the directory of local tars)")
    parser.add_workers()
    parser.add_argument(
        "--max-bad", type=whole(0), default=0, metavar="N", help="broken shards to leave out (%(default)s)"
    )
    parser.add_allow()
    given = parser.parse_args(arguments)
    from mae_dist.shards.index import index as make

    made = make(given.urls, given.out, given.workers, given.max_bad, given.allow_commands)
    manifest, size = made.manifest, sum(s.num_bytes for s in made.manifest.shards)
    print(f"{manifest.directory}: {manifest.num_samples} images in {len(manifest.shards)} shards, {size / 1e6:.1f} MB")
    if any(shard.name.startswith("pipe:") for shard in manifest.shards):
        print("its shards are commands: to read them, write --data.allow_commands true")
    if any(urlsplit(url).username for url in given.urls if "://" in url):
        print("it holds no user and password: put them into ~/.netrc (machine HOST login USER password PASSWORD)")
    for line in (*made.notes.lines(), *(f"left out: {bad}" for bad in made.bad)):
        print(line)
    return 0


def verify(arguments: Sequence[str]) -> int:
    from mae_dist.shards.encoded import MAX_PIXELS

    parser = Parser(
        "mae-dist verify",
        "Read shards again: sizes, checksums, counts, indexes, keys, every image decoded. "
        "Lists what is wrong by shard and key; exit status 1 when something is.",
        "  mae-dist verify /data/shards/train",
    )
    parser.add_argument("shards", help="directory with a manifest, local or an fsspec URL (s3://bucket/train)")
    parser.add_workers()
    parser.add_argument("--max-pixels", type=whole(1), default=MAX_PIXELS, metavar="N",
                        help="an image may have, as data.max_pixels in training (%(default)s)")  # fmt: skip
    parser.add_allow()
    given = parser.parse_args(arguments)
    from mae_dist.shards.mirror import load_manifest
    from mae_dist.shards.verify import verify as check

    manifest = load_manifest(given.shards, check=False, allow_commands=given.allow_commands)
    count = 0
    for problem in check(manifest, given.workers, given.max_pixels):
        print(problem, flush=True)
        count += 1
    found = f"{count} problems" if count else "nothing wrong"
    print(f"{masked(given.shards)}: {manifest.num_samples} images in {len(manifest.shards)} shards: {found}")
    return 1 if count else 0


def info(arguments: Sequence[str]) -> int:
    parser = Parser(
        "mae-dist info",
        "Counts, sizes, classes, and how well the shards are shuffled.",
        "  mae-dist info /data/shards/train --sheet sheet.png",
    )
    parser.add_argument("shards", help="directory with a manifest, local or an fsspec URL (s3://bucket/train)")
    parser.add_argument("--sheet", type=picture, metavar="FILE", help="draw a contact sheet of 64 images")
    parser.add_allow()
    given = parser.parse_args(arguments)
    from mae_dist.shards.info import contact_sheet, describe
    from mae_dist.shards.mirror import load_manifest

    manifest = load_manifest(given.shards, allow_commands=given.allow_commands)
    print(describe(manifest))
    if given.sheet:
        save_picture(contact_sheet(manifest), given.sheet)
    return 0


def pretrain(arguments: Sequence[str]) -> int:
    end_with_launcher()
    from mae_dist import config
    from mae_dist.train.pretrain import pretrain as run

    return run(config.load(arguments))


def knn(arguments: Sequence[str]) -> int:
    end_with_launcher()
    parser = Parser(
        "mae-dist knn",
        "Exact k-NN accuracy of a run's frozen encoder, alone or on every process that launch/torchrun.sh starts.",
        "  mae-dist knn runs/vit_b16 --train /data/shards/train --test /data/shards/val\n"
        "  mae-dist knn runs/vit_b16 --per-class 10 --seeds 0 1 2 --of untrained pretrained",
    )
    kinds = ("pretrained", "untrained", "pixels")
    parser.add_argument("run", type=Path, help="a run's directory, or one of its checkpoints")
    parser.add_argument("--train", metavar="SHARDS", help="labelled shards to vote, local or an URL (the run's own)")
    parser.add_argument("--test", metavar="SHARDS", help="labelled shards to classify (the run's held-out ones)")
    parser.add_argument(
        "--k",
        dest="ks",
        type=whole(1),
        metavar="N",
        nargs="+",
        default=(10, 20, 100, 200),
        help="neighbours (10 20 100 200)",
    )
    parser.add_argument("--of", nargs="+", choices=kinds, default=kinds[:1], help="features (pretrained)")
    parser.add_argument("--pool", choices=("mean", "cls"), default="mean", help="patch tokens' mean or class token")
    labels = parser.add_mutually_exclusive_group()
    labels.add_argument(
        "--fraction", type=share, default=1.0, metavar="F", help="share of each class's training labels (1)"
    )
    labels.add_argument("--per-class", type=whole(1), metavar="N", help="training labels a class (all)")
    parser.add_argument(
        "--seeds", type=whole(0), nargs="+", default=(0,), metavar="N", help="of that choice; the mean is shown (0)"
    )
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32"), help="of the encoder (the run's own)")
    parser.add_argument("--img-size", type=size, metavar="N", help="resize the positions for N or HxW pixels")
    parser.add_argument("--data.max_bad_fraction", dest="max_bad", type=share_or_none, metavar="F",
                        help="share of the images that may be unreadable (the run's own)")  # fmt: skip
    parser.add_allow()
    given = vars(parser.parse_args(arguments))
    from mae_dist.evaluate.knn import Question
    from mae_dist.evaluate.knn import knn as evaluate

    names = ("run", "train", "test", "precision", "max_bad", "img_size", "allow_commands")
    run, train, test, precision, bad, img_size, allow = (given.pop(name) for name in names)
    evaluate(run, train, test, Question(**given), precision, bad, img_size, allow)
    return 0


def linear(arguments: Sequence[str]) -> int:
    end_with_launcher()
    from mae_dist.evaluate.linear import linear as probe

    return probe(arguments)


def finetune(arguments: Sequence[str]) -> int:
    end_with_launcher()
    from mae_dist.evaluate.finetune import finetune as tune

    return tune(arguments)


def export(arguments: Sequence[str]) -> int:
    from mae_dist.exchange import TARGETS
    from mae_dist.exchange import export as write

    parser = Parser(
        "mae-dist export",
        "Write a run's weights for another library, with a model card.",
        "  mae-dist export runs/vit_b16 --to timm --out encoder.safetensors\n"
        "  mae-dist export runs/vit_b16 --to huggingface --out vit_mae",
    )
    parser.add_argument("run", type=Path, help="a run's directory, or one of its checkpoints")
    parser.add_argument("--to", required=True, choices=TARGETS, help="which library's layout")
    parser.add_argument("--out", type=Path, required=True, metavar="PATH",
                        help="a new directory, or a file: .pth for official; .safetensors, .pth for timm")  # fmt: skip
    parser.add_argument("--img-size", type=size, metavar="N", help="resize the positions for N or HxW pixels")
    given = parser.parse_args(arguments)
    for note in write(given.run, given.to, given.out, given.img_size):
        print(note)
    print(given.out)
    return 0


def import_(arguments: Sequence[str]) -> int:
    from mae_dist.exchange import SOURCES, import_run

    parser = Parser(
        "mae-dist import",
        "Make a run of weights that another project trained, to evaluate, reconstruct or pretrain further.",
        "  mae-dist import mae_visualize_vit_large.pth --from official --no-norm-pix --out runs/large",
    )
    parser.add_argument("file", type=Path, help=".pth, .safetensors, or a Hugging Face directory")
    parser.add_argument("--from", dest="source", required=True, choices=SOURCES, help="whose layout it is")
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="the new run's directory: runs/NAME")
    resize = "resize the positions for N or HxW pixels"
    parser.add_argument("--img-size", type=size, dest="resize", metavar="N", help=resize)
    known = (  # what no tensor tells
        parser.add_argument("--enc-heads", type=whole(1), metavar="N", help="attention heads (by the encoder's width)"),
        parser.add_argument("--dec-heads", type=whole(1), metavar="N", help="attention heads (by the decoder's width)"),
        parser.add_argument("--norm-pix", dest="norm_pix_loss", action=argparse.BooleanOptionalAction,
                            help="whether the decoder predicts normalised pixels (true)"),
        parser.add_argument("--mask-ratio", type=ratio, metavar="R", help="it was trained with (0.75)"),
        parser.add_argument("--trained-size", dest="img_size", type=size, metavar="HxW",
                            help="pixels, when the positions are no square"),
        parser.add_argument("--enc-name", metavar="NAME", help="the ViT of timm that it is (a plain one of its width)"),
    )  # fmt: skip
    parser.add_argument("--any-eps", action="store_true", help="take weights whose config says another eps than 1e-6")
    given = vars(parser.parse_args(arguments))
    told = {action.dest: given[action.dest] for action in known if given[action.dest] is not None}
    resize, any_eps = given["resize"], given["any_eps"]
    for note in import_run(given["file"], given["source"], given["out"], told, resize, any_eps):
        print(note)
    print(given["out"])
    return 0


def reconstruct(arguments: Sequence[str]) -> int:
    parser = Parser(
        "mae-dist reconstruct",
        "Draw input | masked | reconstruction | reconstruction with the visible patches pasted.",
        "  mae-dist reconstruct runs/vit_b16 photo.jpg another.jpg --out reconstruction.png\n"
        "  mae-dist reconstruct runs/vit_b16 /data/shards/val --mask-ratio 0.9 --seed 0 1 2",
    )
    parser.add_argument("run", type=Path, help="a run's directory, or one of its checkpoints")
    parser.add_argument("images", nargs="+", help="image files, or directories of shards; local or URLs")
    parser.add_argument("--out", type=picture, default="reconstruction.png", help="(%(default)s)")
    parser.add_argument("--mask-ratio", type=ratio, metavar="R", help="share of patches to hide (the run's own)")
    parser.add_argument("--seed", type=whole(0), nargs="+", default=[0], metavar="N",
                        help="of the masks; each makes a row (%(default)s)")  # fmt: skip
    parser.add_argument("--features", type=picture, metavar="FILE",
                        help="a second picture: the patch features, three principal components as colours")  # fmt: skip
    parser.add_allow()
    given = parser.parse_args(arguments)
    from mae_dist.evaluate.reconstruct import NORM_PIX, Viewer

    viewer = Viewer(given.run, given.images, given.mask_ratio, given.allow_commands)
    save_picture(viewer.reconstruction(given.seed), given.out)
    if given.features:
        save_picture(viewer.features(), given.features)
    if viewer.config.model.norm_pix_loss:
        print(NORM_PIX)
    return 0


def sync(arguments: Sequence[str]) -> int:
    parser = Parser(
        "mae-dist sync", "Copy what MLflow has not got yet of a run's journal.", "  mae-dist sync runs/vit_b16"
    )
    parser.add_argument("run", type=Path, help="a run's directory")
    parser.add_argument("--experiment", help="name of the MLflow experiment (the run's own)")
    parser.add_argument("--tracking-uri", help="where MLflow stores (the run's own)")
    given = parser.parse_args(arguments)
    from mae_dist.evaluate.tracked import TrackConfig, track_config
    from mae_dist.track.mlflow import sync as send

    run = Path(os.path.realpath(given.run))
    try:
        config = track_config(run)
    except UserError:
        if not given.tracking_uri:
            raise
        config = TrackConfig()
    told = {key: value for key, value in vars(given).items() if key != "run" and value}
    config = dataclasses.replace(config, **told)
    config.check()
    summary = send(given.run, config)
    print(summary)
    return 1 if summary.error else 0


def demo(arguments: Sequence[str]) -> int:
    parser = Parser("mae-dist demo", "Shard, pretrain on two processes, evaluate, review; 2 CPU cores do.")
    parser.add_argument("--dir", type=Path, default=Path("demo"), help="where everything goes (%(default)s)")
    given = parser.parse_args(arguments)
    from mae_dist.ops.demo import demo as show

    show(given.dir)
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "shard": shard,
    "index": index,
    "verify": verify,
    "info": info,
    "pretrain": pretrain,
    "knn": knn,
    "linear": linear,
    "finetune": finetune,
    "export": export,
    "import": import_,
    "reconstruct": reconstruct,
    "sync": sync,
    "demo": demo,
}


def check_environment() -> None:
    """Raise UserError for a variable MAE_DIST_* that means nothing."""
    if any(name.upper().startswith(("MAE_DIST_", "MAEDIST")) for name in os.environ):
        from mae_dist.config import check_variables  # and torch, which most commands do without

        check_variables(os.environ, None)


# What these print is what they are for; the others leave it in files too, and go on when nobody reads.
PRODUCTS = ("verify", "info")
ASKING = {"-h", "--help", "--print_config", "--dry-run"}


def main() -> None:
    """Exit status 0: done; 2: the user's mistake, said in one line; 3: the training diverged; 75: another rank was
    lost, or the machine failed; 128 + n: stopped by signal n; 1: ours.
    """
    arguments = sys.argv[1:]
    named = next((word for word in arguments if not word.startswith("--local")), "")
    protect(product=named not in COMMANDS or named in PRODUCTS or bool(ASKING & set(arguments)))
    try:
        take_local_rank(arguments)
        command, arguments = (arguments[:1] or ["--help"])[0], arguments[1:]
        if command in ("-h", "--help", "help"):
            print(USAGE)
            leave(0)
        if command not in COMMANDS:
            raise UserError(f"mae-dist has no command {command!r}; the commands are {', '.join(COMMANDS)}")
        if command not in ("pretrain", "linear", "finetune"):  # which read their config from it
            check_environment()
        leave(COMMANDS[command](arguments))
    except (UserError, Ended, OSError) as found:
        error = machine_fault(found) if isinstance(found, OSError) else found
        if error is None:
            fail()
        rank = rank_or_zero()
        if rank and "MASTER_ADDR" in os.environ:
            # all ranks may find the same: let rank 0 say it (torchrun then ends us), or say it if alone
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(2 if os.environ.get("LOCAL_RANK", "0") == "0" else 4)
        print(f"error: {error}" if not rank else f"error on rank {rank}: {error}", file=sys.stderr, flush=True)
        leave(error.status)
    except SystemExit as end:  # of --help: what it printed is to arrive, or be missed here
        leave(end.code if isinstance(end.code, int) else 0)
    except KeyboardInterrupt:
        leave(130)
    except Exception:
        fail()


def fail() -> NoReturn:
    """Exit after an error of ours, with its traceback in one piece."""
    rank = os.environ.get("RANK")
    where = f"rank {rank} failed:\n" if rank else ""
    print(f"{where}{masked(traceback.format_exc())}", file=sys.stderr, end="", flush=True)
    leave(1)
