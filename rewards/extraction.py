"""Finding the answer in a completion: the one place where it is done."""

from __future__ import annotations

import re

from rewards.base import RewardError, nearest

# method -> what `marker` means for it (None: it takes no marker)
METHODS: dict[str, str | None] = {
    "boxed": None,
    "last_number": None,
    "whole": None,
    "tag": "the tag's name; without a marker it is <answer>...</answer>",
    "delimiter": "the text the answer follows, e.g. ####",
    "regex": "a regular expression; its first group, or else the whole match, is the answer",
}

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_NUMBER = re.compile(r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:/\d+)?")


def check_extraction(method: str, marker: str) -> None:
    """Raise RewardError unless `method` is known and `marker` fits it."""
    if method not in METHODS:
        raise RewardError(f"extract={method!r} is unknown; {nearest(str(method), METHODS)}")
    meaning = METHODS[method]
    if meaning is None:
        if marker:
            raise RewardError(f"marker={marker!r} has no meaning with extract={method!r}; remove it")
        return
    if not marker and method != "tag":
        raise RewardError(f"extract={method!r} needs marker: {meaning}")
    if method == "regex":
        try:
            re.compile(marker)
        except re.error as error:
            raise RewardError(f"marker={marker!r} is not a regular expression: {error}") from error


def extract(text: str, method: str, marker: str = "") -> str | None:
    """The last answer in `text` by `method` (see METHODS), stripped; None if there is none.

    Time is linear in the text, except for `regex`, which costs what its expression costs.
    """
    found: str | None
    if method == "boxed":
        found = boxed(text)
    elif method == "last_number":
        found = last_number(text)
    elif method == "whole":
        found = text
    elif method == "tag":
        found = _last_tag(text, marker or "answer")
    elif method == "delimiter":
        _, hit, after = text.rpartition(marker)
        found = after.strip().split("\n", 1)[0] if hit else None
    else:
        matches = list(re.finditer(marker, text, re.DOTALL))
        found = matches[-1].group(1 if matches[-1].re.groups else 0) if matches else None
    if found is None:
        return None
    return found.strip() or None


def boxed(text: str) -> str | None:
    r"""Content of the last \boxed{...} (or \fbox) whose braces balance; None if there is none."""
    for match in reversed(list(_BOX.finditer(text))):
        depth, escaped = 1, False
        for position in range(match.end(), len(text)):
            char = text[position]
            if escaped:
                escaped = False
            elif char == "\\":
                escaped = True
            elif char == "{":
                depth += 1
            elif char == "}":
                depth -= 1
                if depth == 0:
                    return text[match.end() : position]
        # The box before can only close ahead of this one, so that the whole search stays linear.
        text = text[: match.start()]
    return None


def last_number(text: str) -> str | None:
    """The last number: sign, thousands commas, decimals and a simple fraction are kept."""
    found = None
    for match in _NUMBER.finditer(text):
        # "7-3" and "5.-3": a sign right behind a digit is an operator.
        value, start = match.group(), match.start()
        found = value[1:] if value[0] in "+-" and start and text[start - 1].isdigit() else value
    return found


def _last_tag(text: str, name: str) -> str | None:
    opening, closing = f"<{name}>", f"</{name}>"
    end = text.rfind(closing)
    if end < 0:
        return None
    start = text.rfind(opening, 0, end)
    return None if start < 0 else text[start + len(opening) : end]
