"""What a run of the serving benchmark measures, with what, and for how long."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from serving.configuration import device_defaults
from training.precision import has_native_bfloat16

# A load that can fill the stack.
_LOAD = {
    "cpu": {"connections": 16, "client_processes": 1},
    "cuda": {"connections": 128, "client_processes": 4},
}
_MAX_IN_FLIGHT = 64  # places where none are given; the gateway itself has far more


@dataclass(frozen=True)
class Plan:
    """Options of a run; times in seconds.

    Attributes:
        device: "cpu" or "cuda".
        precisions: measured side by side.
        compiled: torch.compile in worker and bare loop.
        network: "resnet50", or "lenet_plus_plus" for a smoke run.
        batch_size: of the worker.
        workers: of TorchServe.
        gateway_processes: of the gateway.
        connections: of a closed loop at full load.
        max_in_flight: places of the gateway.
        client_processes: that share the load.
        deadline_s: the gateway's, and that of goodput.
        seconds: of one closed loop.
        rounds: of measurements that alternate with their baseline.
        load_seconds: of one point of the load curve.
        tail_seconds: at 70 %.
        overload_seconds: at 300 %.
    """

    device: str
    precisions: tuple[str, ...]
    compiled: bool
    network: str
    batch_size: int
    workers: int
    gateway_processes: int
    connections: int
    max_in_flight: int
    client_processes: int
    deadline_s: float
    seconds: float
    rounds: int
    load_seconds: float
    tail_seconds: float
    overload_seconds: float

    def what(self, precision: str) -> str:
        """The measured path, as rows name it."""
        return f"{self.network}, {precision}{' compiled' * self.compiled}, {self.device}"

    def of_toy_model(self) -> Plan:
        """The plan for the toy model, which is never compiled and never needs more than one gateway process."""
        chosen: dict[str, int] = device_defaults("cpu") | _LOAD["cpu"]
        return replace(self, compiled=False, network="lenet_plus_plus", **chosen)

    def stack_arguments(self, precision: str) -> list[str]:
        """Options of the served stack."""
        return [
            "--device", self.device, "--precision", precision, "--batch-size", str(self.batch_size), "--workers",
            str(self.workers), "--gateway-processes", str(self.gateway_processes),
            *(["--compiled"] if self.compiled else []),
        ]  # fmt: skip

    def stack_environment(self) -> dict[str, str]:
        """Settings of the gateway; all connections may land on one of its processes."""
        return {
            "OPENSET_DEADLINE_S": str(self.deadline_s),
            "OPENSET_MAX_IN_FLIGHT": str(self.max_in_flight),
        }


def plan_of(
    *,
    device: str,
    precisions: list[str] | None,
    compiled: bool,
    deadline_s: float,
    quick: bool,
    **given: int | None,
) -> Plan:
    """The plan of a run.

    Args:
        device: "cpu" or "cuda".
        precisions: None for those that the device has in hardware (float32 too on a CPU).
        compiled: see ``Plan``.
        deadline_s: see ``Plan``.
        quick: a smoke run of a tiny network; its numbers mean nothing.
        **given: what is not left to the device: batch_size, workers, gateway_processes, connections,
            max_in_flight, client_processes.
    """
    if precisions is None:
        native = device == "cuda" or has_native_bfloat16(device)
        precisions = [*(["float32"] if device == "cpu" else []), *(["bfloat16"] if native else [])]
    defaults = device_defaults(device, compiled=compiled) | _LOAD[device]
    chosen = defaults | {key: value for key, value in given.items() if value is not None}
    chosen.setdefault("max_in_flight", max(_MAX_IN_FLIGHT, chosen["connections"]))
    if least := [key for key, value in chosen.items() if value < 1]:
        raise ValueError(f"{', '.join(least)} must be at least 1")
    times: dict[str, float] = (
        {"seconds": 1.0, "load_seconds": 0.5, "tail_seconds": 1.0, "overload_seconds": 2.0}
        if quick
        else {"seconds": 12.0, "load_seconds": 8.0, "tail_seconds": 30.0, "overload_seconds": 60.0}
    )
    return Plan(
        device=device,
        precisions=tuple(dict.fromkeys(precisions)),
        compiled=compiled,
        network="lenet_plus_plus" if quick else "resnet50",
        deadline_s=deadline_s,
        rounds=1 if quick else 3,
        **chosen,
        **times,
    )


def cores() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0))
