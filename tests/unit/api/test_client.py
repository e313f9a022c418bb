"""The bulk client against a server that misbehaves as told; the real gateway stands in tests/e2e."""

from __future__ import annotations

import asyncio
import csv
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from api.client.__main__ import main
from api.client.bulk import (
    Count,
    Gateway,
    GatewayRefuses,
    files_under,
    lines_of,
    predict_all,
)
from api.client.results import COLUMNS, CannotResume, Journal, write_csv, write_parquet

IDENTITY = {"model_sha256": "0" * 64, "fpr": None}
ROW = {"path": "a.png", "status": 200, "label": "x", "accepted": True, "score": 1.5}
ANSWER = {
    "label": "unknown", "accepted": False, "score": -1.5, "score_type": "softmax", "tau": 0.5, "p_value": 0.3,
    "nearest": {"label": "b", "probability": 0.4, "cosine": 0.1, "angle_deg": 84.0},
    "calibration": {"id": 3, "fpr": 0.01}, "model": {"sha256": "0" * 64},
}  # fmt: skip

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


async def model(request: web.Request) -> web.Response:
    return web.json_response({"sha256": "0" * 64})


@pytest.fixture
async def serve() -> AsyncIterator[Callable[[Handler], Awaitable[Gateway]]]:
    """``await serve(handler)`` -> a gateway whose ``/predict`` is the handler."""
    runners = []

    async def start(handler: Handler) -> Gateway:
        app = web.Application()
        app.router.add_post("/predict", handler)
        app.router.add_get("/model", model)
        runner = web.AppRunner(app)
        runners.append(runner)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return Gateway(f"http://127.0.0.1:{runner.addresses[0][1]}", patience_s=5.0)

    yield start
    for runner in runners:
        await runner.cleanup()


async def ask(gateway: Gateway, journal: Journal, *paths: str, concurrency: int = 4) -> Count:
    async def each() -> AsyncIterator[str]:
        for path in paths:
            yield path

    return await predict_all(
        gateway, each(), journal, concurrency=concurrency, query={}, progress=lambda count: None
    )


def some_files(folder: Path, count: int) -> list[str]:
    paths = [folder / f"{number:03}.png" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]))
    return [str(path) for path in paths]


async def test_later_is_waited_for_and_every_file_gets_one_row(serve: Any, tmp_path: Path) -> None:
    asked: dict[bytes, int] = {}

    async def twice(request: web.Request) -> web.Response:
        body = await request.read()
        asked[body] = asked.get(body, 0) + 1
        if asked[body] == 1:
            return web.json_response({"detail": "busy"}, status=503, headers={"retry-after": "0"})
        return web.json_response(ANSWER)

    journal = Journal(tmp_path / "r.csv", IDENTITY)
    paths = some_files(tmp_path, 3)
    count = await ask(await serve(twice), journal, *paths)
    assert (count.asked, count.unknown, count.unanswered) == (3, 3, 0)
    assert [row["path"] for row in journal.rows()] == paths
    assert set(asked.values()) == {2}
    journal.close()


async def test_patience_ends_and_the_file_is_asked_about_next_time(
    serve: Any, tmp_path: Path
) -> None:
    busy = True

    async def handler(request: web.Request) -> web.Response:
        if busy:
            return web.json_response({"detail": "busy"}, status=503, headers={"retry-after": "60"})
        return web.json_response(ANSWER)

    gateway = await serve(handler)
    journal = Journal(tmp_path / "r.csv", IDENTITY)
    (path,) = some_files(tmp_path, 1)
    assert (await ask(gateway, journal, path)).unanswered == 1
    assert list(journal.rows()) == []
    busy = False
    assert (await ask(gateway, journal, path)).unknown == 1
    journal.close()


async def test_refused_image_has_its_problem_as_a_row(serve: Any, tmp_path: Path) -> None:
    async def unreadable(request: web.Request) -> web.Response:
        content = {"type": "/problems/unreadable-image", "detail": "broken"}
        return web.json_response(content, status=422)

    journal = Journal(tmp_path / "r.csv", IDENTITY)
    count = await ask(await serve(unreadable), journal, *some_files(tmp_path, 1))
    assert count.refused == 1
    (row,) = journal.rows()
    assert (row["status"], row["problem"], row["detail"]) == (
        422,
        "/problems/unreadable-image",
        "broken",
    )
    journal.close()


