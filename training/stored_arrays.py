"""Arrays that were stored in an npz file, and what is wrong with a file that does not hold them."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.lib.npyio import NpzFile

from openset.calibration import require_stated_sizes


@contextmanager
def loaded(file: Path) -> Iterator[NpzFile]:
    """The arrays of a file, by name; they are read where they are asked for, so what is made of them belongs inside.

    Raises:
        OSError: there is no such file, or it cannot be read.
        MemoryError: a sound file may hold more than there is room for now.
        ValueError: it is damaged, or what it must hold is not in it.
    """
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            require_stated_sizes(stored)
            yield stored
    except MemoryError:
        raise
    except Exception as error:
        # Without a number what decompresses means the bytes; a place before the file's beginning is damage too.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        # Damaged bytes: numpy, zipfile and what decompresses for them raise a dozen kinds.
        raise ValueError(
            f"{file} is damaged ({type(error).__name__}: {error}); restore or remove it"
        ) from error
