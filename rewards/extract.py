"""From the text of a rollout to its answer, or None. None never votes; an empty string is never an answer.

Every pattern runs in linear time on bounded text, because the text is whatever a model chose to write.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from ttrl.rewards.structured import box_answer, json_answer, point_answer, regex_answers

MAX_TEXT = 100_000
"""Characters looked at, counted from the end: answers stand last."""
MAX_ANSWER = 1_000
"""A longer answer is no answer."""

_NUMBER = re.compile(r"(?<![\w.])[-−]?(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?:/\d+)?(?!\w)")
_STATED = re.compile(r"(?:final answer|answer)\s*(?:is|:|=)\s*:?\s*", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\.(?:\s|$)|;|,\s| because | since ")
_BOX = re.compile(r"\\f?box(?:ed)?\s*\{")
_BRACE = re.compile(r"(?<!\\)[{}]")


def extract(text: str, kind: str, **options: Any) -> str | None:
    """The answer in `text`, stripped, or None.

    Kinds: `math` (last balanced `\\boxed{}`, else what follows the last "answer is"), `number` (the last number),
    `choice` (a letter; option `letters`, default "ABCD"), `label` (a word of a closed set; options `labels` and
    `which` = "first" | "last"), `json` (the last object or array; option `key`: its member), `box` and `point` (screen
    coordinates; option `size` = [width, height]), `regex` (the last match; options `pattern` and `group`).
    Raises ValueError for an unknown kind or option, RuntimeError when `regex` needs the sandbox and it cannot start.
    """
    return extract_all([text], kind, **options)[0]


def extract_all(texts: Sequence[str], kind: str, **options: Any) -> list[str | None]:
    """`extract` for many texts at once; for `regex` much cheaper than one by one. Raises as `extract` does."""
    if kind not in KINDS:
        raise ValueError(f"unknown extractor {kind!r}; known: {', '.join(KINDS)}")
    read = [text[-MAX_TEXT:] for text in texts]
    found = regex_answers(read, **options) if kind == "regex" else [_KINDS[kind](text, **options) for text in read]
    answers = [answer.strip() if answer is not None else None for answer in found]
    return [answer if answer and len(answer) <= MAX_ANSWER else None for answer in answers]


def boxed(text: str) -> str | None:
    """The content of the last balanced `\\boxed{...}` or `\\fbox{...}`; one that never closes does not count."""
    closed_at: dict[int, int] = {}
    still_open: list[int] = []
    for brace in _BRACE.finditer(text):
        if brace.group() == "{":
            still_open.append(brace.start())
        elif still_open:
            closed_at[still_open.pop()] = brace.start()
    for box in reversed(list(_BOX.finditer(text))):
        end = closed_at.get(box.end() - 1)
        if end is not None and end - box.end() <= MAX_ANSWER:
            return text[box.end() : end]
    return None


def _stated(text: str) -> str | None:
    """The rest of the sentence after the last "answer is"."""
    matches = list(_STATED.finditer(text))
    if not matches:
        return None
    last = matches[-1]
    rest = text[last.end() : last.end() + MAX_ANSWER].split("\n")[0]
    inline = re.match(r"\s*\$([^$]+)\$|\s*\\\(([^$]+?)\\\)", rest)
    if inline:
        return inline.group(1) or inline.group(2)
    return _sentence(rest).strip(" *:`")


def _sentence(text: str) -> str:
    """Up to the first end of a sentence or clause outside brackets: "(1, 2), as shown" is "(1, 2)"."""
    for end in _SENTENCE_END.finditer(text):
        head = text[: end.start()]
        if sum(map(head.count, "([{")) <= sum(map(head.count, ")]}")):
            return head
    return text


def _math(text: str) -> str | None:
    found = boxed(text)
    if found is not None:
        return found
    stated = _stated(text)
    # A sentence after "the answer is" is an explanation, not an answer: "the answer is 12 apples because" means 12.
    if stated and " " in stated and not re.search(r"[\\^_=+*/(){}\[\]]", stated):
        first = _NUMBER.search(stated)
        return first.group() if first else None
    return stated


def _number(text: str) -> str | None:
    inside = boxed(text)
    found = _NUMBER.findall(inside if inside is not None else text)
    return str(found[-1]) if found else None


def _choice(text: str, letters: str = "ABCD") -> str | None:
    """A letter said to be the answer, else the last one standing alone; never the article "a" or a capitalised "A cat"."""
    if not isinstance(letters, str) or not letters.isalpha() or letters != letters.upper():
        raise ValueError(f"letters must be capital letters such as 'ABCD', got {letters!r}")
    one = f"[{letters}]"
    # A letter before a lower-case word is the subject of a sentence ("Option B is wrong") or an article ("A cat").
    no_word = r"(?!\s{1,4}(?!(?:because|since|as)\b)[a-z])"
    inside = boxed(text)
    if inside is not None:
        match = re.match(rf"\s*(?:\\text\{{)?\(?({one})(?![\w']){no_word}", inside)
        return match.group(1) if match else None
    # Bounded repeats: unbounded ones next to each other take time that grows with a power of the text.
    stated = re.findall(
        rf"(?i:answer|choice|option)\s{{0,4}}(?i:is|:|=)?\s{{0,4}}:?\s{{0,4}}\*{{0,3}}\(?({one})\)?(?![\w']){no_word}",
        text,
    )
    if stated:
        return str(stated[-1])
    alone = re.findall(rf"\(({one})\)|(?<![\w'])({one})(?=[.):]|\s*$|\s*\n)", text)
    return next((first or second for first, second in reversed(alone)), None)


def _label(text: str, labels: Sequence[str] = (), which: str = "first") -> str | None:
    """A whole word (or phrase) of the closed set, as the set spells it; case does not matter."""
    words_only = not isinstance(labels, str) and all(isinstance(label, str) and label.strip() for label in labels)
    if not labels or not words_only or which not in ("first", "last"):
        raise ValueError("the label extractor needs labels: [word, ...] and which: first | last")
    spelled = {label.casefold(): label for label in labels}
    words = "|".join(re.escape(label) for label in sorted(spelled, key=len, reverse=True))
    found = re.findall(rf"(?<!\w)(?:{words})(?!\w)", text.casefold())
    return spelled[found[0 if which == "first" else -1]] if found else None


_KINDS: dict[str, Callable[..., str | None]] = {
    "math": _math, "number": _number, "choice": _choice, "label": _label, "json": json_answer, "box": box_answer,
    "point": point_answer,
}  # fmt: skip
KINDS = tuple(sorted([*_KINDS, "regex"]))
"""Names of the extractors."""
