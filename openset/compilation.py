"""Compiling a backbone for its device, and filling batches up to the sizes that it is compiled for.

Compiled code lives in a cache of the host (``TORCHINDUCTOR_CACHE_DIR``), never in an artifact or archive. The scores of a
compiled path are its own: ``PathIdentity.mode`` belongs to the path, and a path without scores is not served.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openset.buckets import BUCKETS

# Several times the sizes: a benchmark has more than one compiled network in a process.
_RECOMPILE_LIMIT = 8 * len(BUCKETS)

# A CUDA graph: the first call of a size compiles and warms up, the second records, the third replays.
CALLS_UNTIL_RECORDED = 3


def default_compile_cache() -> Path:
    """Folder of compiled code on this host, the same that ``serving`` gives its workers."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "openset-serve"


def compile_backbone(network: nn.Module, device: torch.device) -> Any:
    """The compiled network; compiling happens at the first call with each size.

    On a CPU the weights are frozen into the code, so that batch norm is folded into the convolutions. On CUDA each size
    is recorded as a CUDA graph. Unless ``TORCHINDUCTOR_CACHE_DIR`` names another folder, the code is kept where serving
    keeps it: a calibration or a benchmark does not compile again what a worker has compiled.
    """
    # Imported here: it takes seconds, which only compiling is worth.
    from torch._dynamo import config as dynamo_config

    _keep_code_on_this_host()
    # Beyond the limit torch would run further sizes uncompiled; all networks of a kind share it.
    dynamo_config.recompile_limit = max(dynamo_config.recompile_limit, _RECOMPILE_LIMIT)
    if device.type == "cuda":
        return torch.compile(network, dynamic=False, mode="reduce-overhead")
    return torch.compile(network, dynamic=False, options={"freezing": True})


def _keep_code_on_this_host() -> None:
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    given = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    # Torch's own default in /tmp is nobody's choice, and importing torchvision puts it there.
    if given is None or given == default_cache_dir():
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(default_compile_cache())


def filled_up(images: Tensor) -> Tensor:
    """Black images appended until the size is a bucket; (N, ...) -> (bucket, ...), above the largest unchanged."""
    count = len(images)
    size = next((bucket for bucket in BUCKETS if bucket >= count), count)
    if size == count:
        return images
    return torch.cat([images, images.new_zeros(size - count, *images.shape[1:])])
