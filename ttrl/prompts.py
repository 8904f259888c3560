"""Reading unlabelled prompts: JSONL, JSON, CSV, Parquet or a hub data set -> records -> token ids.

A column that looks like an answer is not refused and not read: only the id, the prompt and what `data.keep` names leave this file,
and `data.keep` may not name an answer.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from ttrl.config.explain import suggest
from ttrl.config.load import bundled
from ttrl.errors import ConfigError
from ttrl.pictures import find_images, place_images
from ttrl.templates import render, render_images
from ttrl.types import ImageFile, Message, Prompt

if TYPE_CHECKING:
    from ttrl.model.load import Tokenizer
    from ttrl.model.processor import Pictures

ROLES = ("system", "user", "assistant", "tool")
ANSWERS = frozenset({"answer", "answers", "label", "labels", "solution", "gold", "ground_truth", "target", "bbox"})
"""Columns that hold reference answers; they never become part of a prompt."""
UTF8 = "utf-8-sig"
"""With or without the byte order mark that spreadsheets write."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRecord:
    """A prompt before any tokenizer was loaded."""

    id: str
    messages: tuple[Message, ...]
    meta: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """The columns that `data.keep` names."""
    images: tuple[ImageFile, ...] = ()
    """Their marks stand in the messages."""

    @property
    def content(self) -> tuple[Any, ...]:
        """What was asked, pictures included: equal for two records that are the same question."""
        return (self.messages, tuple(image.digest for image in self.images))


Row = tuple[str, Mapping[str, Any]]
"""Where the row stands ("file:line") and its columns."""


def read_prompts(
    path: str, *, prompt_field: str = "prompt", id_field: str = "id", images_field: str | None = "images",
    limit: int | None = None, keep: Sequence[str] = (),
) -> list[PromptRecord]:  # fmt: skip
    """All prompts of a file, `bundled:` file or `hub:` data set, in order.

    A row has `prompt` (text, or a list of {role, content} turns) and may have an `id`; without one the id is a hash of the
    content. It may have `images`: a path or paths of pictures, relative to the file and inside its folder (see `ttrl.pictures`).
    `keep` names columns that become the prompt's `meta`. Raises ConfigError naming file and line for broken rows and pictures, empty
    prompts, duplicate ids and kept columns that a row lacks, and for a kept column that holds answers.
    """
    told = sorted(ANSWERS & {name.casefold() for name in keep})
    if told:
        raise ConfigError(f"data.keep names {', '.join(told)}: answers stay in the file that eval.labels names")
    records: list[PromptRecord] = []
    seen: dict[str, str] = {}
    folder = None if path.startswith("hub:") else (bundled(path) or Path(path)).parent
    for where, row in read_rows(path):
        images = find_images(where, row.get(images_field), folder) if images_field is not None else ()
        record = _record(where, row, prompt_field, id_field, keep, images)
        if record.id in seen:
            hint = (
                ""
                if row.get(id_field) not in (None, "")
                else " (rows without an id are identified by their content, so this is the same prompt again)"
            )
            raise ConfigError(f"{where}: duplicate id {record.id!r}, first used at {seen[record.id]}{hint}")
        seen[record.id] = where
        records.append(record)
        if limit is not None and len(records) == limit:
            break
    if not records:
        raise ConfigError(f"{path}: contains no prompts")
    return records


def read_rows(path: str) -> Iterator[Row]:
    """Rows of any supported format. Raises ConfigError for missing or unreadable files, with the line for broken ones."""
    if path.startswith("hub:"):
        yield from _hub(path.removeprefix("hub:"))
        return
    file = bundled(path) or Path(path)
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise ConfigError(
            f"{path}: unknown format {file.suffix!r}; use {', '.join(_READERS)}, hub:NAME or bundled:NAME"
        )
    if not file.is_file():
        near = (
            suggest(file.name, [f.name for f in file.parent.iterdir()])
            if file.parent.is_dir()
            else " Its folder does not exist either."
        )
        raise ConfigError(f"{path}: no such file.{near}")
    try:
        yield from reader(file)
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None


def tokenize(
    records: Iterable[PromptRecord], tokenizer: Tokenizer, template: str, max_tokens: int | None,
    pictures: Pictures | None = None,
) -> list[Prompt]:  # fmt: skip
    """Apply the template and encode. Raises ConfigError for a prompt that is empty or longer than `max_tokens`.

    `pictures` (`ttrl.model.processor.open_pictures`) are needed when a record has some.
    """
    prompts = []
    for record in records:
        if pictures is None:
            if record.images:
                raise ConfigError(
                    f"prompt {record.id!r} has images, which are not read here; data.images_field: null leaves them out"
                )
            ids = marked = render(record.messages, tokenizer, template)
        else:
            try:
                ids, marked = render_images(record.messages, tokenizer, template, pictures, record.images)
            except ConfigError as error:
                raise ConfigError(f"prompt {record.id!r}: {error}") from None
        if not ids:
            raise ConfigError(f"prompt {record.id!r} has no tokens after template {template!r}")
        if max_tokens is not None and len(ids) > max_tokens:
            raise ConfigError(
                f"prompt {record.id!r} has {len(ids)} tokens, more than data.max_prompt_tokens = {max_tokens}; "
                "raise the limit or remove the prompt (prompts are never cut)"
            )
        prompts.append(
            Prompt(
                id=record.id, messages=record.messages, token_ids=np.asarray(ids, np.int32), images=record.images,
                marked_ids=np.asarray(marked, np.int32) if record.images else None, meta=record.meta,
            )
        )  # fmt: skip
    return prompts


