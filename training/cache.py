"""A cache of decoded photographs on disk: what the evaluation's resize makes of each file, as plain bytes.

It lies in a folder named after what it was made of: ``images.u8`` (the images one behind another), ``index.npz``
(their sizes, a CRC-32 of each chunk of them) and ``cache.json``, written last. While it is built,
``images.u8.partial`` grows chunk by chunk and ``journal.jsonl`` says how far; after a kill the build goes on there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import warnings
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from tqdm import tqdm

import openset.preprocessing
from openset.image_headers import UnreadableImage
from openset.preprocessing import Preprocessing
from training.cache_build import CHUNK, DATA, FACTS, INDEX, CacheDamaged, build
from training.decoded import DecodedImages
from training.durable import locked_file

logger = logging.getLogger(__name__)

_FORMAT = 1
_PAUSE = 0.5  # seconds between two looks whether another process has built the cache


def open_cache(
    folder: Path,
    paths: Sequence[str],
    *,
    root: Path,
    preprocessing: Preprocessing,
    on_unreadable: str = "fail",
    show_progress: bool = True,
) -> DecodedImages:
    """Open the cache of some files; build it, or go on building it, where it is not complete.

    Decoding is spread over all processor cores. Only one process builds; others wait for it. Of several processes on one
    machine that train together the first, which is the one that speaks, builds and checks the bytes; the others trust it.

    Args:
        folder: of all caches.
        paths: the files, in the order of the images.
        root: folder that the files' names are taken relative to.
        preprocessing: its mode, short side and interpolation are applied; the crop is left to the reader.
        on_unreadable: "fail" stops the build at a broken file, "skip" records it.
        show_progress: draw a bar.

    Raises:
        UnreadableImage: a file is broken and ``on_unreadable`` is "fail", or all are.
        CacheDamaged: the stored bytes are not those that were written.
        OSError: the disk cannot hold the cache.
    """
    identity = _identity(paths, root, preprocessing)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    place = folder / digest[:16]
    place.mkdir(parents=True, exist_ok=True)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and int(os.environ.get("LOCAL_RANK", "0")) > 0:
        # torchrun ends the waiting if the first process fails.
        while not (place / FACTS).is_file():
            time.sleep(_PAUSE)
        with locked_file(place / "lock", shared=True):
            return _open(place, identity, preprocessing.channels, show_progress, is_checked=True)
    with locked_file(place / "lock"):
        if not (place / FACTS).is_file():
            others = [file.parent.name for file in sorted(folder.glob(f"*/{FACTS}"))]
            if others:
                logger.info(
                    "%s holds caches of other files or settings (%s); remove those that are out of date",
                    folder, ", ".join(others),
                )  # fmt: skip
            build(
                place, list(paths), preprocessing,
                on_unreadable=on_unreadable, identity=identity, show_progress=show_progress,
            )  # fmt: skip
        return _open(place, identity, preprocessing.channels, show_progress)


def _identity(paths: Sequence[str], root: Path, preprocessing: Preprocessing) -> dict[str, Any]:
    """What the bytes depend on; a file that was replaced has another size or time, a changed rule another source."""
    files = hashlib.sha256()
    for path in paths:
        found = os.stat(path)
        files.update(
            f"{os.path.relpath(path, root)}\0{found.st_size}\0{found.st_mtime_ns}\n".encode()
        )
    return {
        "format": _FORMAT,
        "files": files.hexdigest(),
        "count": len(paths),
        "mode": preprocessing.mode,
        "resize": preprocessing.resize,
        "interpolation": preprocessing.interpolation,
        "pillow": PIL.__version__,
        "decoder": hashlib.sha256(Path(openset.preprocessing.__file__).read_bytes()).hexdigest(),
    }


def _open(
    place: Path,
    identity: dict[str, Any],
    channels: int,
    show_progress: bool,
    *,
    is_checked: bool = False,
) -> DecodedImages:
    """Map a complete cache after every byte of it was checked (which also brings it into the page cache).

    ``is_checked``: another process has done that.
    """
    try:
        facts = json.loads((place / FACTS).read_bytes())
        size, index_sha256 = facts["bytes"], facts["index_sha256"]
        unreadable = {int(row): message for row, message in facts["unreadable"].items()}
        is_ours = facts["identity"] == identity
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheDamaged(place, f"{FACTS} cannot be read ({error!r})") from error
    index = (place / INDEX).read_bytes() if (place / INDEX).is_file() else b""
    if not is_ours or hashlib.sha256(index).hexdigest() != index_sha256:
        raise CacheDamaged(place, f"{INDEX} or {FACTS} was changed")
    data = place / DATA
    if not data.is_file() or data.stat().st_size != size:
        raise CacheDamaged(place, f"{DATA} is missing or has another length than {size}")
    with np.load(place / INDEX, allow_pickle=False) as stored:
        heights, widths = stored["heights"], stored["widths"]
        sums, lengths = stored["crc32"], stored["bytes"]
    if sorted(unreadable) != np.flatnonzero(heights == 0).tolist():
        raise CacheDamaged(place, f"{FACTS} names other unreadable files than {INDEX}")
    if not size:
        raise UnreadableImage(
            f"none of the {len(heights)} files can be read (the first: {unreadable[0]}); repair them, or look at "
            "where the data lie"
        )
    mapped, ends = np.memmap(data, np.uint8, mode="r"), np.cumsum(lengths)
    if not is_checked:
        _check(place, mapped, sums, lengths, ends, show_progress)
    sizes = heights * widths * channels
    offsets = np.cumsum(sizes) - sizes
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nobody writes
        pixels = torch.from_numpy(mapped)
    return DecodedImages(pixels, offsets, heights, widths, channels, unreadable)


def _check(
    place: Path,
    mapped: NDArray[np.uint8],
    sums: NDArray[Any],
    lengths: NDArray[Any],
    ends: NDArray[Any],
    show_progress: bool,
) -> None:
    """Compare every chunk's CRC-32 with the stored one.

    Raises:
        CacheDamaged: one differs.
    """
    view = mapped.data
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        found = threads.map(
            lambda span: zlib.crc32(view[span[0] : span[1]]), zip(ends - lengths, ends, strict=True)
        )
        with tqdm(
            total=len(mapped), desc="checking the cache", unit="B", unit_scale=True, leave=False,
            disable=None if show_progress else True, delay=3.0,
        ) as bar:  # fmt: skip
            for number, (expected, value, length) in enumerate(
                zip(sums, found, lengths, strict=True)
            ):
                if value != expected:
                    first = number * CHUNK
                    raise CacheDamaged(
                        place, f"images {first} to {first + CHUNK - 1} are not as written"
                    )
                bar.update(int(length))
