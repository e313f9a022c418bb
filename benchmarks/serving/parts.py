"""The parts of the serving benchmark: each starts its servers, measures and stops them."""

from __future__ import annotations

import contextlib
import itertools
import statistics
from collections.abc import AsyncIterator
from pathlib import Path

from benchmarks.serving import bare, models
from benchmarks.serving.measures import (
    Bench,
    Measure,
    added_latency,
    calibrate_time,
    compared_rates,
    gateway_share,
    in_batches,
    in_process,
    load_curve,
    overload,
    served,
    tail,
)
from benchmarks.serving.plan import Plan, cores
from benchmarks.serving.processes import Running, gpu_memory_bytes, served_by_stack, served_by_stock
from benchmarks.serving.report import say
from openset.classifier import OpenSetClassifier
from serving.archive import build_archive

BARE_BATCHES = {"cpu": (1, 4, 8, 16), "cuda": (8, 16, 32, 64)}
SCORES = 100_000
# The aims of the issue: against the stock handler on a CPU, and a data-centre GPU host with so many cores.
STOCK_AIM = {"float32": 1.15, "bfloat16": 2.2}
GPU_IMAGES_PER_SECOND = 3000
GPU_HOST_CORES = 16


@contextlib.asynccontextmanager
async def photographs_served(
    folder: Path, plan: Plan, precision: str
) -> AsyncIterator[tuple[Running, OpenSetClassifier, Path]]:
    """Our stack with the large network; the classifier in this process, and the artifact, beside it."""
    path = {"device": plan.device, "precision": precision, "compiled": plan.compiled}
    name = f"photos-{precision}"
    artifact = models.random_artifact(folder / name, plan.network, classes=116, scores=SCORES, **path)  # fmt: skip
    store = build_archive(artifact, name, folder / "store").parent
    say(f"our stack, {plan.what(precision)}")
    arguments, environment = plan.stack_arguments(precision), plan.stack_environment()
    async with served_by_stack(store, name, arguments, environment) as running:
        yield running, models.load(artifact, **path), artifact


async def compare(bench: Bench, folder: Path) -> None:
    """Throughput against the bare model and the stock handler, added latency, ``/calibrate``; all precisions in turn."""
    plan, report = bench.plan, bench.report
    async with contextlib.AsyncExitStack() as servers:
        ours = {
            precision: await servers.enter_async_context(
                photographs_served(folder, plan, precision)
            )
            for precision in plan.precisions
        }
        stocks = await _stocks(bench, folder, next(iter(ours.values()))[2], servers)
        measures: dict[str, Measure] = {
            name: served(bench, running.torchserve) for name, running in stocks.items()
        }
        best = {}
        for precision, (running, classifier, _) in ours.items():
            say(f"the bare model in this process, {precision}")
            by_batch = _bare_by_batch(bench, classifier)
            report.details[f"bare loop, images/s by batch size, {precision}"] = by_batch
            best[precision] = max(by_batch, key=lambda size, of=by_batch: of[size])
            measures |= _measures_of(bench, precision, running, classifier, best[precision])
        rates = await compared_rates(bench, measures)
        report.details["images/s, every round"] = rates
        medians = {name: statistics.median(values) for name, values in rates.items()}
        for precision, (running, classifier, _) in ours.items():
            _rows_of(bench, precision, medians, best[precision])
            await added_latency(bench, running, classifier, plan.what(precision))
            await calibrate_time(bench, running.gateway, SCORES, precision)


async def _stocks(
    bench: Bench, folder: Path, artifact: Path, servers: contextlib.AsyncExitStack
) -> dict[str, Running]:
    """The stock handler with the same weights, with its default batch size of 1 and ours, one worker and as many as ours.

    Workers divide the cores, since those of the stock handler cannot lend them to each other.
    """
    store = folder / "stock"
    store.mkdir(parents=True)
    models.stock_archive(artifact, store)
    stocks, plan = {}, bench.plan
    counts = {plan.workers} if plan.rounds == 1 else {1, plan.workers}  # a smoke run starts few
    for size, workers in itertools.product(sorted({1, plan.batch_size}), sorted(counts)):
        name = f"stock, batch {size}, workers {workers}"
        say(f"TorchServe's image_classifier: {name}")
        stock = served_by_stock(store, bench.images[0], batch_size=size, workers=workers, plan=plan)
        stocks[name] = await servers.enter_async_context(stock)
    return stocks


def _bare_by_batch(bench: Bench, classifier: OpenSetClassifier) -> dict[int, float]:
    seconds = bench.plan.seconds / 4
    return {
        size: bare.rate(classifier, bench.images, batch_size=size, threads=cores(), seconds=seconds)
        for size in BARE_BATCHES[bench.plan.device]
    }


