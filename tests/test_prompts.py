from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import FakeTokenizer, ends_at_all

from ttrl.errors import ConfigError
from ttrl.prompts import PromptRecord, read_prompts, read_rows, tokenize
from ttrl.types import Message

ROWS: list[dict[str, Any]] = [{"id": "a", "prompt": "1+1="}, {"id": "b", "prompt": "2+2=\nzwölf?"}]
EXPECTED = [
    PromptRecord(id="a", messages=(Message(role="user", content="1+1="),)),
    PromptRecord(id="b", messages=(Message(role="user", content="2+2=\nzwölf?"),)),
]


def write(path: Path, text: str, encoding: str = "utf-8") -> str:
    path.write_bytes(text.encode(encoding))
    return str(path)


def lines(path: Path, rows: list[Any]) -> str:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def parquet(path: Path, rows: list[dict[str, Any]]) -> str:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def fails(path: str, message: str, **options: Any) -> str:
    with pytest.raises(ConfigError, match=message) as raised:
        read_prompts(path, **options)
    return str(raised.value)


# formats


def test_jsonl(tmp_path: Path) -> None:
    assert read_prompts(lines(tmp_path / "p.jsonl", ROWS)) == EXPECTED


def test_jsonl_skips_blank_lines_and_takes_any_line_end(tmp_path: Path) -> None:
    text = "\n" + "\r\n  \n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    assert read_prompts(write(tmp_path / "p.jsonl", text)) == EXPECTED


def test_json(tmp_path: Path) -> None:
    assert read_prompts(write(tmp_path / "p.json", json.dumps(ROWS, indent=1))) == EXPECTED


def test_csv_with_quotes_and_line_breaks(tmp_path: Path) -> None:
    assert read_prompts(write(tmp_path / "p.csv", 'prompt,id,answer\n1+1=,a,2\n"2+2=\nzwölf?",b,4\n')) == EXPECTED


def test_parquet(tmp_path: Path) -> None:
    assert read_prompts(parquet(tmp_path / "p.parquet", ROWS)) == EXPECTED


def test_the_suffix_may_be_upper_case(tmp_path: Path) -> None:
    assert read_prompts(lines(tmp_path / "P.JSONL", ROWS)) == EXPECTED


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path: Path, suffix: str) -> None:
    text = {
        "jsonl": '{"prompt": "hi", "id": "a"}',
        "json": '[{"prompt": "hi", "id": "a"}]',
        "csv": "prompt,id\nhi,a\n",
    }[suffix]
    [record] = read_prompts(write(tmp_path / f"p.{suffix}", text, "utf-8-sig"))
    assert (record.id, record.messages[0].content) == ("a", "hi")


def test_a_local_folder_of_the_hub_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    lines(folder / "train.jsonl", ROWS)
    lines(folder / "test.jsonl", [{"id": "t", "prompt": "other"}])
    assert read_prompts(f"hub:{folder}") == EXPECTED
    assert read_prompts(f"hub:{folder}#train") == EXPECTED
    assert [record.id for record in read_prompts(f"hub:{folder}#test")] == ["t"]
    fails(f"hub:{folder}#nope", r"^hub:.*#nope: cannot be loaded: .*nope")
    fails(f"hub:{folder}", r"^hub:.*data\[0\]: no field 'question'", prompt_field="question")
    fails(f"hub:{tmp_path / 'missing'}", "cannot be loaded")


def test_a_broken_hub_data_set_shows_the_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    lines(folder / "train.jsonl", [{"id": "a", "prompt": "x"}])
    lines(folder / "test.jsonl", [{"id": "b", "prompt": [{"role": "user", "content": "another schema"}]}])
    message = fails(f"hub:{folder}", "cannot be loaded")
    assert "An error occurred while generating the dataset" not in message


# records


