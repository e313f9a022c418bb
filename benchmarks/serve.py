"""Serving speed, each claim against its baseline in one run: ``make bench`` or ``python benchmarks/serve.py``.

    python benchmarks/serve.py [--images FOLDER] [--json FILE] [--figure FILE] [--quick]
    python benchmarks/serve.py --url http://host:8000 --images FOLDER        only latency against load, of any gateway

Closed loop: a fixed number of connections. Open loop: evenly spaced arrivals, latency from the moment a request was due.
Client, server and baseline share this machine. Photographs are those of ``--images``, or rendered ones. Weights are random.
A part that fails is named and left out; the rest is measured, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script from anywhere

from benchmarks.serving import models, parts
from benchmarks.serving.clients import Clients
from benchmarks.serving.load import Target
from benchmarks.serving.measures import Bench, load_curve, tail
from benchmarks.serving.plan import Plan, plan_of
from benchmarks.serving.report import Report, draw

PARTS = ("compare", "load", "toy")


async def against_url(bench: Bench, url: str, key: str | None) -> None:
    """Capacity and latency against load of any gateway.

    Raises:
        ValueError: it answers no image.
    """
    headers = {"content-type": "application/octet-stream"}
    if key:
        headers["authorization"] = f"Bearer {key}"
    target = Target(url.rstrip("/"), headers=headers)
    outcome = await bench.throughput(target)
    if not outcome.rate:
        summary = outcome.summary(bench.plan.deadline_s)
        raise ValueError(f"{url} answered no image with 200: {summary}")
    name = f"images/s, {bench.plan.connections} connections, {url}"
    bench.report.add(name, round(outcome.rate, 3), "images/s")
    await tail(bench, target, outcome.rate, url)
    await load_curve(bench, target, outcome.rate, url)


async def run(arguments: argparse.Namespace, plan: Plan, report: Report) -> None:
    """Measure what was asked for, one part after the other."""
    # Cancelled, every part stops its servers; the event loop does so on Ctrl-C.
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    report.details["plan"] = asdict(plan)
    images = models.photographs(arguments.images, 64)
    report.details["images"] = {
        "count": len(images),
        "kind": "rendered" if arguments.images is None else "photographs",
        "mean_bytes": round(sum(map(len, images)) / len(images)),
    }

    async def part(name: str, measure: Callable[[], Awaitable[None]]) -> None:
        try:
            await measure()
        except Exception as error:  # whatever it is: the other parts must not be lost
            report.failed(name, error)

    with (
        Clients(plan.client_processes) as clients,
        tempfile.TemporaryDirectory(prefix="openset-bench-") as folder,
    ):
        bench = Bench(report, plan, images, clients)
        if arguments.url:
            key = os.environ.get("OPENSET_API_KEY")
            await part(arguments.url, lambda: against_url(bench, arguments.url, key))
            return
        if "compare" in arguments.parts:
            await part("compare", lambda: parts.compare(bench, Path(folder, "compare")))
        if "load" in arguments.parts:
            for precision in plan.precisions:
                await part(
                    f"load, {precision}",
                    lambda of=precision: parts.load(bench, Path(folder, "load"), of),
                )
        if "toy" in arguments.parts:
            toys = replace(bench, plan=plan.of_toy_model(), images=models.characters(256))
            await part("toy", lambda: parts.toy(toys, Path(folder)))
        parts.empty_rows(bench)


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, write JSON and figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", help="of a running gateway; nothing else is measured then")
    parser.add_argument("--images", type=Path, help="folder of JPEG photographs")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--precision", nargs="+", choices=("float32", "bfloat16"),
        help="side by side; default: what the device has in hardware, of a GPU bfloat16 alone",
    )  # fmt: skip
    parser.add_argument("--compiled", action="store_true")
    of_device = parser.add_argument_group("by default as the device needs them")
    of_device.add_argument("--batch-size", type=int)
    of_device.add_argument("--workers", type=int)
    of_device.add_argument("--gateway-processes", type=int)
    of_device.add_argument("--connections", type=int, help="of a closed loop at full load")
    of_device.add_argument(
        "--max-in-flight", type=int,
        help="places of the gateway; default 64, or as many as connections (the gateway's own default is 1024)",
    )  # fmt: skip
    of_device.add_argument("--client-processes", type=int, help="that share the load")
    parser.add_argument("--deadline", type=float, default=10.0, help="seconds")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--quick", action="store_true", help="a smoke run; its numbers mean nothing"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path, help="latency against load")
    arguments = parser.parse_args(argv)
    report = Report(arguments.json)
    try:
        plan = plan_of(
            device=arguments.device,
            precisions=arguments.precision,
            compiled=arguments.compiled,
            deadline_s=arguments.deadline,
            quick=arguments.quick,
            batch_size=arguments.batch_size,
            workers=arguments.workers,
            gateway_processes=arguments.gateway_processes,
            connections=arguments.connections,
            max_in_flight=arguments.max_in_flight,
            client_processes=arguments.client_processes,
        )
        asyncio.run(run(arguments, plan, report))
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("interrupted; what was measured is kept" if arguments.json else "interrupted", file=sys.stderr)  # fmt: skip
        return 130
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    report.save()
    if arguments.figure and "latency against load" in report.details:
        draw(report, arguments.figure)
    return 0 if report.complete else 1


if __name__ == "__main__":
    sys.exit(main())