def _measures_of(
    bench: Bench, precision: str, running: Running, classifier: OpenSetClassifier, best: int
) -> dict[str, Measure]:
    """What alternates for one precision."""
    plan, images = bench.plan, bench.images
    return {
        f"single, {precision}": served(bench, running.gateway),
        f"batch endpoint, {precision}": in_batches(bench, running.gateway),
        f"bare, {precision}": in_process(
            lambda seconds: bare.rate(
                classifier, images, batch_size=best, threads=cores(), seconds=seconds
            )
        ),
        f"resident, {precision}": in_process(
            lambda seconds: bare.resident_rate(
                classifier, batch_size=2 * plan.batch_size, seconds=seconds / 2
            )
        ),
        f"decode only, {precision}": in_process(
            lambda seconds: bare.decode_rate(
                classifier, images, threads=cores(), seconds=seconds / 4
            )
        ),
    }


def _rows_of(bench: Bench, precision: str, medians: dict[str, float], best: int) -> None:
    """Images a second of one precision against all its baselines."""
    plan, report, what = bench.plan, bench.report, bench.plan.what(precision)
    single = medians[f"single, {precision}"]
    report.ratio(
        f"images/s, {what}, against the bare loop", single, "images/s", medians[f"bare, {precision}"],
        f"bare loop, batch {best}", at_least=0.9,
    )  # fmt: skip
    stock = max((name for name in medians if name.startswith("stock")), key=medians.__getitem__)
    report.ratio(
        f"images/s, {what}, against the stock handler", single, "images/s", medians[stock],
        f"image_classifier, TorchScript ({stock})", at_least=STOCK_AIM[precision] if plan.device == "cpu" else None,
    )  # fmt: skip
    smaller = min(medians[f"resident, {precision}"], medians[f"decode only, {precision}"])
    for name in ("single", "batch endpoint"):
        rate = medians[f"{name}, {precision}"]
        report.ratio(
            f"images/s, {name}, {what}, against the parts", rate, "images/s", smaller,
            "smaller of resident and decode-only", at_least=0.8 if plan.device == "cuda" else None,
        )  # fmt: skip
        if plan.device == "cuda":
            enough = rate >= GPU_IMAGES_PER_SECOND
            report.add(
                f"images/s, {name}, {what}", round(rate, 3), "images/s", against=f"{cores()} cores",
                aim=f">= {GPU_IMAGES_PER_SECOND}", met=True if enough else (None if cores() < GPU_HOST_CORES else False),
            )  # fmt: skip


async def load(bench: Bench, folder: Path, precision: str) -> None:
    """Latency against load, and overload."""
    plan, what = bench.plan, bench.plan.what(precision)
    async with photographs_served(folder, plan, precision) as (running, _, _):
        before = running.cpu_seconds()
        closed = await bench.throughput(running.gateway)
        bench.report.details[f"closed loop, {what}"] = {
            **closed.summary(plan.deadline_s),
            "connections": plan.connections,
            "server_cores": round((running.cpu_seconds() - before) / closed.duration_s, 3),
            "memory_mb": round(running.memory_bytes() / 2**20),
            "gpu_memory_mb": (used := gpu_memory_bytes()) and round(used / 2**20),
        }
        await tail(bench, running.gateway, closed.rate, what)
        await overload(bench, running, closed.rate, what)
        await load_curve(bench, running.gateway, closed.rate, what)


async def toy(bench: Bench, folder: Path) -> None:
    """The rows of the toy model, where the arithmetic costs next to nothing and everything else shows.

    ``bench.images`` are characters, and its plan one of the toy model.
    """
    plan = bench.plan
    path = {"device": plan.device, "precision": "float32", "compiled": False}
    artifact = models.random_artifact(folder / "toy", "lenet_plus_plus", classes=10, scores=2000, **path)  # fmt: skip
    store = build_archive(artifact, "toy", folder / "store").parent
    say("our stack, toy model")
    arguments = plan.stack_arguments("float32")
    async with served_by_stack(store, "toy", arguments, plan.stack_environment()) as running:
        await bench.closed(running.gateway, min(2.0, plan.seconds), connections=8)
        await gateway_share(bench, running)
        await added_latency(bench, running, models.load(artifact, **path), "toy model")
        capacity = (await bench.throughput(running.gateway)).rate
        await tail(bench, running.gateway, capacity, "toy model")


def empty_rows(bench: Bench) -> None:
    """What this machine cannot measure, with the command that does."""
    plan, report = bench.plan, bench.report
    if plan.device == "cuda":
        return
    command = "make bench DEVICE=cuda PRECISION=bfloat16 COMPILED=1 IMAGES=<photographs>"
    for name in ("single", "batch endpoint"):
        what = f"images/s, {name}, resnet50, bfloat16 compiled, cuda"
        report.add(
            f"{what}, against the parts", None, "images/s", against="smaller of resident and decode-only", aim=">= 0.8",
            command=command,
        )  # fmt: skip
        report.add(what, None, "images/s", aim=f">= {GPU_IMAGES_PER_SECOND}", command=command)
    if "bfloat16" not in plan.precisions:
        report.add(
            "images/s, resnet50, bfloat16, cpu, against the stock handler", None, "images/s",
            against="image_classifier, TorchScript", aim=">= 2.2",
            command="make bench PRECISION=bfloat16 (AVX512-BF16 or AMX)",
        )  # fmt: skip