async def test_wrong_key_stops_at_once_and_says_where_the_key_belongs(
    serve: Any, tmp_path: Path
) -> None:
    asked = 0

    async def closed(request: web.Request) -> web.Response:
        nonlocal asked
        asked += 1
        return web.json_response({"detail": "key"}, status=401)

    journal = Journal(tmp_path / "r.csv", IDENTITY)
    with pytest.raises(GatewayRefuses, match="OPENSET_API_KEY"):
        await ask(await serve(closed), journal, *some_files(tmp_path, 50), concurrency=2)
    assert asked <= 4
    journal.close()


@pytest.mark.parametrize("slug", ["not-certifiable", "invalid-parameter"])
async def test_target_that_cannot_be_promised_stops_at_once_and_is_no_images_answer(
    serve: Any, tmp_path: Path, slug: str
) -> None:
    async def refusing(request: web.Request) -> web.Response:
        content = {"type": f"/problems/{slug}", "detail": "the smallest is 0.00076"}
        return web.json_response(content, status=422)

    journal = Journal(tmp_path / "r.csv", IDENTITY)
    with pytest.raises(GatewayRefuses, match="the smallest is"):
        await ask(await serve(refusing), journal, *some_files(tmp_path, 1))
    assert list(journal.rows()) == []
    journal.close()


async def test_concurrency_is_bounded(serve: Any, tmp_path: Path) -> None:
    now = most = 0

    async def counting(request: web.Request) -> web.Response:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.02)
        now -= 1
        return web.json_response(ANSWER)

    journal = Journal(tmp_path / "r.csv", IDENTITY)
    await ask(await serve(counting), journal, *some_files(tmp_path, 20), concurrency=3)
    assert most == 3
    journal.close()


async def test_known_file_is_skipped_and_a_changed_one_asked_again(
    serve: Any, tmp_path: Path
) -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.json_response(ANSWER)

    gateway, journal = await serve(handler), Journal(tmp_path / "r.csv", IDENTITY)
    paths = some_files(tmp_path, 2)
    await ask(gateway, journal, *paths)
    os.utime(paths[0], (1, 1))
    count = await ask(gateway, journal, *paths, str(tmp_path / "missing.png"))
    assert (count.asked, count.skipped, count.unanswered) == (1, 1, 1)
    assert len(list(journal.rows())) == 2
    journal.close()


def test_journal_survives_a_kill_in_the_middle_of_a_line(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "r.csv", IDENTITY)
    journal.add(ROW, [1, 2])
    journal.close()
    with journal.file.open("ab") as stream:
        stream.write(b'{"row": {"path": "b.p')
    again = Journal(tmp_path / "r.csv", IDENTITY)
    assert again.knows("a.png", [1, 2])
    assert len(again.done) == 1
    again.add({**ROW, "path": "c.png"}, [3, 4])
    assert [row["path"] for row in again.rows()] == ["a.png", "c.png"]
    assert again.finish() == 2
    assert not again.file.exists()


def test_journal_of_another_model_and_existing_result_are_refused(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "r.csv", IDENTITY)
    journal.close()
    with pytest.raises(CannotResume, match="was begun with"):
        Journal(tmp_path / "r.csv", {**IDENTITY, "fpr": 0.1})
    (tmp_path / "done.csv").write_text("mine")
    with pytest.raises(CannotResume, match="exists already"):
        Journal(tmp_path / "done.csv", IDENTITY)
    assert (tmp_path / "done.csv").read_text() == "mine"


def test_both_formats_hold_the_same_typed_values(tmp_path: Path) -> None:
    from arro3.io import read_parquet

    rows = [ROW, {"path": "b.png", "status": 422, "problem": "/problems/x", "detail": 'a "b", c'}]
    write_csv(rows, tmp_path / "r.csv")
    write_parquet(rows, tmp_path / "r.parquet")
    with (tmp_path / "r.csv").open(newline="") as stream:
        texts = list(csv.DictReader(stream))
    table = read_parquet(tmp_path / "r.parquet").read_all()
    assert table.column_names == list(COLUMNS) == list(texts[0])
    for name in COLUMNS:
        values = table[name].to_pylist()
        assert values == [row.get(name) for row in rows]
        expected = ["" if value is None else str(value) for value in values]
        if COLUMNS[name] is bool:
            expected = [text.lower() for text in expected]
        assert [text[name] for text in texts] == expected


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["/nonexistent", "--out", "r.csv"], "is not a folder"),
        ([".", "--out", "r.xlsx"], "must end in .csv or .parquet"),
        ([".", "--out", "r.csv", "--fpr", "2"], "between 0 and 1"),
        ([".", "--out", "r.csv", "--concurrency", "0"], "at least 1"),
    ],
)
def test_bad_arguments_are_named(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["predict", *arguments])
    assert said in capsys.readouterr().err


