"""Who may wait: what cannot be answered within the deadline is refused at once, so that the rest keeps its latency.

The model server answers in order. Whoever comes now waits for all who are in flight, at the pace of the answers; that
pace, seconds an answer, is learnt from every answer. So the places are deadline x throughput, whatever the model, the
hardware and the size of the images. With several gateway processes each learns its own share of the throughput.

A pace is believed while answers come. Once the gateway has been idle for a while it says nothing of the model server of now:
whoever comes then may try, even with a batch that would have been too large at the old pace, and the answer teaches anew.

Beside the places there is a budget of bytes: it bounds the memory of uploads that are read or wait, however many they are.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from api.problems import Problem

# The median of so many answers is the pace: one slow answer, the first one say, must not close the gateway.
_RECENT = 15
# The pace is an estimate and an upload takes time too; a place is given only where this much of the deadline suffices.
_SHARE_OF_DEADLINE = 0.8
# So long after the last answer an idle gateway no longer believes its pace.
_BELIEVED_S = 30.0


class Admission:
    """Places of one gateway process.

    Args:
        most: places at any pace; they bound the connections to the model server.
        most_bytes: of uploads at the same time; they bound the memory.
        deadline_s: time an answer may take.
        clock: seconds that never go back.

    Attributes:
        taken: places, one an image.
        bytes_taken: by uploads that are read or worked on.
        at_model: images that the model server has and has not answered.
        seconds_an_answer: learnt; None before the first answer.
    """

    def __init__(
        self,
        *,
        most: int,
        most_bytes: int,
        deadline_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most, self._most_bytes = most, most_bytes
        self._budget_s = _SHARE_OF_DEADLINE * deadline_s
        self._clock = clock
        self._learnt_at = -math.inf
        self._paces: deque[float] = deque(maxlen=_RECENT)
        self.taken = 0
        self.bytes_taken = 0
        self.at_model = 0
        self.seconds_an_answer: float | None = None

    def expected_s(self, images: int = 1) -> float:
        """Time until the last of ``images`` that come now would be answered."""
        return (self.taken + images) * (self.seconds_an_answer or 0.0)

    def check(self, images: int = 1) -> None:
        """Refuse what would be late or has no place. An idle gateway refuses no image: only answers teach it.

        Raises:
            Problem: overloaded, with the seconds after which it is worth asking again; or more images at once than even an
                idle gateway would take.
        """
        if not self.taken and self._clock() - self._learnt_at > _BELIEVED_S:
            self._paces.clear()
            self.seconds_an_answer = None
        pace = self.seconds_an_answer or 0.0
        fit = min(self._most, max(1, int(self._budget_s / pace + 1e-9))) if pace else self._most
        if images > fit:
            raise Problem(
                "too-large",
                f"{images} images at once cannot be answered within the deadline; send at most {fit} at a time",
                max_images=fit,
            )
        if self.taken + images > self._most:
            raise Problem(
                "overloaded",
                f"{self.taken} images are being worked on, at most {self._most} are accepted; slow down",
                retry_after_s=max(1, math.ceil(images * pace)),
            )
        late_s = self.expected_s(images) - self._budget_s
        if late_s > 0 and self.taken:  # of an idle gateway's images the check above has decided
            raise Problem(
                "overloaded",
                f"the answer would take {self.expected_s(images):.1f} s, more than is allowed; slow down",
                retry_after_s=max(1, math.ceil(late_s)),
            )

    @contextmanager
    def places(self, images: int = 1) -> Iterator[None]:
        """Take places until the end of the block.

        Raises:
            Problem: see ``check``.
        """
        self.check(images)
        self.taken += images
        try:
            yield
        finally:
            self.taken -= images

    @contextmanager
    def upload(self, size: int) -> Iterator[None]:
        """Take bytes of the memory until the end of the block.

        Args:
            size: of the body, or as much as it may have where it does not say.

        Raises:
            Problem: overloaded.
        """
        if self.bytes_taken + size > self._most_bytes:
            raise Problem(
                "overloaded",
                f"uploads of {self.bytes_taken} bytes are being worked on, at most {self._most_bytes} are accepted; "
                "slow down",
                retry_after_s=1,
            )
        self.bytes_taken += size
        try:
            yield
        finally:
            self.bytes_taken -= size

    @contextmanager
    def asking(self) -> Iterator[int]:
        """Around one question to the model server; gives its position among those that wait there."""
        self.at_model += 1
        try:
            yield self.at_model
        finally:
            self.at_model -= 1

    def learn(self, position: int, seconds: float) -> None:
        """Take in an answer (or its absence): ``position`` images were answered in this time."""
        self._learnt_at = self._clock()
        self._paces.append(seconds / position)
        self.seconds_an_answer = sorted(self._paces)[(len(self._paces) - 1) // 2]
