"""Builds the cache of decoded photographs (``training.cache``): in parallel, with a journal, resumable after a kill."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from openset.image_headers import UnreadableImage
from openset.preprocessing import Preprocessing
from training.durable import replacing
from training.files import HOW_TO_GO_ON

logger = logging.getLogger(__name__)

CHUNK = 64  # images
DATA, INDEX, FACTS = "images.u8", "index.npz", "cache.json"

_JOURNAL = "journal.jsonl"
_SAMPLE = 64  # images that tell how much room and time all will take


class CacheDamaged(ValueError):
    """A cache does not hold what it was built with."""

    def __init__(self, place: Path, what: str) -> None:
        super().__init__(
            f"the cache {place} is damaged: {what}. Remove that folder and rerun to build it anew; "
            "if it happens again, look at the disk"
        )


class _Chunk(NamedTuple):
    """Decoded images of one chunk; what the journal keeps of them."""

    data: bytes
    sizes: list[tuple[int, int]]
    unreadable: dict[int, str]


def _decode(paths: list[str], preprocessing: Preprocessing, on_unreadable: str) -> _Chunk:
    parts: list[bytes] = []
    sizes: list[tuple[int, int]] = []
    unreadable: dict[int, str] = {}
    for number, path in enumerate(paths):
        try:
            image = preprocessing.resized(preprocessing.open(path))
        except UnreadableImage as error:
            if on_unreadable == "fail":
                raise UnreadableImage(f"{error}; {HOW_TO_GO_ON}") from error
            unreadable[number] = str(error)
            sizes.append((0, 0))
            continue
        parts.append(image.tobytes())
        sizes.append((image.height, image.width))
    return _Chunk(b"".join(parts), sizes, unreadable)


def build(
    place: Path,
    paths: list[str],
    preprocessing: Preprocessing,
    *,
    on_unreadable: str,
    identity: dict[str, Any],
    show_progress: bool,
) -> None:
    """Decode all files into ``place``, or those that are still missing there.

    Args:
        place: folder of this cache.
        paths: the files, in the order of the images.
        preprocessing: see ``training.cache.open_cache``.
        on_unreadable: likewise.
        identity: what the bytes depend on; kept with them.
        show_progress: draw a bar.

    Raises:
        UnreadableImage: a file is broken and ``on_unreadable`` is "fail".
        CacheDamaged: the journal of an earlier start is not as it was written.
        OSError: the disk cannot hold the cache.
    """
    partial, journal = place / (DATA + ".partial"), place / _JOURNAL
    if (place / DATA).is_file():  # killed between the last two steps of a build
        os.replace(place / DATA, partial)
    done = _journaled(journal, partial, preprocessing.channels)
    first = min(len(done) * CHUNK, len(paths))
    written = sum(entry["bytes"] for entry in done)
    cores = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(cores) as threads:
        _announce(place, paths[first:], written, preprocessing, threads, len(paths))
        decoded = _in_order(threads, paths[first:], preprocessing, on_unreadable, 2 * cores)
        with tqdm(
            total=len(paths), initial=first, desc="decoding", unit="image", mininterval=1.0,
            disable=None if show_progress else True,
        ) as bar:  # fmt: skip
            try:
                for entry in _append(decoded, partial, journal, written):
                    done.append(entry)
                    bar.update(len(entry["sizes"]))
            except OSError as error:
                raise OSError(
                    f"the cache in {place} cannot be finished ({error}); what was decoded is kept: free space if the disk "
                    "is full, and rerun"
                ) from error
    _finish(place, done, identity)


def _append(
    decoded: Iterator[_Chunk], partial: Path, journal: Path, written: int
) -> Iterator[dict[str, Any]]:
    """Write each chunk, then its line of the journal; yields what the line says."""
    with partial.open("r+b" if partial.exists() else "w+b") as data, journal.open("a") as lines:
        data.truncate(written)
        data.seek(written)
        for chunk in decoded:
            data.write(chunk.data)
            data.flush()
            entry = {
                "bytes": len(chunk.data), "crc32": zlib.crc32(chunk.data), "sizes": chunk.sizes,
                "unreadable": chunk.unreadable,
            }  # fmt: skip
            lines.write(json.dumps(entry) + "\n")
            lines.flush()
            yield entry
        os.fsync(data.fileno())


def _in_order(
    threads: ThreadPoolExecutor,
    paths: list[str],
    preprocessing: Preprocessing,
    on_unreadable: str,
    ahead: int,
) -> Iterator[_Chunk]:
    """Decode in parallel, a bounded number of chunks ahead of the one that is taken."""
    chunks = [paths[start : start + CHUNK] for start in range(0, len(paths), CHUNK)]
    waiting = [threads.submit(_decode, c, preprocessing, on_unreadable) for c in chunks[:ahead]]
    try:
        for following in [*chunks[ahead:], *[None] * len(waiting)]:
            yield waiting.pop(0).result()
            if following is not None:
                waiting.append(threads.submit(_decode, following, preprocessing, on_unreadable))
    finally:
        for future in waiting:
            future.cancel()


def _journaled(journal: Path, partial: Path, channels: int) -> list[dict[str, Any]]:
    """Chunks whose bytes and journal line were both written in full."""
    entries: list[dict[str, Any]] = []
    lines = journal.read_bytes().splitlines(keepends=True) if journal.is_file() else []
    end, size = 0, partial.stat().st_size if partial.is_file() else 0
    for line in lines:
        if not line.endswith(b"\n"):
            break
        try:
            entry = json.loads(line)
            held = sum(height * width for height, width in entry["sizes"]) * channels
            is_whole = entry["bytes"] == held and entry.keys() >= {"crc32", "unreadable"}
        except (ValueError, KeyError, TypeError, AttributeError):
            is_whole = False
        if not is_whole:
            raise CacheDamaged(
                journal.parent, f"line {len(entries) + 1} of {journal.name} is not as written"
            )
        end += entry["bytes"]
        if end > size:
            break
        entries.append(entry)
    if lines:
        os.truncate(journal, sum(map(len, lines[: len(entries)])))
    if entries:
        logger.info(
            "%s: %d images were decoded before, going on", journal.parent, len(entries) * CHUNK
        )
    return entries


def _announce(
    place: Path,
    paths: list[str],
    written: int,
    preprocessing: Preprocessing,
    threads: ThreadPoolExecutor,
    total: int,
) -> None:
    """Say what room and time the build needs, judged by some of the files; refuse where the room is not there."""
    if not paths:
        return
    picked = [
        paths[i] for i in np.linspace(0, len(paths) - 1, min(_SAMPLE, len(paths))).astype(int)
    ]
    started = time.perf_counter()
    sample = list(threads.map(lambda path: _decode([path], preprocessing, "skip"), picked))
    share = len(paths) / len(picked)
    seconds = (time.perf_counter() - started) * share
    needed = round(sum(len(chunk.data) for chunk in sample) * share)
    free = shutil.disk_usage(place).free
    logger.info(
        "cache of %d images in %s: about %s%s, %.0f min; %s are free",
        total, place, _spoken(written + needed), f", {_spoken(written)} of it there" if written else "",
        seconds / 60, _spoken(free),
    )  # fmt: skip
    if needed > free:
        raise OSError(
            f"the cache needs about {_spoken(needed)} more in {place}, where {_spoken(free)} are free; free space, name "
            "another folder (CACHE=...), or train without a cache (CACHE=none)"
        )


def _spoken(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.3f} MB"


def _finish(place: Path, entries: list[dict[str, Any]], identity: dict[str, Any]) -> None:
    sizes = np.array([size for entry in entries for size in entry["sizes"]], dtype=np.int64)
    with replacing(place / INDEX) as stream:
        np.savez(
            stream,
            heights=sizes[:, 0],
            widths=sizes[:, 1],
            crc32=np.array([entry["crc32"] for entry in entries], dtype=np.int64),
            bytes=np.array([entry["bytes"] for entry in entries], dtype=np.int64),
        )
    os.replace(place / (DATA + ".partial"), place / DATA)
    facts = {
        "identity": identity,
        "bytes": sum(entry["bytes"] for entry in entries),
        "index_sha256": hashlib.sha256((place / INDEX).read_bytes()).hexdigest(),
        "unreadable": {
            str(number * CHUNK + int(image)): message
            for number, entry in enumerate(entries)
            for image, message in entry["unreadable"].items()
        },
    }
    with replacing(place / FACTS) as stream:
        stream.write(json.dumps(facts, indent=2).encode() + b"\n")
    (place / _JOURNAL).unlink()
