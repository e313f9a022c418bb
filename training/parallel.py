"""Several processes train one model: torchrun starts them, DistributedDataParallel averages their gradients.

**Means over the whole batch.** A loss divides by how many samples, or how many knowns, the batch holds. Those numbers
differ between processes, and a mean of the processes' means is another number. Every process therefore gathers the
deep features of all (N x D floats, little beside the images) and computes head and loss of the whole batch, as a single
process would: any denominator, and any loss that looks at the batch as a whole, is right without knowing of this module.
Each has then the full gradient of head and loss, and dL/dfeatures of its own samples. DistributedDataParallel takes the
mean over processes, which leaves the former as it is and would divide the network's gradient, a sum over processes, by
their number; so the gradient of a process' own features is multiplied by that number first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn

from training.batches import ALONE, Share

# Reading and checking a large data set may take one node longer than another.
_PATIENCE = timedelta(hours=2)


@contextmanager
def process_group(device: str) -> Iterator[tuple[Share, torch.device]]:
    """Join the processes that torchrun started; yields this one's share and its device.

    Without torchrun nothing is joined. Each process takes the GPU of its number on its machine.

    Raises:
        ValueError: a machine has fewer GPUs than processes.
    """
    count, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    chosen = torch.device(device)
    if count == 1:
        yield ALONE, chosen
        return
    if chosen.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"{os.environ['LOCAL_WORLD_SIZE']} processes were started on a machine with {torch.cuda.device_count()} GPUs; "
                "start one for each GPU (GPUS=n)"
            )
        chosen = torch.device("cuda", local)
        torch.cuda.set_device(chosen)
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    distributed.init_process_group(backend, timeout=_PATIENCE)
    try:
        yield Share(rank, count), chosen
    finally:
        distributed.destroy_process_group()


def is_writer() -> bool:
    """Whether this process writes files and logs: the only one, or the first of several."""
    return int(os.environ.get("RANK", "0")) == 0


def gather_rows(local: Tensor, count: int, share: Share) -> Tensor:
    """Rows of all processes in the batch's order, (m, D) -> (count, D); gradients flow to the own rows.

    Args:
        local: this process' rows, those of ``Share.of``.
        count: rows of the whole batch; what a process computed beyond them is dropped.
        share: of this process.
    """
    if share.count == 1:
        return local
    missing = -(-count // share.count) - len(local)
    own = nn.functional.pad(local, (0, 0, 0, missing))
    parts = [torch.empty_like(own) for _ in range(share.count)]
    distributed.all_gather(parts, own.detach())
    if own.requires_grad:
        own.register_hook(lambda gradient: gradient * share.count)  # see the module's text
    parts[share.rank] = own
    return torch.stack(parts, dim=1).flatten(0, 1)[:count]


def add_up(values: Tensor, share: Share) -> Tensor:
    """The sum over all processes, in place."""
    if share.count > 1:
        distributed.all_reduce(values)
    return values


def is_set_anywhere(flag: bool, device: torch.device, share: Share) -> bool:
    """Whether any process says so; all must ask."""
    return bool(add_up(torch.tensor(float(flag), device=device), share) > 0)


def same_buffers(model: nn.Module, share: Share) -> None:
    """Give all processes the first one's buffers (running statistics of batch norm, which each sees its own part of)."""
    if share.count > 1:
        for buffer in model.buffers():
            distributed.broadcast(buffer, src=0)


def from_writer(content: Any, share: Share) -> Any:
    """What the first process holds; the others need not see its disk."""
    if share.count == 1:
        return content
    box = [content]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def wrapped(step: nn.Module, device: torch.device, share: Share) -> nn.Module:
    """The step whose gradients are averaged over all processes."""
    if share.count == 1:
        return step
    devices = [device.index] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(
        step, device_ids=devices, gradient_as_bucket_view=True
    )
