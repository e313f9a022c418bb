"""Serving speed, each claim against its baseline in one run: ``make bench`` or ``python benchmarks/serve.py``.

    python benchmarks/serve.py [--images FOLDER] [--json FILE] [--figure FILE] [--quick]
    python benchmarks/serve.py --url http://host:8000 --images FOLDER        only latency against load, of any gateway

Closed loop: a fixed number of connections. Open loop: evenly spaced arrivals, latency from the moment a request was due.
Client, server and baseline share this machine. Photographs are those of ``--images``, or rendered ones. Weights are random.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script from anywhere

from benchmarks.serving import bare, models
from benchmarks.serving.load import Target, closed_loop
from benchmarks.serving.measures import (
    CONNECTIONS,
    Plan,
    added_latency,
    batch_rate,
    calibrate_time,
    compared_rates,
    gateway_share,
    load_curve,
    overload,
    tail,
    throughput,
)
from benchmarks.serving.processes import (
    Running,
    gpu_memory_bytes,
    served_by_stack,
    served_by_stock,
)
from benchmarks.serving.report import Report, draw, say
from openset.classifier import OpenSetClassifier
from serving.archive import build_archive

BARE_BATCHES = (1, 4, 8, 16)
SCORES = 100_000
PARTS = ("compare", "load", "toy")


def stack_arguments(plan: Plan) -> list[str]:
    """Options of the served stacks."""
    return [
        "--device", plan.device, "--precision", plan.precision, "--batch-size", str(plan.batch_size), "--workers",
        str(plan.workers), *(["--compiled"] if plan.compiled else []),
    ]  # fmt: skip


@contextlib.asynccontextmanager
async def photographs_served(
    folder: Path, plan: Plan
) -> AsyncIterator[tuple[Running, OpenSetClassifier, Path]]:
    """Our stack with the large network; the classifier in this process, and the artifact, beside it."""
    path = {"device": plan.device, "precision": plan.precision, "compiled": plan.compiled}
    artifact = models.random_artifact(folder / "photos", plan.network, classes=116, scores=SCORES, **path)  # fmt: skip
    store = build_archive(artifact, "photos", folder / "store").parent
    say("our stack")
    environment = {"OPENSET_DEADLINE_S": str(plan.deadline_s)}
    async with served_by_stack(store, "photos", stack_arguments(plan), environment) as running:
        yield running, models.load(artifact, **path), artifact


async def compare(report: Report, folder: Path, images: Sequence[bytes], plan: Plan) -> None:
    """Throughput against the bare model and the stock handler, added latency, ``/calibrate``."""
    what = f"{plan.network}, {plan.precision}, {plan.device}"
    threads = len(os.sched_getaffinity(0))
    async with contextlib.AsyncExitStack() as servers:
        running, classifier, artifact = await servers.enter_async_context(
            photographs_served(folder, plan)
        )
        say("the bare model in this process")
        by_batch = {
            size: bare.rate(
                classifier, images, batch_size=size, threads=threads, seconds=plan.seconds / 4
            )
            for size in BARE_BATCHES
        }
        best = max(by_batch, key=lambda size: by_batch[size])
        report.details["bare loop, images/s by batch size"] = by_batch
        targets = {"ours": running.gateway}
        if plan.network == "resnet50":  # the stock handler serves colour images of 224 px alone
            store = folder / "stock"
            store.mkdir()
            models.stock_archive(artifact, store)
            for size in sorted({1, plan.batch_size}):
                say(f"TorchServe's stock image_classifier, batch size {size}")
                stock = served_by_stock(store, images[0], batch_size=size, device=plan.device)
                targets[f"stock, batch {size}"] = (
                    await servers.enter_async_context(stock)
                ).torchserve
        in_process = {
            "bare": lambda seconds: bare.rate(
                classifier, images, batch_size=best, threads=threads, seconds=seconds
            ),
            "resident": lambda seconds: bare.resident_rate(
                classifier, batch_size=2 * plan.batch_size, seconds=seconds / 2
            ),
            "decode only": lambda seconds: bare.decode_rate(
                classifier, images, threads=threads, seconds=seconds / 4
            ),
        }
        rates = await compared_rates(targets, in_process, images, plan)
        report.details["images/s, every round"] = rates
        medians = {name: statistics.median(values) for name, values in rates.items()}
        report.ratio(
            f"images/s, {what}", medians["ours"], "images/s", medians["bare"], f"bare loop, batch {best}", at_least=0.9
        )  # fmt: skip
        stocks = {name: rate for name, rate in medians.items() if name.startswith("stock")}
        if stocks:
            name = max(stocks, key=lambda key: stocks[key])
            report.ratio(
                f"images/s, {what}", medians["ours"], "images/s", stocks[name], f"image_classifier, TorchScript ({name})",
                at_least=2.2 if plan.precision == "bfloat16" else 1.15,
            )  # fmt: skip
        batched = await batch_rate(running.gateway, images, plan)
        for name, rate in (("single", medians["ours"]), ("batch endpoint", batched)):
            report.ratio(
                f"images/s, {name}, {what}", rate, "images/s", min(medians["resident"], medians["decode only"]),
                "smaller of resident and decode-only", at_least=0.8 if plan.device == "cuda" else None,
            )  # fmt: skip
        await added_latency(report, running, classifier, images, plan, what)
        await calibrate_time(report, running.gateway, plan, SCORES)


async def load(report: Report, folder: Path, images: Sequence[bytes], plan: Plan) -> None:
    """Latency against load, and overload."""
    what = f"{plan.network}, {plan.precision}, {plan.device}"
    async with photographs_served(folder, plan) as (running, _, _):
        before = running.cpu_seconds()
        closed = await throughput(running.gateway, images, plan)
        report.details["closed loop"] = {
            **closed.summary(plan.deadline_s),
            "connections": CONNECTIONS,
            "server_cores": round((running.cpu_seconds() - before) / closed.duration_s, 3),
            "memory_mb": round(running.memory_bytes() / 2**20),
            "gpu_memory_mb": (used := gpu_memory_bytes()) and round(used / 2**20),
        }
        await tail(report, running.gateway, images, closed.rate, plan, what)
        await overload(report, running, images, closed.rate, plan, what)
        await load_curve(report, running.gateway, images, closed.rate, plan)


async def characters_served(report: Report, folder: Path, plan: Plan) -> None:
    """The rows of the toy model, where the arithmetic costs next to nothing and everything else shows."""
    path = {"device": plan.device, "precision": "float32", "compiled": False}
    artifact = models.random_artifact(folder / "toy", "lenet_plus_plus", classes=10, scores=2000, **path)  # fmt: skip
    store = build_archive(artifact, "toy", folder / "store").parent
    images = models.characters(256)
    say("our stack, toy model")
    environment = {"OPENSET_DEADLINE_S": str(plan.deadline_s)}
    async with served_by_stack(store, "toy", ["--device", plan.device], environment) as running:
        await closed_loop(running.gateway, images, connections=8, seconds=min(2.0, plan.seconds))
        await gateway_share(report, running, images, plan)
        await added_latency(
            report, running, models.load(artifact, **path), images, plan, "toy model"
        )
        capacity = (await throughput(running.gateway, images, plan)).rate
        await tail(report, running.gateway, images, capacity, plan, "toy model")


def empty_rows(report: Report, plan: Plan) -> None:
    """What this machine cannot measure, with the command that does."""
    command = "make bench DEVICE=cuda PRECISION=bfloat16 COMPILED=1 IMAGES=<photographs>"
    if plan.device != "cuda":
        for name in ("single", "batch endpoint"):
            report.add(
                f"images/s, {name}, resnet50, bfloat16 compiled, cuda", None, "images/s",
                against="smaller of resident and decode-only", aim=">= 0.8", command=command,
            )  # fmt: skip
    if plan.device == "cpu" and plan.precision != "bfloat16":
        report.add(
            "images/s, resnet50, bfloat16, cpu", None, "images/s", against="stock image_classifier, TorchScript",
            aim=">= 2.2", command="make bench PRECISION=bfloat16 (AVX512-BF16 or AMX)",
        )  # fmt: skip


async def against_url(
    report: Report, url: str, images: Sequence[bytes], key: str | None, plan: Plan
) -> None:
    """Capacity and latency against load of any gateway."""
    headers = {"content-type": "application/octet-stream"}
    if key:
        headers["authorization"] = f"Bearer {key}"
    target = Target(url.rstrip("/"), headers=headers)
    outcome = await throughput(target, images, plan)
    if not outcome.rate:
        raise ValueError(f"{url} answered no image with 200: {outcome.summary(plan.deadline_s)}")
    report.add(f"images/s, {CONNECTIONS} connections, {url}", round(outcome.rate, 3), "images/s")
    await tail(report, target, images, outcome.rate, plan, url)
    await load_curve(report, target, images, outcome.rate, plan)


def plan_of(arguments: argparse.Namespace) -> Plan:
    """Times and options of a run."""
    common = {
        "device": arguments.device,
        "precision": arguments.precision,
        "compiled": arguments.compiled,
        "deadline_s": arguments.deadline,
        "batch_size": arguments.batch_size,
        "workers": arguments.workers,
    }
    if arguments.quick:
        return Plan(
            **common, network="lenet_plus_plus", seconds=1.0, rounds=1, load_seconds=0.5, tail_seconds=1.0,
            overload_seconds=2.0,
        )  # fmt: skip
    return Plan(
        **common, network="resnet50", seconds=12.0, rounds=3, load_seconds=10.0, tail_seconds=30.0, overload_seconds=60.0,
    )  # fmt: skip


async def run(arguments: argparse.Namespace, report: Report) -> None:
    """Measure what was asked for."""
    plan = plan_of(arguments)
    report.details["plan"] = asdict(plan)
    images = models.photographs(arguments.images, 64)
    report.details["images"] = {
        "count": len(images),
        "kind": "rendered" if arguments.images is None else "photographs",
        "mean_bytes": round(sum(map(len, images)) / len(images)),
    }
    if arguments.url:
        await against_url(report, arguments.url, images, os.environ.get("OPENSET_API_KEY"), plan)
        return
    with tempfile.TemporaryDirectory(prefix="openset-bench-") as name:
        if "compare" in arguments.parts:
            await compare(report, Path(name) / "compare", images, plan)
        if "load" in arguments.parts:
            await load(report, Path(name) / "load", images, plan)
        if "toy" in arguments.parts:
            await characters_served(report, Path(name), plan)
    empty_rows(report, plan)


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, write JSON and figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", help="of a running gateway; nothing else is measured then")
    parser.add_argument("--images", type=Path, help="folder of JPEG photographs")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--workers", type=int, default=1)
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
        asyncio.run(run(arguments, report))
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    report.save()
    if arguments.figure and "latency against load" in report.details:
        draw(report, arguments.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
