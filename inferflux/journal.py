"""What there is of a response: enough for a worker to go on where another one, or an earlier run, has got to.

A response is a sequence of events (frames with data); the tokens beside them are what they were made from. A worker
that gets the tokens writes the same events again and leaves out those that were taken.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

_SIZE_BITS = 32


class Journal:
    """Tokens in the order and grouping of the frames, and the number of events. 4 bytes a token, 8 a group.

    `num_events` is counted by whoever takes the events: this is the gateway's cost per token.
    """

    __slots__ = ("_groups", "_token_ids", "num_events")

    def __init__(self) -> None:
        self.num_events = 0
        self._token_ids = array("I")
        self._groups = array("Q")

    @property
    def num_tokens(self) -> int:
        """How many tokens were taken, over all choices."""
        return len(self._token_ids)

    @property
    def num_bytes(self) -> int:
        """About what it takes in memory."""
        return 4 * len(self._token_ids) + 8 * len(self._groups)

    def take(self, index: int, token_ids: Sequence[int]) -> None:
        """Write down the tokens that a frame has for the choice `index`."""
        size = len(token_ids)
        if size == 1:
            self._token_ids.append(token_ids[0])
        else:
            self._token_ids.extend(token_ids)
        self._groups.append(index << _SIZE_BITS | size)

    def groups(self) -> Iterator[tuple[int, Sequence[int]]]:
        """Yield what was taken, in order: index of the choice, token ids."""
        begin = 0
        for group in self._groups:
            end = begin + (group & (1 << _SIZE_BITS) - 1)
            yield group >> _SIZE_BITS, self._token_ids[begin:end]
            begin = end

    def forget(self) -> None:
        """Start over: nothing of the response has been seen by anybody."""
        self.__init__()  # type: ignore[misc]
