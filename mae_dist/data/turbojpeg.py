"""A rectangle of a JPEG, by the system's TurboJPEG >= 3: rows below it are not decoded, columns beside it hardly.

Called through ctypes, which releases the GIL. TurboJPEG 2 (Debian 12) has no such call.
"""

import ctypes
import ctypes.util
import os
import threading
from functools import cache

import numpy as np
from numpy.typing import NDArray

from mae_dist.errors import UserError

LIBRARY = "MAE_DIST_TURBOJPEG"  # environment variable: path of the library, where it is not installed system-wide
DECOMPRESS = 1  # TJINIT_DECOMPRESS
STOP_ON_WARNING, SUBSAMPLING, WIDTH, PRECISION, COLORSPACE = 0, 4, 5, 7, 8  # TJPARAM_*
MCU_WIDTH = (8, 16, 16, 8, 8, 32, 8, 32, 16)  # by subsampling
MARGIN = 2  # columns
PIXEL_FORMAT = {1: 6, 3: 0}  # channels -> TJPF_GRAY, TJPF_RGB
CMYK = 3  # TJCS_CMYK and TJCS_YCCK: left to PIL

Box = tuple[int, int, int, int]  # top, left, height, width


class Region(ctypes.Structure):
    _fields_ = (("x", ctypes.c_int), ("y", ctypes.c_int), ("w", ctypes.c_int), ("h", ctypes.c_int))


class Fraction(ctypes.Structure):
    _fields_ = (("numerator", ctypes.c_int), ("denominator", ctypes.c_int))


@cache
def library() -> ctypes.CDLL:
    """TurboJPEG >= 3. Raises UserError when this machine has none."""
    path = os.environ.get(LIBRARY) or ctypes.util.find_library("turbojpeg")
    try:
        tj = ctypes.CDLL(path or "libturbojpeg.so.0")
        for name in ("tj3Init", "tj3SetScalingFactor", "tj3SetCroppingRegion", "tj3Decompress8"):
            getattr(tj, name)
    except (OSError, AttributeError) as error:
        raise UserError(
            f"data.decoder: region needs TurboJPEG >= 3 on every node ({error}); install libturbojpeg 3, point "
            f"{LIBRARY} to the library, or write data.decoder fast"
        ) from error
    tj.tj3Init.restype = ctypes.c_void_p
    tj.tj3GetErrorStr.restype = ctypes.c_char_p
    tj.tj3GetErrorStr.argtypes = [ctypes.c_void_p]
    tj.tj3Destroy.argtypes = [ctypes.c_void_p]
    tj.tj3Get.argtypes = [ctypes.c_void_p, ctypes.c_int]
    tj.tj3Set.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
    tj.tj3DecompressHeader.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t]
    tj.tj3SetScalingFactor.argtypes = [ctypes.c_void_p, Fraction]
    tj.tj3SetCroppingRegion.argtypes = [ctypes.c_void_p, Region]
    tj.tj3Decompress8.argtypes = [*tj.tj3DecompressHeader.argtypes, ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
    return tj


class Decompressor:
    """One image at a time; one instance a thread. Raises ValueError with TurboJPEG's words for what it cannot read."""

    def __init__(self) -> None:
        self.tj = library()
        self.handle = self.tj.tj3Init(DECOMPRESS)
        if not self.handle:
            raise MemoryError("tj3Init")
        self.tj.tj3Set(self.handle, STOP_ON_WARNING, 1)

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self.tj.tj3Destroy(self.handle)

    def read(self, data: bytes, box: Box, channels: int, scale: int = 1) -> NDArray[np.uint8]:
        """A box of the image at 1 / `scale` (1, 2, 4, 8): (h, w, channels) uint8, the bits that cutting it out gives.

        A little more is decoded on either side: chroma is interpolated across columns, rows TurboJPEG sees to.
        """
        self._check(self.tj.tj3DecompressHeader(self.handle, data, len(data)))
        subsampling = self._get(SUBSAMPLING)
        if subsampling < 0 or self._get(PRECISION) != 8 or self._get(COLORSPACE) >= CMYK:
            raise ValueError("a kind of JPEG that has no rectangles")
        top, left, h, w = box
        block = MCU_WIDTH[subsampling] // scale
        x, right = max(0, left - MARGIN) // block * block, min(-(-self._get(WIDTH) // scale), left + w + MARGIN)
        pixels = np.empty((h, right - x, channels), dtype=np.uint8)
        self._check(self.tj.tj3SetScalingFactor(self.handle, Fraction(1, scale)))
        self._check(self.tj.tj3SetCroppingRegion(self.handle, Region(x, top, right - x, h)))
        try:
            self._check(
                self.tj.tj3Decompress8(self.handle, data, len(data), pixels.ctypes.data, 0, PIXEL_FORMAT[channels])
            )
        finally:
            self.tj.tj3SetCroppingRegion(self.handle, Region(0, 0, 0, 0))
        return pixels[:, left - x : left - x + w]

    def _get(self, parameter: int) -> int:
        return self.tj.tj3Get(self.handle, parameter)

    def _check(self, status: int) -> None:
        if status:
            raise ValueError(self.tj.tj3GetErrorStr(self.handle).decode(errors="replace"))


_local = threading.local()


def decompressor() -> Decompressor:
    """This thread's own."""
    if not hasattr(_local, "decompressor"):
        _local.decompressor = Decompressor()
    return _local.decompressor
