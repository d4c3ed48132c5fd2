"""The exceptions that the command line shows as one line, each with its exit status."""

import errno
import os
import sys

from mae_dist.urls import masked


def one_line(text: str) -> str:
    """Without secrets, and with what a terminal would act on (line breaks, escapes in file names) spelled out."""
    text = masked(text)
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


class UserError(Exception):
    """What was found, where, and what to write instead, in one line, without secrets. Never shown with a traceback."""

    status = 2

    def __init__(self, message: str = ""):
        super().__init__(one_line(str(message)))


class Unreadable(UserError):
    """Storage or a server did not give what is there: no mistake of the user's, and starting again may well go on."""

    status = 75


class Ended(RuntimeError):
    """A run ended for a reason that is no bug of ours: said in one line, with an exit status that says which."""

    status = 1


def note(text: str) -> None:
    """Say something that is no error but may not be meant, once for all ranks."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {one_line(text)}", file=sys.stderr, flush=True)


class MachineFault(Ended):
    """The machine, not the program: a file that may not be read, a full disk, no free descriptors. Names the file.

    Status 2 where somebody has to mend it first, 75 where starting again may well do.
    """

    def __init__(self, text: str, status: int = 75):
        super().__init__(one_line(text))
        self.status = status


MENDED = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR,
    errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.EFBIG,
}  # fmt: skip
PASSING = {
    errno.EIO, errno.ESTALE, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ETIMEDOUT, errno.EBUSY, errno.ENOTCONN,
    errno.EREMOTEIO if hasattr(errno, "EREMOTEIO") else errno.EIO,
}  # fmt: skip
OF_THE_FILE = {
    None, errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG,
}  # fmt: skip
"""What is wrong with one file or directory; all else the system says of a disk or a server, and no file is bad."""
ADVICE = {
    errno.ENOSPC: "; make room there",
    errno.EDQUOT: "; make room there",
    errno.EMFILE: "; raise the limit: ulimit -n",
}


def unreadable(error: OSError, text: str) -> UserError:
    """What to raise for an input file that cannot be read, which says nothing of its bytes."""
    return (Unreadable if error.errno in PASSING else UserError)(text)


def machine_fault(error: OSError) -> MachineFault | None:
    """What an OSError says of the machine, in one line; None for one that may be a fault of ours."""
    if error.errno == errno.ENOENT and error.filename is None:
        return MachineFault("the current directory is gone; change to one that exists", 2)
    if error.errno not in MENDED | PASSING:
        return None
    where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes | os.PathLike) else ""
    what = error.strerror or os.strerror(error.errno or 0)
    return MachineFault(f"{where}{what}{ADVICE.get(error.errno or 0, '')}", 2 if error.errno in MENDED else 75)
