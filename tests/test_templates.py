from __future__ import annotations

from pathlib import Path

import pytest
from helpers import FakeTokenizer

from ttrl.errors import ConfigError
from ttrl.templates import INSTRUCTIONS, NAMES, check_template, render
from ttrl.types import Message


def turns(*pairs: tuple[str, str]) -> list[Message]:
    return [Message(role=role, content=content) for role, content in pairs]


ONE = turns(("user", "1+1="))


def shown(messages: list[Message], template: str) -> str:
    tokenizer = FakeTokenizer()
    return tokenizer.decode(render(messages, tokenizer, template))


def test_raw_encodes_the_text_with_the_special_tokens_of_the_tokenizer() -> None:
    assert shown(ONE, "raw") == "<s>1+1="


def test_chat_leaves_the_special_tokens_to_the_chat_template() -> None:
    # a second beginning-of-sequence token is a well-known way to lose accuracy
    assert shown(ONE, "chat") == "<user>1+1=<assistant>"


@pytest.mark.parametrize("template", ["boxed", "choice"])
def test_instructions_end_the_last_user_turn(template: str) -> None:
    assert shown(ONE, template) == f"<user>1+1={INSTRUCTIONS[template]}<assistant>"
    talk = turns(("system", "s"), ("user", "u1"), ("assistant", "a"), ("user", "u2"), ("assistant", "so"))
    expected = f"<system>s<user>u1<assistant>a<user>u2{INSTRUCTIONS[template]}<assistant>so<assistant>"
    assert shown(talk, template) == expected


def test_instructions_name_what_the_extractor_reads() -> None:
    assert r"\boxed{" in INSTRUCTIONS["boxed"]
    assert "The answer is (X)" in INSTRUCTIONS["choice"]


def test_without_a_user_turn_the_last_turn_takes_the_instruction() -> None:
    assert shown(turns(("system", "s"), ("tool", "t")), "boxed").endswith(f"<tool>t{INSTRUCTIONS['boxed']}<assistant>")


def test_rendering_does_not_change_the_messages() -> None:
    before = list(ONE)
    render(ONE, FakeTokenizer(), "boxed")
    assert before == ONE == turns(("user", "1+1="))


def test_a_text_file_is_filled_once_and_literally(tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    file.write_text("Q: {prompt}\n{other} A:", encoding="utf-8")
    check_template(str(file))
    # a prompt may contain the slot, braces and backslashes; none of them is a pattern
    assert shown(turns(("user", r"{prompt} \1 {0}")), str(file)) == "<s>Q: {prompt} \\1 {0}\n{other} A:"


@pytest.mark.parametrize("template", ["raw", "file"])
def test_plain_text_takes_one_turn_only(tmp_path: Path, template: str) -> None:
    if template == "file":
        template = str(tmp_path / "t.txt")
        Path(template).write_text("{prompt}", encoding="utf-8")
    with pytest.raises(ConfigError, match="takes prompts of one turn; use chat"):
        render(turns(("system", "s"), ("user", "u")), FakeTokenizer(), template)


@pytest.mark.parametrize("template", ["chat", "boxed", "choice"])
def test_a_tokenizer_without_a_chat_template_is_an_error(template: str) -> None:
    with pytest.raises(ConfigError, match=f"data.template '{template}' needs a chat template"):
        render(ONE, FakeTokenizer(chat=False), template)
    assert FakeTokenizer(chat=False).decode(render(ONE, FakeTokenizer(chat=False), "raw")) == "<s>1+1="


@pytest.mark.parametrize("template", NAMES)
def test_every_built_in_template_passes_the_check(template: str) -> None:
    check_template(template)


@pytest.mark.parametrize(
    ("text", "message"),
    [("no slot", "exactly once, it does 0 times"), ("{prompt}{prompt}", "exactly once, it does 2 times")],
)
def test_a_text_file_needs_exactly_one_slot(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        check_template(str(tmp_path / "t.txt"))


def test_wrong_templates_are_errors(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"unknown template 'boxd'\. Did you mean 'boxed'\? A file of your own ends in \.txt"
    ):
        check_template("boxd")
    with pytest.raises(ConfigError, match=r"missing\.txt cannot be read: No such file"):
        check_template(str(tmp_path / "missing.txt"))
    (tmp_path / "latin.txt").write_bytes(b"\xff{prompt}")
    with pytest.raises(ConfigError, match=r"latin\.txt is not UTF-8 text"):
        check_template(str(tmp_path / "latin.txt"))