def test_nobody_there_is_one_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r.csv"
    assert main(["predict", str(tmp_path), "--out", str(out), "--url", "http://127.0.0.1:9"]) == 1
    said = capsys.readouterr().err
    assert "no gateway answers at http://127.0.0.1:9" in said
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())


def test_folder_that_cannot_be_listed_is_an_error_and_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def failing(path: str) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(PermissionError):
        files_under(tmp_path)


def test_links_to_folders_are_followed_and_their_circles_are_not(tmp_path: Path) -> None:
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "folder"
    elsewhere.mkdir()
    folder.mkdir()
    (elsewhere / "a.png").write_bytes(b"x")
    (folder / "link").symlink_to(elsewhere)
    (folder / "again").symlink_to(folder)
    assert files_under(folder) == [str(folder / "link" / "a.png")]


@pytest.mark.parametrize("link", ["a", "z", "m/a", "m/z"])
def test_folder_with_a_link_to_it_keeps_its_own_path(tmp_path: Path, link: str) -> None:
    """The link sorts before the folder or after it."""
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "1.png").write_bytes(b"x")
    (tmp_path / "m1.png").write_bytes(b"x")
    (tmp_path / link).symlink_to(tmp_path / "m")
    assert files_under(tmp_path) == [str(tmp_path / "m" / "1.png"), str(tmp_path / "m1.png")]


async def test_file_name_that_is_not_utf8_has_its_row_and_is_not_asked_twice(
    serve: Any, tmp_path: Path
) -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.json_response(ANSWER)

    path = os.fsdecode(os.fsencode(tmp_path) + b"/gr\xfc\xdf.png")
    Path(path).write_bytes(b"x")
    gateway, journal = await serve(handler), Journal(tmp_path / "r.csv", IDENTITY)
    assert (await ask(gateway, journal, path)).asked == 1
    journal.close()
    again = Journal(tmp_path / "r.csv", IDENTITY)
    assert (await ask(gateway, again, path)).skipped == 1
    assert again.finish() == 1
    assert r"gr\xfc\xdf.png" in (tmp_path / "r.csv").read_text()


async def test_failure_of_the_gateway_is_no_final_answer(serve: Any, tmp_path: Path) -> None:
    asked = 0

    async def once(request: web.Request) -> web.Response:
        nonlocal asked
        asked += 1
        return web.Response(status=500) if asked == 1 else web.json_response(ANSWER)

    journal = Journal(tmp_path / "r.csv", IDENTITY)
    count = await ask(await serve(once), journal, *some_files(tmp_path, 1))
    assert (count.unknown, count.refused) == (1, 0)
    journal.close()


async def test_other_weights_in_the_middle_of_a_run_stop_it_and_keep_what_was_answered(
    serve: Any, tmp_path: Path
) -> None:
    number = 0

    async def handler(request: web.Request) -> web.Response:
        nonlocal number
        number += 1
        return web.json_response({**ANSWER, "model": {"sha256": "01"[number > 2] * 64}})

    journal = Journal(tmp_path / "r.csv", IDENTITY)
    with pytest.raises(GatewayRefuses, match="serves other weights"):
        await ask(await serve(handler), journal, *some_files(tmp_path, 4), concurrency=1)
    assert [row["model_sha256"] for row in journal.rows()] == ["0" * 64] * 2
    journal.close()


