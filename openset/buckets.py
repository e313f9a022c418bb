"""The batch sizes that a compiled backbone is asked for; whoever serves it knows them without torch."""

from __future__ import annotations

# Every size is compiled (and on CUDA recorded) for itself; sizes between are filled up.
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def buckets_up_to(batch_size: int) -> list[int]:
    """The sizes that batches of 1 to ``batch_size`` images are computed with."""
    return [
        bucket
        for number, bucket in enumerate(BUCKETS)
        if number == 0 or BUCKETS[number - 1] < batch_size
    ]
