"""What engines share to write a response again without saying anything twice."""

from __future__ import annotations

from dataclasses import replace

from inferflux.types import Frame


class Withheld:
    """Takes the data out of a response's first `num_events` frames with data: the client has them."""

    def __init__(self, num_events: int) -> None:
        self._num_left = num_events

    def remainder(self, frame: Frame) -> Frame | None:
        """The frame without data that was delivered; None when nothing else is in it."""
        if not frame.data or not self._num_left:
            return frame
        self._num_left -= 1
        news = replace(frame, data=b"")
        return news if news != Frame() else None
