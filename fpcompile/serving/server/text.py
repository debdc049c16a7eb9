"""From tokens to text as they come: incremental detokenising, and stop strings.

A token may end in the middle of a character, and a character's beginning decodes to U+FFFD, in some
tokenizers to one for each byte. Text is given out when it can no longer change: everything but what is U+FFFD
at the end. Text that may be the beginning of a stop string is held back until it is not.

Invariant: the pieces, joined, are the text of all tokens (up to a stop string), where their bytes are text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, final

__all__ = ["Detokenizer", "Stops"]

_UNFINISHED: Final = "\ufffd"
_LONGEST: Final = 64  # tokens of a window; invalid text beyond it is given out as it is


@final
class Detokenizer:
    """``decode`` gives the text of a list of ids.

    Decoded is a window: the tokens since the text was last complete, and those before them that have a text
    together, since what a token gives may depend on there being one before it (leading spaces).
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._context = 0
        """How many ids of the window are only there for those behind them."""
        self._known = ""
        """Their text."""
        self._given = 0
        """How many characters of the window's text have been given out."""

    def push(self, token: int) -> str:
        """The text that is certain now and was not before."""
        self._window.append(token)
        text = self._decode(self._window)
        complete = not text.endswith(_UNFINISHED) or len(self._window) - self._context > _LONGEST
        certain = text if complete else text.rstrip(_UNFINISHED)
        piece = certain[self._given :]
        self._given = max(self._given, len(certain))
        if complete:
            self._advance(text)
        return piece

    def _advance(self, text: str) -> None:
        """The window's ``text`` is given out: its last tokens are the context of what comes."""
        if self._known and text == self._known:  # they add nothing: special tokens
            del self._window[self._context :]
            return
        for start in range(self._context, -1, -1):
            context = self._window[start:][-_LONGEST:]
            self._known = self._decode(context)
            if self._known:
                break
        self._window = context
        self._context, self._given = len(context), len(self._known)

    def flush(self) -> str:
        """What is left: an unfinished character."""
        text = self._decode(self._window) if self._window else ""
        piece, self._given = text[self._given :], len(text)
        return piece


@final
class Stops:
    """Ends a text before the first of some strings; none of them is empty."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The part of the text so far that can be given out; sets ``found``."""
        if self.found or not self._strings:
            return "" if self.found else text
        text = self._held + text
        places = [place for s in self._strings if (place := text.find(s)) >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        keep = max(self._overlap(text, s) for s in self._strings)
        cut = len(text) - keep
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """What was held back; the text has ended."""
        text, self._held = self._held, ""
        return text

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of ``text`` that ``stop`` begins with."""
        most = min(len(text), len(stop) - 1)
        return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
