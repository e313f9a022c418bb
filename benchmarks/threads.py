"""How the model's threads, and TorchServe's Java, share a CPU, side by side: throughput, latency and its tail.

    python benchmarks/threads.py [--images FOLDER] [--precision bfloat16] [--json FILE] [--quick]

Every setting is a stack of its own with the same weights; all run at the same time and are asked in turn, so that what disturbs
the machine disturbs all alike. The open loop has one rate for all, 70 % of the median throughput.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script from anywhere

from benchmarks.serving import models
from benchmarks.serving.clients import Clients
from benchmarks.serving.load import Outcome
from benchmarks.serving.plan import Plan, plan_of
from benchmarks.serving.processes import Running, served_by_stack
from benchmarks.serving.report import Report, say
from serving.archive import build_archive

# Later than the command line, so that it holds: what Java does when it is told nothing.
_USUAL_JAVA = (
    "-XX:TieredStopAtLevel=4 -XX:CompileThresholdScaling=1.0 -XX:-UseSerialGC -XX:+UseG1GC"
)

# "shared" is what is served: workers that share the cores; "long waits" lets their threads spin as long as GNU OpenMP does by
# itself, "usual Java" leaves compilation and collection to Java. The others have one worker with all cores, its threads bound
# to a core each or left to the scheduler, spinning or asleep while they wait for each other.
SETTINGS = {
    "shared": {},
    "shared, usual Java": {"_JAVA_OPTIONS": _USUAL_JAVA},
    "shared, long waits": {"GOMP_SPINCOUNT": "300000"},
    "bound": {"OMP_PROC_BIND": "true"},
    "free": {"OMP_PROC_BIND": "false"},
    "bound, asleep": {"OMP_PROC_BIND": "true", "GOMP_SPINCOUNT": "0"},
    "free, asleep": {"OMP_PROC_BIND": "false", "GOMP_SPINCOUNT": "0"},
}
_SHARE = 0.7


async def measure(plan: Plan, images: list[bytes], report: Report, names: list[str]) -> None:
    """One connection to the fresh stack; then closed loops and one connection, then the open loop, round after round."""
    precision = plan.precisions[0]
    with tempfile.TemporaryDirectory(prefix="openset-bench-") as folder, Clients() as clients:
        artifact = models.random_artifact(
            Path(folder, "model"), plan.network, classes=116, scores=2000, device="cpu", precision=precision, compiled=False
        )  # fmt: skip
        store = build_archive(artifact, "model", Path(folder, "store")).parent
        async with contextlib.AsyncExitStack() as stacks:
            running: dict[str, Running] = {}
            for name in names:
                environment = {**plan.stack_environment(), **SETTINGS[name]}
                arranged = plan if name.startswith("shared") else replace(plan, workers=1)
                stack = served_by_stack(
                    store, "model", arranged.stack_arguments(precision), environment
                )
                running[name] = await stacks.enter_async_context(stack)

            async def closed(name: str, connections: int) -> Outcome:
                return await clients.closed(
                    running[name].gateway, images, connections=connections, seconds=plan.seconds / 2
                )

            rates: dict[str, list[float]] = {name: [] for name in names}
            single: dict[str, list[Outcome]] = {name: [] for name in names}
            tails: dict[str, list[Outcome]] = {name: [] for name in names}
            fresh = {name: [await closed(name, 1)] for name in names}
            for name in names:
                await closed(name, plan.connections)
            for number in range(plan.rounds):
                say(f"closed loops: round {number + 1} of {plan.rounds}")
                for name in names:
                    rates[name].append((await closed(name, plan.connections)).rate)
                    single[name].append(await closed(name, 1))
            rate = _SHARE * statistics.median(
                value for values in rates.values() for value in values
            )
            for number in range(plan.rounds):
                say(f"open loop at {rate:.1f} a second: round {number + 1} of {plan.rounds}")
                for name in names:
                    tails[name].append(
                        await clients.open(
                            running[name].gateway, images, rate=rate, seconds=plan.tail_seconds / 2
                        )
                    )
    for name in names:
        what = f"threads {name}, {plan.what(precision)}"
        report.add(f"images/s, {what}", round(statistics.median(rates[name]), 2), "images/s")
        for outcomes, load in (
            (fresh[name], "1 connection, just started"),
            (single[name], "1 connection"),
            (tails[name], "70 % of capacity"),
        ):
            p50, p99 = (
                round(statistics.median(outcome.latency_of_all(q) for outcome in outcomes) * 1e3, 1)
                for q in (0.5, 0.99)
            )
            report.add(
                f"p99 at {load}, {what}", p99, "ms", baseline=p50, against="ms, p50", ratio=round(p99 / p50, 2)
            )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, help="folder of JPEG photographs; default: rendered")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--quick", action="store_true", help="a smoke run; its numbers mean nothing")  # fmt: skip
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    report = Report(arguments.json)
    plan = plan_of(
        device="cpu", precisions=[arguments.precision], compiled=False, deadline_s=10.0, quick=arguments.quick
    )  # fmt: skip
    try:
        images = models.characters(64) if arguments.quick else models.photographs(arguments.images, 64)  # fmt: skip
        asyncio.run(measure(plan, images, report, arguments.settings))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
