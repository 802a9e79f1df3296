"""Finding the answer in a completion: the one place where it is done."""

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
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is no brace
_NUMBER = re.compile(r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:/\d+)?")


def check_extraction(method: str, marker: str, more: tuple[str, ...] = ()) -> None:
    """Raise RewardError unless `method` is known, here or as one of `more` without a marker, and `marker` fits it."""
    if method not in METHODS and method not in more:
        raise RewardError(f"extract={method!r} is unknown; {nearest(str(method), [*METHODS, *more])}")
    meaning = METHODS.get(method)
    if meaning is None and marker:
        raise RewardError(f"marker={marker!r} has no meaning with extract={method!r}; remove it")
    if meaning is not None and not marker and method != "tag":
        raise RewardError(f"extract={method!r} needs marker: {meaning}")
    if method == "regex":
        check_pattern("marker", marker)


def check_pattern(key: str, pattern: str) -> None:
    """Raise RewardError unless `pattern`, the value of setting `key`, is a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise RewardError(f"{key}={pattern!r} is not a regular expression: {error}") from error


def extract(text: str, method: str, marker: str = "") -> str | None:
    """The last answer in `text` by `method` (see METHODS), stripped; None if there is none.

    Time is linear in the text, except for `regex`, which costs what its expression costs.
    """
    found: str | None = None
    match method:
        case "boxed":
            found = boxed(text)
        case "last_number":
            found = last_number(text)
        case "whole":
            found = text
        case "tag":
            before, closed, _ = text.rpartition(f"</{marker or 'answer'}>")
            _, opened, inside = before.rpartition(f"<{marker or 'answer'}>")
            found = inside if closed and opened else None
        case "delimiter":
            _, hit, after = text.rpartition(marker)
            found = after.strip().split("\n", 1)[0] if hit else None
        case "regex":
            for match in re.finditer(marker, text, re.DOTALL):
                found = match.group(1 if match.re.groups else 0)
    return (found or "").strip() or None


def boxed(text: str) -> str | None:
    r"""Content of the last \boxed{...} (or \fbox) whose braces balance; None if there is none."""
    for match in reversed(list(_BOX.finditer(text))):
        depth = 1
        for token in _BRACE.finditer(text, match.end()):
            depth += {"{": 1, "}": -1}.get(token[0], 0)
            if depth == 0:
                return text[match.end() : token.start()]
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
