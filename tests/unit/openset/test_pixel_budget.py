"""What decodes side by side stays within the budget, and what is too large for it is still decoded."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from openset.pixel_budget import PixelBudget


def most_side_by_side(budget: PixelBudget, sizes: list[int], expected: int) -> int:
    """Largest number of images inside their blocks at once; each stays until the expected ones are there, and a moment more."""
    inside, most, lock = 0, 0, threading.Lock()
    expected_there = threading.Event()

    def decode(size: int) -> None:
        nonlocal inside, most
        with budget.of(size):
            with lock:
                inside += 1
                most = max(most, inside)
                if inside == expected:
                    expected_there.set()
            expected_there.wait(30)
            time.sleep(0.1)
            with lock:
                inside -= 1

    with ThreadPoolExecutor(len(sizes)) as pool:
        list(pool.map(decode, sizes))
    return most


@pytest.mark.parametrize(
    ("sizes", "most"),
    [
        ([40, 40, 40], 1),
        ([20, 20, 20], 2),
        ([10, 10, 10], 3),
        ([90, 90], 1),  # larger than the budget: one after the other, but never for nothing
        ([90, 1], 1),
    ],
)
def test_images_side_by_side_have_no_more_pixels_than_the_budget(
    sizes: list[int], most: int
) -> None:
    assert most_side_by_side(PixelBudget(40), sizes, most) == most


def test_image_that_fails_gives_its_pixels_back() -> None:
    budget = PixelBudget(40)
    with pytest.raises(ValueError, match="broken"), budget.of(40):
        raise ValueError("broken")
    assert most_side_by_side(budget, [20, 20], 2) == 2
