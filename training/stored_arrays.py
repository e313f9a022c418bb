"""Arrays that were stored in an npz file, and what is wrong with a file that does not hold them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.lib.npyio import NpzFile


@contextmanager
def loaded(file: Path) -> Iterator[NpzFile]:
    """The arrays of a file, by name; they are read where they are asked for, so what is made of them belongs inside.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or what it must hold is not in it.
    """
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            yield stored
    except FileNotFoundError:
        raise
    except Exception as error:
        # Damaged bytes: numpy, zipfile and what decompresses for them raise a dozen kinds, MemoryError for a size that is
        # none among them.
        raise ValueError(
            f"{file} is damaged ({type(error).__name__}: {error}); restore or remove it"
        ) from error
