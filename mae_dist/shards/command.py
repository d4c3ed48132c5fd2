"""`mae-dist shard`: its options, and what it prints."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from mae_dist.arguments import Parser, part, resize, whole


def shard(arguments: Sequence[str]) -> int:
    """Turn images into shards, or with --dry-run say what that would take; returns the exit status."""
    from mae_dist.shards.encoded import MAX_PIXELS

    parser = Parser(
        "mae-dist shard",
        "Turn images into WebDataset shards, globally shuffled. The same command again does what is missing.",
        "  mae-dist shard /data/imagenet/train /data/shards/train --dry-run\n"
        "  mae-dist shard ILSVRC2012_img_val.tar s3://bucket/val --labels imagenet_2012_validation_synset_labels.txt\n"
        "  mae-dist shard photos/ shards/ --resize shortest:256 --max-bad 10",
    )
    number = partial(parser.add_argument, metavar="N")
    parser.add_argument(
        "images", help="class folders, flat directory, ILSVRC tar, directory or pattern of tars, parquet"
    )
    parser.add_argument("out", help="new directory for the shards, or an fsspec URL (s3://bucket/train)")
    parser.add_argument(
        "--labels", metavar="FILE", help="of a flat directory or tar: LABEL, or NAME LABEL, a line; or CSV"
    )
    number("--shard-size", type=whole(1), default=1000, help="images a shard (%(default)s)")
    parser.add_workers()
    number("--seed", type=whole(0), default=0, help="of the shuffle before writing (%(default)s)")
    number("--max-bad", type=whole(0), default=0, help="unreadable images to leave out (%(default)s)")
    parser.add_argument("--resize", type=resize, default="none", metavar="HOW",
                        help="none, shortest:N or only-if-bigger:N pixels (%(default)s)")  # fmt: skip
    number("--quality", type=whole(1, 100), default=95, help="of JPEGs encoded again (%(default)s)")
    number("--max-pixels", type=whole(1), default=MAX_PIXELS,
           help="an image may have, as data.max_pixels in training (%(default)s)")  # fmt: skip
    parser.add_argument("--exif-rotate", action="store_true", help="turn pixels upright (the official loader does not)")
    parser.add_argument("--all-suffixes", action="store_true",
                        help="take what begins as an image does, whatever it is called (.gif, none)")  # fmt: skip
    parser.add_argument("--image-column", metavar="NAME", help="of parquet files (image)")
    parser.add_argument("--label-column", metavar="NAME", help="of parquet files (label); none: no labels")
    parser.add_argument("--part", type=part, default=(0, 1), metavar="I/N", help="shards I, I + N, ... only, I from 0")
    parser.add_argument("--ray", default="", metavar="ADDRESS", help="work on a Ray cluster (auto, or HOST:PORT)")
    parser.add_argument("--aside", metavar="DIR", help="where shards for a remote OUT are made (NAME.partial here)")
    parser.add_argument("--dry-run", action="store_true", help="estimate size, time and shards; write nothing")
    number("--for-ranks", type=whole(1), default=8, help="of the training, for the dry run's warning (%(default)s)")
    number("--for-workers", type=whole(1), default=8, help="data workers a rank, likewise (%(default)s)")
    given = vars(parser.parse_args(arguments))
    dry, ranks, loaders = (given.pop(name) for name in ("dry_run", "for_ranks", "for_workers"))
    if dry:
        return shard_dry_run(given, ranks, loaders)
    from mae_dist.shards.write import shard as write
    from mae_dist.shards.write import summary

    manifest = write(**given)
    if manifest is None:
        print(f"{given['out']}: this part is done; the part that ends last completes it")
        return 0
    size = sum(s.num_bytes for s in manifest.shards)
    print(
        f"{given['out']}: {manifest.num_samples} images, {len(manifest.classes)} classes, "
        f"{len(manifest.shards)} shards, {size / 1e6:.1f} MB"
    )
    if text := summary(given["out"]):
        print(text)
    return 0


def shard_dry_run(given: dict[str, Any], ranks: int, loaders: int) -> int:
    from mae_dist.shards.estimate import estimate
    from mae_dist.shards.write import make_recipe, place_of, refuse_inside

    apart = ("out", "workers", "max_bad", "part", "ray", "aside")  # decide no bytes
    recipe = make_recipe(**{name: value for name, value in given.items() if name not in apart})
    refuse_inside(recipe, place_of(given["out"], given["aside"]))
    expected = estimate(recipe, given["workers"])
    print(expected.text(given["workers"]))
    for line in expected.bad:
        print(f"unreadable: {line}")
    for line in expected.notes:
        print(line)
    if warning := expected.warning(ranks, loaders, given["shard_size"]):
        print(warning)
    return 0
