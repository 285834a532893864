"""One text as it comes in: what of it is judged, what of it is to be replaced, and where it has to end.

However a text is cut into chunks, the outcome is the same: nothing is judged before every match that it could be part
of is known. What waits is the end of the text from where a match may have begun, which is mostly nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from inferflux.policy.guardrails import Action, Rule
from services.gateway.guardrails.detectors import Detector, Match, Pending

SLICE_CHARS = 4096
"""Longer texts are read in slices, so that reading is linear in their length."""
MAX_PENDING_CHARS = 64 * 1024
"""What began like a match and is so long is one: credentials and URLs do not go on like that."""


class Edit(NamedTuple):
    """Put `label` in place of [start, end)."""

    start: int
    end: int
    label: str


class Window:
    """One text. Positions are counted from its beginning, in characters.

    `cleared`: up to here the text is judged. `edits`: of what is judged, in order, without overlaps. `found`: all
    matches in what is judged that are not exempt. `blocked`: what the text has to end before; then nothing more is
    judged.
    """

    def __init__(self, detectors: Sequence[Detector]) -> None:
        self.cleared = 0
        self.edits: list[Edit] = []
        self.found: list[Match] = []
        self.blocked: Match | None = None
        self._detectors = detectors
        self._text = ""  # from one character before `cleared`, if there is one
        self._offset = 0  # of `_text`

    def feed(self, text: str) -> None:
        """Take the next part of the text."""
        for begin in range(0, len(text), SLICE_CHARS):
            self._text += text[begin : begin + SLICE_CHARS]
            self._advance(is_final=False)

    def finish(self) -> None:
        """Judge the rest: the text is over."""
        self._advance(is_final=True)

    def cut(self, rule: Rule) -> None:
        """End the text where it is judged: it is longer than `rule` takes."""
        if rule.action is Action.BLOCK and self.blocked is None:
            self.blocked = Match(self.cleared, self.cleared, rule, "LENGTH")
        else:
            self.found.append(Match(self.cleared, self.cleared, rule, "LENGTH"))

    def _advance(self, *, is_final: bool) -> None:
        if self.blocked is not None:
            return
        text, begin, size = self._text, self.cleared - self._offset, len(self._text)
        pending = None if is_final else self._pending(text, begin)
        hold = size if pending is None else pending.start
        matches = [m for d in self._detectors for m in d.matches(text, begin) if m.start < hold]
        if pending is not None and size - hold > MAX_PENDING_CHARS:
            matches.append(Match(hold, size, pending.rule, "REDACTED"))
            hold = size
        matches.sort(key=lambda m: (m.start, -m.end))
        self._judge(matches, hold)
        self._trim()

    def _pending(self, text: str, begin: int) -> Pending | None:
        found = [pending for d in self._detectors if (pending := d.pending(text, begin)) is not None]
        return min(found, key=lambda p: p.start, default=None)

    def _judge(self, matches: Sequence[Match], hold: int) -> None:
        """Take the matches up to `hold`, or to before the first group of overlapping ones that reaches beyond it."""
        exempt = [m for m in matches if m.rule.action is Action.ALLOW]
        for group in _groups(matches):
            start, end = group[0].start, max(m.end for m in group)
            if end > hold:
                hold = start
                break
            found = [self._placed(m) for m in group if not any(e.start <= m.start and m.end <= e.end for e in exempt)]
            if any(m.rule.action is Action.BLOCK for m in found):
                self.blocked = next(m for m in found if m.rule.action is Action.BLOCK)
                hold = start
                break
            self.found += found
            self.edits += _edits(m for m in found if m.rule.action is Action.REDACT)
        self.cleared = self._offset + hold

    def _placed(self, match: Match) -> Match:
        return match._replace(start=match.start + self._offset, end=match.end + self._offset)

    def _trim(self) -> None:
        keep = max(0, self.cleared - self._offset - 1)
        self._text, self._offset = self._text[keep:], self._offset + keep


def edited(text: str, edits: Iterable[Edit], begin: int = 0) -> str:
    """Return what becomes of `text`, which stands at `begin`: where an edit begins, its label is put."""
    parts, done, end = [], begin, begin + len(text)
    for edit in edits:
        if edit.end <= begin or edit.start >= end:
            continue
        parts.append(text[done - begin : max(done, edit.start) - begin])
        if edit.start >= begin:
            parts.append(f"[{edit.label}]")
        done = min(end, edit.end)
    parts.append(text[done - begin :])
    return "".join(parts)


def _groups(matches: Sequence[Match]) -> Iterable[list[Match]]:
    """Put sorted matches that overlap, directly or through others, together."""
    group: list[Match] = []
    end = 0
    for match in matches:
        if group and match.start >= end:
            yield group
            group = []
        group.append(match)
        end = max(end, match.end) if len(group) > 1 else match.end
    if group:
        yield group


def _edits(matches: Iterable[Match]) -> Iterable[Edit]:
    edits: list[Edit] = []
    for match in matches:
        if edits and match.start < edits[-1].end:
            edits[-1] = edits[-1]._replace(end=max(edits[-1].end, match.end))
        else:
            edits.append(Edit(match.start, match.end, match.label))
    return edits
