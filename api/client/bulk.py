"""Asks the gateway about many files: so many at a time, patiently, and never twice about the same."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import aiohttp
import orjson
from tqdm import tqdm

from api.client.results import Journal, Row, row_of, row_without_answer

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

# Answers that say "later"; all others are final for this image.
_LATER = (408, 429, 500, 502, 503, 504, 507)
# Answers about the question that every image is asked with: its target.
_ABOUT_THE_QUESTION = ("/problems/not-certifiable", "/problems/invalid-parameter")
_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 15.0


class GatewayRefuses(RuntimeError):
    """The gateway cannot be reached or will not answer us at all."""


@dataclass(frozen=True)
class Gateway:
    """How to reach it.

    Attributes:
        url: e.g. "http://127.0.0.1:8000".
        key: API key, or None.
        patience_s: how long one image may be told "later" before it is given up in this run.
    """

    url: str
    key: str | None = None
    patience_s: float = 120.0

    def session(self) -> aiohttp.ClientSession:
        """A client; must be made inside a running loop."""
        headers = {} if self.key is None else {"authorization": f"Bearer {self.key}"}
        return aiohttp.ClientSession(
            self.url,
            headers=headers,
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=60),
        )

    async def model_sha256(self) -> str:
        """Digest of the served weights.

        Raises:
            GatewayRefuses: nobody answers, or not us.
        """
        try:
            async with self.session() as session, session.get("/model") as response:
                body = await response.read()
                if response.status != 200:
                    raise GatewayRefuses(_refusal(self.url, response.status, body))
                return str(orjson.loads(body)["sha256"])
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise GatewayRefuses(
                f"no gateway answers at {self.url} ({error}); start one with make serve MODEL=<name>, or name it with --url"
            ) from error
        except (KeyError, TypeError, ValueError) as error:
            raise GatewayRefuses(f"{self.url} is not a gateway of this product") from error


def _refusal(url: str, status: int, body: bytes) -> str:
    hint = "; give the key in the environment variable OPENSET_API_KEY" if status == 401 else ""
    return f"{url} answered {status}: {body[:300].decode(errors='replace')}{hint}"


def files_under(folder: Path) -> list[str]:
    """Paths of all images below a folder, sorted; links are followed, and no folder is entered twice.

    One inside it is listed by its own path, whatever links lead there.

    Raises:
        OSError: a folder cannot be listed; without its images the result would look whole.
    """

    def refuse(error: OSError) -> None:
        raise error

    found: list[str] = []
    entered: set[tuple[int, int]] = set()
    roots = [os.fspath(folder)]
    for root in roots:  # links wait behind the folders that are no links
        for directory, folders, names in os.walk(root, onerror=refuse):
            facts = os.stat(directory)
            if (facts.st_dev, facts.st_ino) in entered:  # a link to a folder above it, say
                folders.clear()
                continue
            entered.add((facts.st_dev, facts.st_ino))
            folders.sort()
            roots += filter(os.path.islink, (os.path.join(directory, name) for name in folders))
            found += (
                os.path.join(directory, name) for name in names if name.lower().endswith(SUFFIXES)
            )
    return sorted(found)


async def lines_of(stream: TextIO) -> AsyncIterator[str]:
    """Paths that arrive on a stream, one a line; whoever stops listening need not wait for the next."""
    rest = b""
    while block := await _block_of(stream.fileno()):
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            if path := line.rstrip(b"\r"):
                yield os.fsdecode(path)
    if path := rest.rstrip(b"\r"):
        yield os.fsdecode(path)


async def _block_of(file: int) -> bytes:
    """What arrives next, empty at the end; read by a daemon thread, which no end of the program waits for."""
    loop = asyncio.get_running_loop()
    arrived: asyncio.Future[bytes] = loop.create_future()

    def hand_over(block: bytes | OSError) -> None:
        if arrived.done():  # nobody listens any more
            return
        if isinstance(block, OSError):
            arrived.set_exception(block)
        else:
            arrived.set_result(block)

    def read() -> None:
        block: bytes | OSError
        try:
            block = os.read(file, 65_536)
        except OSError as error:
            block = error
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(hand_over, block)

    threading.Thread(target=read, daemon=True).start()
    return await arrived


@dataclass
class Count:
    """What became of the files of this run; ``without_answer`` has a row for each of the unanswered."""

    asked: int = 0
    skipped: int = 0
    accepted: int = 0
    unknown: int = 0
    refused: int = 0
    without_answer: list[Row] = field(default_factory=list)

    @property
    def unanswered(self) -> int:
        """Files that have no answer yet."""
        return len(self.without_answer)


async def predict_all(
    gateway: Gateway,
    paths: AsyncIterator[str],
    journal: Journal,
    *,
    concurrency: int,
    query: dict[str, str],
    progress: Callable[[Count], None],
) -> Count:
    """Ask about every path that the journal does not hold yet.

    Args:
        gateway: whom to ask.
        paths: of images.
        journal: takes the answers.
        concurrency: requests at a time.
        query: of every request.
        progress: called after every file.

    Raises:
        GatewayRefuses: the key is wrong, the target cannot be promised, or other weights are served than when the journal
            was begun.
    """
    count = Count()
    # As many paths wait as are asked about: a stream of any length needs no memory.
    waiting: asyncio.Queue[str | None] = asyncio.Queue(concurrency)

    async def feed() -> None:
        async for path in paths:
            await waiting.put(path)
        for _ in range(concurrency):
            await waiting.put(None)

    async def ask(session: aiohttp.ClientSession) -> None:
        while (path := await waiting.get()) is not None:
            await _one(gateway, session, path, journal, query, count)
            progress(count)

    try:
        async with gateway.session() as session, asyncio.TaskGroup() as tasks:
            tasks.create_task(feed())
            for _ in range(concurrency):
                tasks.create_task(ask(session))
    except ExceptionGroup as group:  # a TaskGroup's; anything but a refusal goes on as it is
        refusals = group.subgroup(GatewayRefuses)
        if refusals is None:
            raise
        raise GatewayRefuses(str(refusals.exceptions[0])) from None
    return count


async def _one(
    gateway: Gateway,
    session: aiohttp.ClientSession,
    path: str,
    journal: Journal,
    query: dict[str, str],
    count: Count,
) -> None:
    try:
        facts = await asyncio.to_thread(os.stat, path)
        file = [facts.st_size, facts.st_mtime_ns]
        if journal.knows(path, file):
            count.skipped += 1
            return
        image = await asyncio.to_thread(Path(path).read_bytes)
    except OSError as error:
        # Not journaled: the file may be there next time.
        reason = error.strerror or str(error)
        count.without_answer.append(row_without_answer(path, None, reason))
        _note(f"{path}: {reason}")
        return
    row, is_answer = await _ask_patiently(gateway, session, path, image, query)
    count.asked += 1
    if not is_answer:
        count.without_answer.append(row)
        return
    _require_same_model(gateway, row, journal)
    journal.add(row, file)
    if row["status"] != 200:
        count.refused += 1
    elif row["accepted"]:
        count.accepted += 1
    else:
        count.unknown += 1


def _require_same_model(gateway: Gateway, row: Row, journal: Journal) -> None:
    begun, now = journal.identity["model_sha256"], row.get("model_sha256")
    if row["status"] == 200 and now != begun:
        raise GatewayRefuses(
            f"{gateway.url} serves other weights ({now}) than when {journal.file} was begun ({begun}); the answers of "
            "before are kept there: serve the former model to go on, or name another --out to begin anew"
        )


async def _ask_patiently(
    gateway: Gateway, session: aiohttp.ClientSession, path: str, image: bytes, query: dict[str, str]
) -> tuple[Row, bool]:
    """The row of an image and whether it is an answer; it is none if the gateway said "later" for too long."""
    clock = asyncio.get_running_loop().time
    until, wait_s = clock() + gateway.patience_s, _FIRST_WAIT_S
    while True:
        retry_after, status = 0.0, None
        try:
            async with session.post(
                "/predict",
                params=query,
                data=image,
                headers={"content-type": "application/octet-stream"},
            ) as response:
                status, body = response.status, await response.read()
                wanted = response.headers.get("retry-after", "")
                retry_after = float(wanted) if wanted.isdecimal() else 0.0
            if status in (401, 403):
                raise GatewayRefuses(_refusal(gateway.url, status, body))
            answer = _document(body)
            if answer.get("type") in _ABOUT_THE_QUESTION:
                raise GatewayRefuses(_refusal(gateway.url, status, body))
            if status not in _LATER:
                return row_of(path, status, answer), True
            said = f"answered {status}: {answer.get('detail', '')}"
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            said = f"did not answer ({type(error).__name__})"
        pause = max(retry_after, wait_s)
        if clock() + pause > until:
            _note(f"{path}: {gateway.url} {said}; given up for now")
            return row_without_answer(path, status, said), False
        await asyncio.sleep(pause)
        wait_s = min(2 * wait_s, _LONGEST_WAIT_S)


def _document(body: bytes) -> dict[str, Any]:
    try:
        content = orjson.loads(body)
    except ValueError:
        content = None
    return content if isinstance(content, dict) else {"detail": body[:300].decode(errors="replace")}


def _note(text: str) -> None:
    """A line for people, above a progress bar if there is one."""
    tqdm.write(text, file=sys.stderr)