def check_room(prompts: Iterable[Prompt], max_new_tokens: int, max_positions: int | None) -> None:
    """Raises ConfigError naming the prompts that leave no room for `max_new_tokens` in the model's positions."""
    if max_positions is None:
        return
    long = [p for p in prompts if len(p.token_ids) + max_new_tokens > max_positions]
    if long:
        worst = max(len(p.token_ids) for p in long)
        shown = ", ".join(repr(p.id) for p in long[:3]) + (", ..." if len(long) > 3 else "")
        raise ConfigError(
            f"{len(long)} prompts ({shown}; the longest has {worst} tokens) and {max_new_tokens} new tokens do not fit into the "
            f"{max_positions} positions of the model; lower max_new_tokens or remove these prompts"
        )


def _record(
    where: str,
    row: Mapping[str, Any],
    prompt_field: str,
    id_field: str,
    keep: Sequence[str],
    images: tuple[ImageFile, ...],
) -> PromptRecord:
    if prompt_field not in row:
        raise ConfigError(
            f"{where}: no field {prompt_field!r}.{suggest(prompt_field, row)} (data.prompt_field names it)"
        )
    messages = place_images(where, _messages(where, row[prompt_field]), len(images))
    identifier = row.get(id_field)
    if identifier is None or identifier == "":
        turns: list[Any] = [[m.role, m.content] for m in messages]
        content = json.dumps(turns + [image.digest for image in images], ensure_ascii=False)
        identifier = hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
    if not isinstance(identifier, str | int) or isinstance(identifier, bool):
        raise ConfigError(f"{where}: the id must be text or a whole number, got {identifier!r}")
    _check_encodable(where, str(identifier))
    absent = [name for name in keep if name not in row]
    if absent:
        raise ConfigError(f"{where}: no field {absent[0]!r}.{suggest(absent[0], row)} (data.keep names it)")
    meta = MappingProxyType({name: row[name] for name in keep})
    return PromptRecord(id=str(identifier), messages=messages, meta=meta, images=images)


def _messages(where: str, value: Any) -> tuple[Message, ...]:
    turns = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if not isinstance(turns, list) or not turns:
        raise ConfigError(f"{where}: a prompt is text or a list of turns, got {type(value).__name__}")
    messages = []
    for turn in turns:
        if not isinstance(turn, Mapping) or not isinstance(turn.get("content"), str) or turn.get("role") not in ROLES:
            raise ConfigError(f"{where}: a turn needs a role ({', '.join(ROLES)}) and text as content")
        messages.append(Message(role=turn["role"], content=turn["content"]))
        _check_encodable(where, turn["content"])
    if not any(message.content.strip() for message in messages):
        raise ConfigError(f"{where}: the prompt is empty")
    return tuple(messages)


def _check_encodable(where: str, text: str) -> None:
    """JSON can spell lone surrogates, which no tokenizer and no UTF-8 file takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where}: {text[error.start]!r} is half of a surrogate pair, which is not text") from None


def _jsonl(file: Path) -> Iterator[Row]:
    with file.open(encoding=UTF8) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            value = _parse(file, number, line.rstrip())
            if not isinstance(value, dict):
                raise ConfigError(f"{file}:{number}: each line must be a JSON object, got {type(value).__name__}")
            yield f"{file}:{number}", value


def _json(file: Path) -> Iterator[Row]:
    value = _parse(file, 1, file.read_text(encoding=UTF8))
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise ConfigError(f"{file}: must hold a list of objects (one object per line is .jsonl)")
    yield from ((f"{file}[{index}]", row) for index, row in enumerate(value))


def _parse(file: Path, line: int, text: str) -> Any:
    """The JSON value that starts at `line` of the file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{file}:{line + error.lineno - 1}:{error.colno}"
        raise ConfigError(f"{place}: not valid JSON: {error.msg}") from None
    except RecursionError:
        raise ConfigError(f"{file}:{line}: nested too deeply") from None
    except ValueError:  # Python reads no integers of thousands of digits
        raise ConfigError(f"{file}:{line}: a number has too many digits") from None


def _csv(file: Path) -> Iterator[Row]:
    with file.open(encoding=UTF8, newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise ConfigError(f"{file}:{reader.line_num}: the number of columns differs from the header's")
                yield f"{file}:{reader.line_num}", row
        except csv.Error as error:
            # DictReader's own line_num stops at the last row that could be read
            raise ConfigError(f"{file}:{reader.reader.line_num}: not valid CSV: {error}") from None


def _parquet(file: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(f"{file}: reading Parquet needs pyarrow: pip install 'ttrl[data]'") from None
    try:
        table = pyarrow.parquet.read_table(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"{file}: not a readable Parquet file: {str(error).splitlines()[0]}") from None
    yield from ((f"{file}[{index}]", row) for index, row in enumerate(table.to_pylist()))


def _hub(name: str) -> Iterator[Row]:
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            f"hub:{name}: reading hub data sets needs the package datasets: pip install 'ttrl[data]'"
        ) from None
    repository, _, split = name.partition("#")
    try:
        data = datasets.load_dataset(repository, split=split or "train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error.__cause__ or error).strip() or type(error).__name__
        raise ConfigError(f"hub:{name}: cannot be loaded: {reason.splitlines()[0]}") from None
    yield from ((f"hub:{name}[{index}]", row) for index, row in enumerate(data))


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
