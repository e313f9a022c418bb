"""TorchServe's configuration files, written fresh at every start; each setting has its reason here.

TorchServe ignores unknown keys and falls back to defaults on wrong types, both in silence, so the supervisor reads the
settings back from the running server.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from openset.buckets import BUCKETS
from openset.image_headers import MAX_IMAGE_BYTES

# By device: workers, largest batch, gateway processes. On a CPU a longer batch than four keeps its members waiting, and whether
# it gains throughput was undecided; two workers share the cores (``ServingSettings.shares_cores``), for figures see
# docs/results/serving-speed.md. On a GPU two workers, so that one decodes while the other computes.
DEVICE_DEFAULTS = {
    "cpu": {"workers": 2, "batch_size": 4, "gateway_processes": 1},
    "cuda": {"workers": 2, "batch_size": 32, "gateway_processes": 4},
}

# Rounds that a computing thread waits for more work before it sleeps, which must bridge the gap between two layers; GNU OpenMP's
# own number is 300,000.
_SHARED_SPINS = 50_000

INFERENCE_SOCKET = Path("ts/inference.sock")
MANAGEMENT_SOCKET = Path("admin/management.sock")
METRICS_SOCKET = Path("admin/metrics.sock")
_LONGEST_SOCKET_PATH = (
    100  # the kernel allows 107 bytes; TorchServe's own worker sockets lie beside ours
)


def compute_device(device: str) -> str:
    """Device that computes: "auto" means a GPU where the driver's ``nvidia-smi`` is, by which TorchServe looks for one too."""
    if device == "auto":
        return "cuda" if shutil.which("nvidia-smi") else "cpu"
    return device


def device_defaults(device: str, *, compiled: bool = False) -> dict[str, int]:
    """Of a device, see ``compute_device``.

    Code compiled for a CPU has its number of threads built in, so that one worker has them all.
    """
    computes_on = compute_device(device)
    defaults = DEVICE_DEFAULTS[computes_on]
    cores = len(os.sched_getaffinity(0))
    if computes_on == "cpu" and (compiled or cores == 1):
        return {**defaults, "workers": 1}
    return defaults


def _default_compile_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "openset-serve"


def _gateway_deadline() -> float:
    return float(os.environ.get("OPENSET_DEADLINE_S") or 10)