async def test_path_written_otherwise_is_the_same_file(
    serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.json_response(ANSWER)

    (path,) = some_files(tmp_path, 1)
    gateway, journal = await serve(handler), Journal(tmp_path / "r.csv", IDENTITY)
    monkeypatch.chdir(tmp_path)
    assert (await ask(gateway, journal, Path(path).name)).asked == 1
    journal.close()
    again = Journal(tmp_path / "r.csv", IDENTITY)
    assert (await ask(gateway, again, path)).skipped == 1
    assert again.finish() == 1


async def test_other_folder_does_not_mix_into_a_journal(
    serve: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.json_response({}, status=503)

    gateway = await serve(handler)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        some_files(tmp_path / name, 1)
    arguments = ["--url", gateway.url, "--patience", "0", "--out", str(tmp_path / "r.csv")]
    assert await asyncio.to_thread(main, ["predict", str(tmp_path / "a"), *arguments]) == 1
    assert await asyncio.to_thread(main, ["predict", str(tmp_path / "b"), *arguments]) == 1
    assert "was begun with" in capsys.readouterr().err


async def test_finish_writes_what_has_an_answer_and_says_of_the_rest_why_not(
    serve: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def handler(request: web.Request) -> web.Response:
        if await request.read() == bytes([1]):
            return web.json_response({"detail": "no memory for this one"}, status=507)
        return web.json_response(ANSWER)

    gateway = await serve(handler)
    paths = some_files(tmp_path, 3)
    os.symlink(tmp_path / "nowhere", tmp_path / "zzz.png")
    out = tmp_path / "r.csv"
    arguments = [
        "predict",
        str(tmp_path),
        "--url",
        gateway.url,
        "--patience",
        "0",
        "--out",
        str(out),
    ]
    assert await asyncio.to_thread(main, arguments) == 1
    assert "--finish" in capsys.readouterr().err
    assert not out.exists()
    assert await asyncio.to_thread(main, [*arguments, "--finish"]) == 0
    with out.open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["path"] for row in rows] == [*paths, str(tmp_path / "zzz.png")]
    assert [row["status"] for row in rows] == ["200", "507", "200", ""]
    assert "no memory for this one" in rows[1]["detail"]
    assert "No such file" in rows[3]["detail"]


def test_file_without_an_answer_about_what_it_is_now_has_one_row(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "r.csv", IDENTITY)
    journal.add(ROW, [1, 2])
    late = {"path": ROW["path"], "status": 503, "detail": "busy"}
    assert journal.finish([late, late]) == 1
    (row,) = csv.DictReader((tmp_path / "r.csv").read_text().splitlines())
    assert (row["status"], row["label"]) == ("503", "")


def test_journal_is_written_by_one_client_at_a_time(tmp_path: Path) -> None:
    first = Journal(tmp_path / "r.csv", IDENTITY)
    with pytest.raises(CannotResume, match="another client is writing"):
        Journal(tmp_path / "r.csv", IDENTITY)
    first.close()
    Journal(tmp_path / "r.csv", IDENTITY).close()


async def test_threshold_that_was_changed_between_two_runs_is_named(
    serve: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    number = 0

    async def handler(request: web.Request) -> web.Response:
        nonlocal number
        number += 1
        return web.json_response({**ANSWER, "calibration": {"id": 2 + number, "fpr": 0.01}})

    gateway = await serve(handler)
    some_files(tmp_path, 2)
    arguments = ["predict", str(tmp_path), "--url", gateway.url, "--concurrency", "1", "--out"]
    assert await asyncio.to_thread(main, [*arguments, str(tmp_path / "r.csv")]) == 0
    assert "of 3, 4" in capsys.readouterr().err


@pytest.mark.parametrize("ends", ["interrupt", "key"])
async def test_client_that_waits_for_paths_ends_at_once(
    serve: Any, tmp_path: Path, ends: str
) -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.json_response(ANSWER, status=401 if ends == "key" else 200)

    gateway, out = await serve(handler), tmp_path / "r.csv"
    command = [sys.executable, "-m", "api.client", "predict", "-", "--url", gateway.url, "--out", str(out)]  # fmt: skip
    pipe = asyncio.subprocess.PIPE
    client = await asyncio.create_subprocess_exec(*command, stdin=pipe, stderr=pipe)
    assert client.stdin is not None
    client.stdin.write(f"{some_files(tmp_path, 1)[0]}\n".encode())
    await client.stdin.drain()
    if ends == "interrupt":
        journal = out.with_name("r.csv.journal")
        while not journal.exists() or journal.read_bytes().count(b"\n") < 2:
            await asyncio.sleep(0.05)
        client.send_signal(signal.SIGINT)
    assert client.stderr is not None
    said = (await client.stderr.read()).decode()  # its input stays open all the while
    assert await client.wait() == (130 if ends == "interrupt" else 1)
    assert ("interrupted" if ends == "interrupt" else "OPENSET_API_KEY") in said
    assert "Fatal" not in said
    client.stdin.close()


async def test_paths_on_a_stream_may_come_in_pieces_and_without_a_last_line_end(
    tmp_path: Path,
) -> None:
    file = tmp_path / "paths"
    file.write_bytes(b"a.png\r\n\n" + b"b" * 70_000 + b"\n\xff.png")
    with file.open() as stream:
        found = [path async for path in lines_of(stream)]
    assert found == ["a.png", "b" * 70_000, os.fsdecode(b"\xff.png")]