def test_chat_turns(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi", "name": "ignored"}]
    for path in (
        lines(tmp_path / "p.jsonl", [{"prompt": turns}]),
        parquet(tmp_path / "p.parquet", [{"prompt": turns}]),
    ):
        [record] = read_prompts(path)
        assert record.messages == (Message(role="system", content="Be brief."), Message(role="user", content="Hi"))


def test_other_columns_are_not_kept(tmp_path: Path) -> None:
    plain = read_prompts(lines(tmp_path / "plain.jsonl", [{"prompt": "x"}]))
    labelled = read_prompts(lines(tmp_path / "labelled.jsonl", [{"prompt": "x", "answer": "secret", "label": 1}]))
    assert plain == labelled
    assert "secret" not in repr(labelled)


def test_without_an_id_the_content_is_the_id(tmp_path: Path) -> None:
    rows = [{"prompt": "x"}, {"prompt": "y", "id": ""}, {"prompt": "z", "id": None}, {"prompt": "w", "id": 7}]
    records = read_prompts(lines(tmp_path / "p.jsonl", rows))
    # pinned: seeds hang on ids, so a changed hash changes runs
    assert [r.id for r in records] == ["0f75bc7fdae44579", "990b70cc9b8a0c7f", "304f6c13083f9e1a", "7"]
    as_turns = read_prompts(lines(tmp_path / "q.jsonl", [{"prompt": [{"role": "user", "content": "x"}]}]))
    assert as_turns[0].id == records[0].id


def test_fields_can_be_renamed(tmp_path: Path) -> None:
    path = lines(tmp_path / "p.jsonl", [{"question": "x", "key": "k", "id": "not used"}])
    assert read_prompts(path, prompt_field="question", id_field="key")[0].id == "k"


def test_the_limit_stops_reading(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", '{"prompt": "x"}\n{"prompt": "y"}\nbroken\n')
    assert len(read_prompts(path, limit=2)) == 2
    fails(path, "p.jsonl:3:1: not valid JSON")


# errors


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "x"}\n{"prompt": }\n', r"p\.jsonl:2:12: not valid JSON: Expecting value$"),
        ('{"prompt": "x"\n', r"p\.jsonl:1:15: not valid JSON: Expecting ',' delimiter$"),
        ("\n\n[1]\n", r"p\.jsonl:3: each line must be a JSON object, got list$"),
        ('{"text": "x"}', r"p\.jsonl:1: no field 'prompt'\..* \(data\.prompt_field names it\)$"),
        ('{"promt": "x"}', r"p\.jsonl:1: no field 'prompt'\. Did you mean 'promt'\?"),
        ('{"prompt": 5}', r"p\.jsonl:1: a prompt is text or a list of turns, got int$"),
        ('{"prompt": null}', r"p\.jsonl:1: a prompt is text or a list of turns, got NoneType$"),
        ('{"prompt": []}', r"p\.jsonl:1: a prompt is text or a list of turns, got list$"),
        ('{"prompt": ["x"]}', r"p\.jsonl:1: a turn needs a role \(system, user, assistant, tool\)"),
        ('{"prompt": [{"role": "robot", "content": "x"}]}', r"p\.jsonl:1: a turn needs a role"),
        ('{"prompt": [{"role": ["user"], "content": "x"}]}', r"p\.jsonl:1: a turn needs a role"),
        ('{"prompt": [{"role": "user", "content": null}]}', r"p\.jsonl:1: a turn needs a role"),
        ('{"prompt": " \\n"}', r"p\.jsonl:1: the prompt is empty$"),
        ('{"prompt": [{"role": "user", "content": ""}]}', r"p\.jsonl:1: the prompt is empty$"),
        ('{"prompt": "x", "id": 1.5}', r"p\.jsonl:1: the id must be text or a whole number, got 1\.5$"),
        ('{"prompt": "x", "id": true}', r"p\.jsonl:1: the id must be text or a whole number, got True$"),
        ('{"prompt": "x", "id": NaN}', r"p\.jsonl:1: the id must be text or a whole number, got nan$"),
        ('{"prompt": "x", "id": {}}', r"p\.jsonl:1: the id must be"),
        ('{"prompt": "x", "id": 1}\n\n{"prompt": "y", "id": "1"}', r"p\.jsonl:3: duplicate id '1', .*p\.jsonl:1$"),
        ('{"prompt": "x"}\n{"prompt": "x"}', r"p\.jsonl:2: duplicate id '\w+', .*p\.jsonl:1 \(rows without an id"),
        ('{"prompt": "x\\ud800"}', r"p\.jsonl:1: '\\ud800' is half of a surrogate pair"),
        ('{"prompt": "x", "id": "\\udfff"}', r"p\.jsonl:1: '\\udfff' is half of a surrogate pair"),
        ('{"prompt": "x", "id": ' + "1" * 5000 + "}", r"p\.jsonl:1: a number has too many digits$"),
        ('{"prompt": ' + "[" * 100_000, r"p\.jsonl:1: nested too deeply$"),
        ("", r"p\.jsonl: contains no prompts$"),
        ("\n \n", r"p\.jsonl: contains no prompts$"),
    ],
)  # fmt: skip
def test_jsonl_errors_name_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    fails(write(tmp_path / "p.jsonl", text), f"^{re.escape(str(tmp_path))}/{message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"prompt": "x"},\n {"prompt": ]', r"p\.json:2:13: not valid JSON"),
        ('{"prompt": "x"}', r"p\.json: must hold a list of objects"),
        ('[{"prompt": "x"}, 5]', r"p\.json: must hold a list of objects"),
        ('[{"prompt": "x"}, {"prompt": ""}]', r"p\.json\[1\]: the prompt is empty$"),
        ("[" * 100_000, r"p\.json:1: nested too deeply$"),
        ("[" + "1" * 5000 + "]", r"p\.json:1: a number has too many digits$"),
        ("[]", r"p\.json: contains no prompts$"),
    ],
)
def test_json_errors_name_file_and_place(tmp_path: Path, text: str, message: str) -> None:
    fails(write(tmp_path / "p.json", text), message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt,id\nx,a\ny\n", r"p\.csv:3: the number of columns differs from the header's$"),
        ("prompt,id\nx,a,more\n", r"p\.csv:2: the number of columns differs from the header's$"),
        ('prompt,id\n"x"y,a\n', r"p\.csv:2: not valid CSV"),
        ('prompt,id\n"x', r"p\.csv:2: not valid CSV"),
        ("prompt,id\n" + "x" * 200_000 + ",a\n", r"p\.csv:2: not valid CSV: field larger than field limit"),
        ("question,id\nx,a\n", r"p\.csv:2: no field 'prompt'"),
        ('prompt,id\n"x\nx",a\n,b\n', r"p\.csv:4: the prompt is empty$"),
        ("prompt,id\nx,\nx,\n", r"p\.csv:3: duplicate id .* \(rows without an id"),
        ("prompt,id\n", r"p\.csv: contains no prompts$"),
    ],
)
def test_csv_errors_name_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    fails(write(tmp_path / "p.csv", text), message)