@dataclass(frozen=True)
class ServingSettings:
    """How the model is served.

    Attributes:
        model: name, the stem of the archive.
        model_store: folder of the archive.
        run_dir: folder of sockets and configuration; short, private to one instance. Made absolute.
        workers: processes that hold the model.
        batch_size: largest batch; at most the largest that is compiled where ``compiled``.
        max_batch_delay_ms: how long the first request of a batch waits for company; 0 would mean 100 ms.
        response_timeout_s: a worker that is slower is killed.
        startup_timeout_s: import, load, compile and warm-up.
        job_queue_size: requests that may wait. The gateway admits what the deadline allows, deadline x throughput, and
            bounds the bytes; the queue must hold all of that for the fastest device, and takes no memory while empty.
        device: "auto", "cpu" or "cuda"; anything but "auto" is a demand.
        precision: of the backbone, "float32" or "bfloat16".
        compiled: torch.compile in the worker; minutes at the first start, then from the cache.
        compile_cache: folder of compiled code, kept between starts.
        decode_threads: decoding threads of a worker; None for its share of the cores.
        max_request_bytes: largest request body.
        deadline_s: the gateway's; a request that waited longer is dropped unanswered, since nobody waits for it.
        java_heap: maximum heap of the frontend.
    """

    model: str
    model_store: Path
    run_dir: Path
    workers: int = 1
    batch_size: int = 4
    max_batch_delay_ms: int = 1
    response_timeout_s: int = 20
    startup_timeout_s: int = 300
    job_queue_size: int = 32_768
    device: str = "auto"
    precision: str = "float32"
    compiled: bool = False
    compile_cache: Path = field(default_factory=_default_compile_cache)
    decode_threads: int | None = None
    max_request_bytes: int = MAX_IMAGE_BYTES
    deadline_s: float = field(default_factory=_gateway_deadline)
    java_heap: str = "1g"

    def __post_init__(self) -> None:
        # Java starts in the run folder: a relative path would be looked for below it.
        object.__setattr__(self, "run_dir", self.run_dir.resolve())
        if not self.archive.is_file():
            known = sorted(file.stem for file in self.model_store.glob("*.mar"))
            raise FileNotFoundError(
                f"{self.archive} does not exist; {self.model_store} holds {', '.join(known) or 'no archive'}. "
                "Make one with: make archive RUN=<run>"
            )
        for name in ("workers", "batch_size", "max_batch_delay_ms", "job_queue_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.compiled and self.batch_size > BUCKETS[-1]:
            # A larger batch would be compiled when it first occurs: minutes, with requests waiting.
            raise ValueError(
                f"a compiled model has batches of at most {BUCKETS[-1]}, got {self.batch_size}; "
                f"choose --batch-size {BUCKETS[-1]}, or serve without --compiled"
            )
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f'device must be "auto", "cpu" or "cuda", got {self.device!r}')
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f'precision must be "float32" or "bfloat16", got {self.precision!r}')
        if len(os.fsencode(self.management_socket.resolve())) > _LONGEST_SOCKET_PATH:
            raise ValueError(
                f"the run folder {self.run_dir} makes Unix socket paths longer than {_LONGEST_SOCKET_PATH} bytes; "
                "choose a shorter --run-dir"
            )

    @property
    def archive(self) -> Path:
        """The archive that is served."""
        return self.model_store / f"{self.model}.mar"

    @property
    def inference_socket(self) -> Path:
        """Socket for the gateway."""
        return self.run_dir / INFERENCE_SOCKET

    @property
    def management_socket(self) -> Path:
        """Socket for the supervisor alone; in another folder than the gateway's."""
        return self.run_dir / MANAGEMENT_SOCKET

    @property
    def code_folder(self) -> Path:
        """Where a worker keeps compiled code.

        Importing torchvision makes this folder, compiled or not. So a worker that compiles nothing has it in the run folder,
        which can be written wherever the stack runs; a home folder cannot in a container with a read-only root.
        """
        return self.compile_cache.resolve() if self.compiled else self.run_dir / "tmp" / "code"

    def default_decode_threads(self) -> int:
        """Of one worker: its share of the cores, but all of them where the GPU computes and the other worker waits for it."""
        if compute_device(self.device) == "cuda":
            return len(os.sched_getaffinity(0))
        return self.worker_threads()

    def worker_threads(self) -> int:
        """Computing threads of one worker on a CPU, while all work."""
        return max(1, len(os.sched_getaffinity(0)) // self.workers)

    @property
    def shares_cores(self) -> bool:
        """Whether a worker takes all cores while the others have nothing to do, see ``openset.cores``."""
        return self.workers > 1 and not self.compiled and compute_device(self.device) == "cpu"

    def thread_environment(self, given: Mapping[str, str]) -> dict[str, str]:
        """Environment of the worker's computing threads; what ``given`` says of their places stays.

        On a CPU a single worker has a thread for every core, each bound to its own: two threads that land on one core wait for
        each other until the scheduler parts them, which lengthens the tail under load (docs/results/serving-speed.md). Several
        workers would all be bound to the first cores; and if they share the cores, threads that still wait for more work of
        one would keep the next from its own, so that they wait asleep sooner than OpenMP lets them.
        """
        bound = self.workers == 1 and compute_device(self.device) == "cpu"
        is_placed = any(name in given for name in ("OMP_PROC_BIND", "GOMP_CPU_AFFINITY"))
        waits = any(name in given for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"))
        return {
            "OMP_NUM_THREADS": str(self.worker_threads()),
            **({"OMP_PROC_BIND": "true"} if bound and not is_placed else {}),
            **({"GOMP_SPINCOUNT": str(_SHARED_SPINS)} if self.shares_cores and not waits else {}),
        }

    def java_options(self) -> list[str]:
        """Memory and compilation of the frontend.

        On a CPU, Java's optimising compiler and its parallel collector would work on the cores that the model computes on, and at
        the few requests a second of a large model it would interpret most of its code through the first hundreds of them. So
        there it compiles once, plainly, after a twentieth of the usual calls (docs/results/serving-speed.md). On a GPU host it
        may have thousands a second to answer: what Java chooses stays.
        """
        limits = [f"-Xmx{self.java_heap}", f"-XX:MaxDirectMemorySize={self.java_heap}"]
        if compute_device(self.device) != "cpu":
            return limits
        plain = ["TieredStopAtLevel=1", "CompileThresholdScaling=0.05", "+UseSerialGC"]
        return [*limits, *(f"-XX:{option}" for option in plain)]

    def read_back(self) -> dict[str, int]:
        """What ``GET /models/<name>`` must report."""
        return {
            "minWorkers": self.workers,
            "maxWorkers": self.workers,
            "batchSize": self.batch_size,
            "maxBatchDelay": self.max_batch_delay_ms,
            "responseTimeout": self.response_timeout_s,
            "startupTimeout": self.startup_timeout_s,
            "jobQueueSize": self.job_queue_size,
        }


def model_config(settings: ServingSettings) -> str:
    """``model-config.yaml``: beats config.properties, loses to the management API."""
    return yaml.safe_dump(
        {
            **settings.read_back(),
            # The gateway owns the deadline and answers 504. TorchServe's own timeout answers nobody: a little later it sheds
            # what still waits, so that it works for those who still listen.
            "clientTimeoutInMills": int(1000 * settings.deadline_s) + 2000,
            "maxRetryTimeoutInSec": 300,
            **({"deviceType": "cpu"} if settings.device == "cpu" else {}),
            "handler": {
                "device": settings.device,
                "precision": settings.precision,
                "compiled": settings.compiled,
                "decode_threads": settings.decode_threads or settings.default_decode_threads(),
                **({"shared_cores": _shared_cores(settings)} if settings.shares_cores else {}),
            },
        },
        sort_keys=True,
    )


def _shared_cores(settings: ServingSettings) -> dict[str, Any]:
    return {"folder": str(settings.run_dir / "tmp" / "cores"), "workers": settings.workers}


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [item.getsockname()[1] for item in sockets]
    finally:
        for item in sockets:
            item.close()


def config_properties(settings: ServingSettings, model_store: Path) -> str:
    """``config.properties``; a remark behind a value would become part of it.

    Args:
        settings: how to serve.
        model_store: folder with the unpacked model, prepared for this start.
    """
    # gRPC cannot be switched off; it is confined to loopback, on ports of no fixed meaning.
    grpc_inference, grpc_management = _free_ports(2)
    values = {
        "inference_address": f"unix:{settings.inference_socket.resolve()}",
        "management_address": f"unix:{settings.management_socket.resolve()}",
        "metrics_address": f"unix:{(settings.run_dir / METRICS_SOCKET).resolve()}",
        "grpc_inference_address": "127.0.0.1",
        "grpc_management_address": "127.0.0.1",
        "grpc_inference_port": grpc_inference,
        "grpc_management_port": grpc_management,
        # File permissions guard the sockets; TorchServe's tokens expire after an hour.
        "disable_token_authorization": "true",
        "enable_model_api": "false",
        "install_py_dep_per_model": "false",
        "allowed_urls": "file:///nonexistent/none",
        "model_store": model_store.resolve(),
        "load_models": settings.model,
        "default_workers_per_model": settings.workers,
        "max_request_size": settings.max_request_bytes,
        "max_response_size": 1_048_576,
        "decode_input_request": "false",
        "disable_system_metrics": "true",
        "metrics_mode": "prometheus",
        "number_of_netty_threads": 4,
        "netty_client_threads": 2,
        "enable_envvars_config": "false",
    }
    return "".join(f"{key}={value}\n" for key, value in values.items())


LOG4J2 = """<?xml version="1.0" encoding="UTF-8"?>
<Configuration status="ERROR">
  <Appenders>
    <Console name="stdout" target="SYSTEM_OUT">
      <PatternLayout pattern="torchserve %-5p %c{1} - %replace{%m}{[\\r\\n]+}{ | }%n"/>
    </Console>
  </Appenders>
  <Loggers>
    <!-- The worker's whole output, tracebacks included, arrives in MODEL_LOG at INFO. -->
    <Logger name="MODEL_LOG" level="info"/>
    <Logger name="io.netty" level="error"/>
    <Logger name="ACCESS_LOG" level="off"/>
    <Logger name="TS_METRICS" level="off"/>
    <Logger name="MODEL_METRICS" level="off"/>
    <Root level="warn"><AppenderRef ref="stdout"/></Root>
  </Loggers>
</Configuration>
"""
