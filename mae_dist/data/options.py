"""What the data is and how it is cut. The defaults are the paper's pretraining augmentation (appendix A.1)."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from mae_dist.data.decode import MAX_PIXELS, Decoder
from mae_dist.data.turbojpeg import library
from mae_dist.errors import UserError
from mae_dist.local import check_local
from mae_dist.ranges import COUNT, COUNT_OR_NONE, check_numbers
from mae_dist.shards import remote
from mae_dist.urls import MASK


@dataclass(frozen=True)
class DataConfig:
    """The images, how they are cropped, and how they are read."""

    shards: str | None = None
    """Directory of training shards with a manifest, as `mae-dist shard` and `mae-dist index` make it; a path or any
    fsspec URL (s3://bucket/train)."""
    mode: Literal["exact", "webdataset"] = "exact"
    """webdataset: `shards` is a list that cannot be indexed ('https://host/{000..063}.tar', 'pipe:...'), read as it
    comes: neither exact nor resumable."""
    epoch_size: int | None = None
    """Images called an epoch in mode webdataset; null: as many as make `train.steps` last `train.epochs`."""
    val_shards: int | str | None = None
    """Held-out shards for the validation loss: a directory, or how many of the training shards to hold out."""
    fake: bool = False
    """Train on torchvision's FakeData (random pixels) when there are no images yet."""
    fake_size: int = 1000
    """Images in FakeData."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """RandomResizedCrop: range of the crop's share of the area."""
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    """RandomResizedCrop: range of width / height."""
    crop_clip: bool = False
    """Cut a crop that does not fit to the image, as the official linear probe does, instead of drawing another."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    eval_crop: float = 0.875
    """Side of the centred evaluation crop, as a share of the largest that fits (224 of 256 in the paper's code)."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Mean of each channel, subtracted from pixels in [0, 1]; one value serves any number of channels."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Standard deviation of each channel, that pixels are divided by; one value serves any number of channels."""
    cache_dir: str | None = None
    """Directory on this node's own disk for remote shards (s3://, https://, pipe:); null: mae_dist in XDG_CACHE_HOME,
    or in ~/.cache. Others must not be able to write there."""
    cache_bytes: int | None = None
    """Bytes that remote shards may take there; null: most of what is free."""
    allow_commands: bool = False
    """Run the commands (pipe:) that a manifest or a --config file names, and read the paths and other servers that a
    manifest fetched from elsewhere names. Only as an option or a variable; never kept in a run's config."""
    workers: int = 8
    """Decoding processes a rank; 0 decodes in the training process."""
    decoder: Decoder = "fast"
    """fast: libjpeg-turbo, then torch's bicubic. region: the same pixels, decoding no more than each crop (needs
    TurboJPEG 3 on every node). pil: crops equal to the official loader's to the bit, at half the speed."""
    dct_scale: bool = False
    """Decode JPEGs at 1/2, 1/4 or 1/8 where the crop stays at least as large as the model's images: for large photos,
    resized from a small image instead of the large one. Other pixels than without, though hardly to be seen."""
    max_pixels: int = MAX_PIXELS
    """An image whose header says more is a bad sample, refused before it is decoded (PIL refuses 179 million)."""
    max_bad_fraction: float = 1e-4
    """Share of the samples read that may be bad (unreadable) before the run stops; 10 always may, unless this is 0."""
    lanes: int = 1
    """Pieces of an epoch read side by side: 1 for local disks (a full shuffle), 256 for remote shards."""
    window: int = 0
    """Samples shuffled together within a lane; 0: all of them."""
    repeated_aug: int = 1
    """Views of each sample in a batch, side by side, for one read and one decode: with 4 the same `train.epochs` (of
    views) decode a quarter. A micro-batch must hold all views of its samples."""

    RANGES: ClassVar = {
        "epoch_size": "[1, 1000000000000]", "val_shards": COUNT_OR_NONE, "fake_size": COUNT, "crop_scale": "(0, 1]",
        "crop_ratio": "(0, 1e3]", "flip": "[0, 1]", "eval_crop": "(0, 1]", "mean": "[0, 1]", "std": "[1e-6, 1]",
        "cache_bytes": "[1, 1000000000000000]", "workers": "[0, 512]", "max_pixels": COUNT,
        "max_bad_fraction": "[0, 1]", "lanes": "[1, 1000000]", "window": COUNT_OR_NONE, "repeated_aug": "[1, 1000]",
    }  # fmt: skip

    def absolute(self) -> "DataConfig":
        """The same with local paths that hold in any working directory: a run is evaluated from elsewhere too."""

        def whole(path: str) -> str:
            return path if remote.is_remote(path) else str(Path(path).absolute())

        exact = self.mode == "exact"  # a list's own words name its data
        return dataclasses.replace(
            self,
            shards=whole(self.shards) if self.shards and exact else self.shards,
            val_shards=whole(self.val_shards) if isinstance(self.val_shards, str) else self.val_shards,
            cache_dir=self.cache_dir and whole(self.cache_dir),
        )

    def check(self, in_chans: int) -> None:
        """Raise UserError for what cannot be trained on."""
        check_numbers(self, "data.")
        check_channels(in_chans)
        check_local(self.cache_dir or "", "data.cache_dir")
        if not self.shards and not self.fake:
            raise UserError(
                "data.shards: not set. Make shards once with: mae-dist shard IMAGES SHARDS, then add "
                "--data.shards SHARDS (or try the machinery without images: --data.fake true)"
            )
        for name, place in (("shards", self.shards), ("val_shards", self.val_shards)):
            if isinstance(place, str) and MASK in place:
                raise UserError(
                    f"data.{name}: {place}: a run keeps no passwords and signatures; write the whole of it again: "
                    f"--data.{name} ..., or leave them out and put them into ~/.netrc"
                )
        if self.fake and self.val_shards is not None:
            raise UserError(f"data.val_shards: {self.val_shards}: nothing is held out of FakeData; leave it out")
        if not self.fake and self.fake_size != DataConfig.fake_size:
            raise UserError(f"data.fake_size: {self.fake_size}, but data.fake is false; leave it out")
        if self.shards and self.fake:
            raise UserError("data.fake: true, but data.shards is set too; leave one of them out")
        self._check_mode()
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, in_chans):
                raise UserError(
                    f"data.{name}: {len(values)} values for {in_chans} channels; write {in_chans}, or one for all"
                )
        for name in ("crop_scale", "crop_ratio"):
            if getattr(self, name)[0] > getattr(self, name)[1]:
                raise UserError(f"data.{name}: {getattr(self, name)} is not a range: write the smaller number first")
        if self.decoder == "region":
            library()  # raises where it is missing
        if self.dct_scale and self.decoder == "pil":
            raise UserError("data.dct_scale: true, but data.decoder pil promises the official pixels; leave one out")
        if self.dct_scale and self.repeated_aug > 1:
            raise UserError(
                "data.dct_scale: true, but data.repeated_aug cuts all views out of one decode; leave one out"
            )

    def _check_mode(self) -> None:
        shards = self.shards or ""
        listed = any(mark in shards for mark in ("pipe:", "{", ".tar?")) or shards.endswith(".tar")
        if self.mode == "exact" and listed:
            raise UserError(
                f"data.shards: {self.shards} is a list of shards, not a directory with a manifest; make one with: "
                f"mae-dist index '{self.shards}' --out DIR, then --data.shards DIR "
                "(or, for what cannot be indexed: --data.mode webdataset)"
            )
        if self.mode == "exact" and self.epoch_size is not None:
            raise UserError("data.epoch_size: an exact epoch is every image once; leave it out")
        if self.mode == "webdataset":
            if not listed:
                raise UserError(
                    f"data.mode: webdataset, but data.shards is {self.shards}; write a list of tars such as "
                    "'/data/train-{0000..0063}.tar', or leave data.mode out"
                )
            if isinstance(self.val_shards, int):
                raise UserError("data.val_shards: nothing can be held out of a list; write a directory of other shards")
            if self.dct_scale:
                raise UserError("data.dct_scale: mode webdataset decodes whole images; leave data.dct_scale out")
            if self.lanes != 1 or self.window:
                raise UserError("data.lanes, data.window: mode webdataset has no order to set; leave them out")
            if self.repeated_aug != 1:
                raise UserError("data.repeated_aug: mode webdataset makes one view of a sample; leave it out")


def check_channels(in_chans: int) -> None:
    """Raise UserError for what images are not read as."""
    if in_chans not in (1, 3):
        raise UserError(f"model.in_chans: {in_chans}: images are read as grey or RGB; write 1 or 3")
