"""Where generated text ends: stop strings matched as text, whatever tokens they are made of."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_codellama.errors import PromptError
from mlx_codellama.tokenizer import Tokenizer


class StopMatcher:
    """Finds stop strings in text that arrives in pieces, and holds back what might become one.

    The stop string that is complete first ends the text; of several that end at the same character, the longest. So
    the outcome depends on the text alone, never on how it is cut into pieces. The text ends before the stop string.

    "ab", "c" with the stop "bcd":  feed("xab") → "xa" (b is held), feed("c") → "", feed("e") → "bce"
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises PromptError for an empty stop string, which would match everywhere."""
        if any(not isinstance(s, str) or not s for s in stops):
            raise PromptError("a stop string is empty or not text", hint="pass stop=['...'] or leave stop out")
        self.stops = tuple(stops)
        self.matched: str | None = None
        self._held = ""

    def feed(self, text: str) -> str:
        """The part of the text so far that is now known to stay. After a match: always ""."""
        if self.matched is not None:
            return ""
        self._held += text
        found = [(at + len(s), -len(s), s) for s in self.stops if (at := self._held.find(s)) >= 0]
        if found:
            end, _, self.matched = min(found)
            released, self._held = self._held[: end - len(self.matched)], ""
            return released
        keep = self._suspicious()
        released, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return released

    def finish(self) -> str:
        """What was held back: nothing more is coming, so it cannot become a stop string."""
        released, self._held = self._held, ""
        return released

    def _suspicious(self) -> int:
        """Length of the longest end of the held text that a stop string begins with."""
        longest = max((len(s) for s in self.stops), default=0)
        for n in range(min(longest - 1, len(self._held)), 0, -1):
            end = self._held[-n:]
            if any(s.startswith(end) for s in self.stops):
                return n
        return 0


class Continuation:
    """The text of generated ids as it grows, cut at stop strings, and the ids that belong to it.

    drop_space  leave out one leading space: the dummy space that begins an answer but is not part of it
    hidden      ids without text
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str],
        *,
        drop_space: bool = False,
        hidden: frozenset[int] = frozenset(),
    ) -> None:
        self._detokenizer = tokenizer.detokenizer()
        self._matcher = StopMatcher(stops)
        self._drop_space, self._hidden = drop_space, hidden
        self._begins: list[int] = []  # where in the uncut text each id's own text begins
        self._seen = 0
        self._whole = False
        self._parts: list[str] = []

    @property
    def stop(self) -> str | None:
        """The stop string that ended the text."""
        return self._matcher.matched

    @property
    def text(self) -> str:
        return "".join(self._parts)

    @property
    def n_ids(self) -> int:
        """How many ids belong to the text: those whose own text begins inside it; all, if nothing was cut off."""
        if self._whole:
            return len(self._begins)
        end = len(self.text)
        return sum(begin < end for begin in self._begins)

    def add(self, id: int) -> str:
        """The text that is certain after this id and was not before."""
        self._begins.append(self._seen)
        if id in self._hidden:
            return ""
        return self._show(self._matcher.feed(self._trimmed(self._detokenizer.add(id))))

    def finish(self) -> str:
        """The rest: half characters as U+FFFD, and what was held back without becoming a stop string."""
        fed = self._matcher.feed(self._trimmed(self._detokenizer.finish()))
        rest = self._show(fed + self._matcher.finish())
        self._whole = self.stop is None
        return rest

    def _trimmed(self, text: str) -> str:
        if text and self._drop_space:
            self._drop_space = False
            text = text.removeprefix(" ")
        self._seen += len(text)
        return text

    def _show(self, text: str) -> str:
        if text:
            self._parts.append(text)
        return text