def test_parquet_errors_name_file_and_row(tmp_path: Path) -> None:
    fails(parquet(tmp_path / "p.parquet", [{"prompt": "x"}, {"prompt": None}]), r"p\.parquet\[1\]: a prompt is text")
    fails(write(tmp_path / "q.parquet", "PAR1 this is not Parquet"), r"q\.parquet: not a readable Parquet file: \S")
    fails(write(tmp_path / "r.parquet", ""), r"r\.parquet: not a readable Parquet file: \S")


def test_missing_files_and_unknown_formats(tmp_path: Path) -> None:
    lines(tmp_path / "train.jsonl", ROWS)
    fails(str(tmp_path / "trian.jsonl"), r"trian\.jsonl: no such file\. Did you mean 'train\.jsonl'\?$")
    fails(str(tmp_path / "no" / "x.jsonl"), r"no such file\. Its folder does not exist either\.$")
    (tmp_path / "folder.jsonl").mkdir()
    fails(str(tmp_path / "folder.jsonl"), "no such file")
    fails(
        str(tmp_path / "x.txt"),
        r"unknown format '\.txt'; use \.jsonl, \.json, \.csv, \.parquet, hub:NAME or bundled:NAME$",
    )
    fails("bundled:nothing-of-this-name/p.jsonl", "nothing of that name is bundled. Bundled: ")


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_text_that_is_not_utf8_is_an_error(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"p.{suffix}").write_bytes(b'prompt\n{"prompt": "\xff\xfe"}\n')
    fails(write(tmp_path / f"q.{suffix}", 'prompt\n{"prompt": "x"}', "utf-16"), "is not UTF-8 text$")
    if suffix != "jsonl":  # there the first line fails first
        fails(str(tmp_path / f"p.{suffix}"), rf"p\.{suffix}: is not UTF-8 text$")


def test_a_file_that_cannot_be_opened_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = lines(tmp_path / "p.jsonl", ROWS)

    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    fails(path, r"p\.jsonl: cannot be read: Permission denied$")


def test_a_long_line_is_read_in_linear_time(tmp_path: Path) -> None:
    with ends_at_all():
        [(where, row)] = read_rows(lines(tmp_path / "p.jsonl", [{"prompt": "(" * 1_000_000}]))
    assert where.endswith("p.jsonl:1") and len(row["prompt"]) == 1_000_000


# tokens


def test_tokenize_applies_the_template() -> None:
    prompts = tokenize(EXPECTED, FakeTokenizer(), "raw", None)
    assert [p.id for p in prompts] == ["a", "b"]
    assert prompts[0].token_ids.tolist() == [0] + [ord(c) + 2 for c in "1+1="]
    assert prompts[0].token_ids.dtype == np.int32
    assert prompts[0].messages == EXPECTED[0].messages


def test_a_prompt_at_the_limit_passes_and_one_token_more_is_an_error() -> None:
    assert len(tokenize(EXPECTED[:1], FakeTokenizer(), "raw", 5)[0].token_ids) == 5
    with pytest.raises(
        ConfigError, match=r"prompt 'a' has 5 tokens, more than data.max_prompt_tokens = 4; .* never cut"
    ):
        tokenize(EXPECTED[:1], FakeTokenizer(), "raw", 4)


def test_a_prompt_without_tokens_is_an_error() -> None:
    class Mute(FakeTokenizer):
        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            return []

    with pytest.raises(ConfigError, match="prompt 'a' has no tokens after template 'raw'"):
        tokenize(EXPECTED, Mute(), "raw", None)
