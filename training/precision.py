"""Which precision a device computes faster in."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from training.choices import PRECISIONS

logger = logging.getLogger(__name__)

# As the kernel names them: x86 (AVX512-BF16, AMX) and ARM. Without one of them torch emulates every bfloat16 product,
# many times slower than float32 (docs/results).
_BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


@cache
def has_native_bfloat16(device: str, cpu_info: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the device multiplies bfloat16 in hardware.

    Args:
        device: "cpu" or a CUDA device.
        cpu_info: the kernel's description of the processor; where there is none the answer is no.
    """
    if torch.device(device).type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    try:
        words = cpu_info.read_text().split()
    except OSError:
        return False
    return not _BFLOAT16_FLAGS.isdisjoint(words)


def resolve_precision(precision: str, device: str) -> str:
    """What "auto" stands for: bfloat16 where the device has it in hardware; anything else stays as asked.

    Raises:
        ValueError: no such precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}, got {precision!r}")
    native = has_native_bfloat16(device)
    if precision == "auto":
        return "bfloat16" if native else "float32"
    if precision == "bfloat16" and not native:
        logger.warning(
            "this %s has no bfloat16 arithmetic and emulates it, many times slower than float32; "
            "precision=auto (PRECISION=auto) would take float32",
            torch.device(device).type,
        )
    return precision


@contextmanager
def fast_convolutions(device: torch.device) -> Iterator[None]:
    """Let cuDNN use TF32 in float32 convolutions, torch's own default; a classifier in this process may have changed it.

    Without this a grid's first run would be trained with TF32 and all that follow an evaluation without, much slower.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
