"""Files that are replaced whole, and locks on them: after a kill there is the former one or the new one, never a part."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedRandom
from pathlib import Path

logger = logging.getLogger(__name__)


@contextmanager
def replacing(file: Path) -> Iterator[BufferedRandom]:
    """A stream whose content takes the file's place at the end, and is on the disk by then.

    An error leaves the file as it was, and nothing beside it.
    """
    partial = file.with_name(file.name + ".partial")
    try:
        with partial.open("w+b") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, file)
    except BaseException:  # Ctrl-C leaves nothing beside the file either
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(file.parent)


@contextmanager
def locked_file(file: Path, *, shared: bool = False) -> Iterator[None]:
    """Wait until nobody else holds the file, and hold it; with ``shared`` beside others that share it."""
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    # Network file systems lock what is open for both reading and writing.
    with file.open("a+") as stream:
        try:
            fcntl.flock(stream, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another process that works on %s", file.parent)
            fcntl.flock(stream, kind)
        yield


def _sync_folder(folder: Path) -> None:
    """A file's new name is an entry of its folder, which reaches the disk by itself only some time later."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (
            errno.EINVAL,
            errno.ENOTSUP,
        ):  # a file system on which folders cannot be synchronised
            raise
    finally:
        os.close(descriptor)
