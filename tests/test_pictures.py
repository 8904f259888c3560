"""Pictures of prompts: where they may lie, what may be in them, and where they stand in the text."""

from __future__ import annotations

import json
import os
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_images import TEMPLATE, TOKENS, image_tokenizer, picture, save_tiny_llava
from PIL import Image

from ttrl.errors import ConfigError
from ttrl.pictures import MAX_BYTES, MAX_PIXELS, find_images, open_image, parts_of, place_images
from ttrl.prompts import PromptRecord, read_prompts, tokenize
from ttrl.report.thumbs import thumbs
from ttrl.report.votemap import vote_map
from ttrl.types import ImageFile, Message


def write(folder: Path, *rows: dict[str, Any]) -> str:
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": "what?", **row}) + "\n" for row in rows))
    return str(file)


def said(records: list[PromptRecord]) -> list[str]:
    return [record.messages[-1].content for record in records]


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_a_path_or_a_list_of_paths(tmp_path: Path, ending: str) -> None:
    file = picture(tmp_path / "in" / f"a.{ending}")
    records = read_prompts(
        write(
            tmp_path,
            {"images": f"in/a.{ending}"},
            {"images": [f"in/a.{ending}"] * 2},
            {"images": []},
            {},
            {"images": None},
        )[:],
        limit=3,
    )
    assert [len(record.images) for record in records] == [1, 2, 0]
    assert records[0].images[0].path == str(file.resolve())
    assert said(records) == ["<image>what?", "<image><image>what?", "what?"]
    with open_image(records[0].images[0]) as image:
        assert (image.mode, image.size) == ("RGB", (20, 14))


def test_bundled_and_csv_prompt_files_have_pictures_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(tmp_path / "eyes" / "pictures" / "a.png")
    (tmp_path / "eyes" / "p.csv").write_text("id,prompt,images\n1,what?,pictures/a.png\n2,why?,\n")
    monkeypatch.setattr("ttrl.config.load.ASSETS", tmp_path)
    for path in (str(tmp_path / "eyes" / "p.csv"), "bundled:eyes/p.csv"):
        assert [len(record.images) for record in read_prompts(path)] == [1, 0]


def test_the_column_can_have_another_name_or_be_left_alone(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    file = write(tmp_path, {"shown": "a.png", "images": 7})
    assert len(read_prompts(file, images_field="shown")[0].images) == 1
    assert read_prompts(file, images_field=None)[0].images == ()
    with pytest.raises(
        ConfigError, match=r"prompts\.jsonl:1: images are a path or a list of paths.*data\.images_field"
    ):
        read_prompts(file)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("../out.png", "stay inside its folder"), ("in/../../out.png", "stay inside its folder"), ("/etc/passwd", "stay inside"),
        ("C:\\out.png", "stay inside its folder"), ("\\\\host\\share\\out.png", "stay inside its folder"), ("a\0.png", "stay inside"),
        ("link.png", "a link that leads out"), ("linked/out.png", "a link that leads out"), ("loop.png", "loop|no such file"),
        ("missing.png", "no such file"), ("in", "no such file"), ("x" * 3000, "cannot be read"), ("text.png", "not a PNG, JPEG, WEBP"),
        ("a.gif", "not a PNG, JPEG, WEBP"), ("gif.png", "not a PNG, JPEG, WEBP"), ("empty.png", "not a PNG, JPEG, WEBP"),
        ("cut.png", "cannot be decoded"), ("cut.jpg", "cannot be decoded"),
    ],
)  # fmt: skip
def test_what_is_not_a_picture_inside_the_folder_is_refused_with_its_line(
    tmp_path: Path, name: str, words: str
) -> None:
    outside = picture(tmp_path / "out" / "out.png", size=(64, 64))
    folder = tmp_path / "set"
    picture(folder / "in" / "a.png", size=(64, 64))
    (folder / "link.png").symlink_to(outside)
    (folder / "linked").symlink_to(outside.parent)
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "text.png").write_text("no picture")
    (folder / "empty.png").write_bytes(b"")
    Image.new("RGB", (4, 4)).save(folder / "a.gif")
    (folder / "gif.png").write_bytes((folder / "a.gif").read_bytes())
    for ending in ("png", "jpg"):
        whole = picture(folder / f"whole.{ending}", size=(64, 64)).read_bytes()
        (folder / f"cut.{ending}").write_bytes(whole[: len(whole) // 2])
    file = write(folder, {"id": "fine", "images": "in/a.png"}, {"id": "bad", "images": [name]})
    with pytest.raises(ConfigError, match=words) as raised:
        read_prompts(file)
    assert "prompts.jsonl:2: picture" in str(raised.value)


def test_a_link_that_stays_inside_is_followed(tmp_path: Path) -> None:
    picture(tmp_path / "in" / "a.png")
    (tmp_path / "b.png").symlink_to("in/a.png")
    assert read_prompts(write(tmp_path, {"images": "b.png"}))[0].images[0].path == str(
        (tmp_path / "in" / "a.png").resolve()
    )


def bomb(width: int, height: int) -> bytes:
    """A PNG that says it has so many pixels, in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [1 << 13, 1 << 15, 1 << 20])
def test_a_decompression_bomb_is_seen_before_it_is_decoded(
    tmp_path: Path, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(bomb(side, side))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(
        ConfigError, match=rf"prompts\.jsonl:1: picture 'a\.png': .*more.* than the limit of {MAX_PIXELS}"
    ):
        read_prompts(write(tmp_path, {"images": "a.png"}))


def test_a_file_that_is_too_large_is_not_read_whole(tmp_path: Path) -> None:
    with (tmp_path / "a.png").open("wb") as file:
        os.truncate(file.fileno(), MAX_BYTES + 1)
    with pytest.raises(ConfigError, match="more than 64 MiB"):
        read_prompts(write(tmp_path, {"images": "a.png"}))


def test_pictures_count_in_ids_and_in_what_is_held_out(tmp_path: Path) -> None:
    for i in range(2):
        picture(tmp_path / f"{i}.png", seed=i)
    records = read_prompts(write(tmp_path, {"images": "0.png"}, {"images": "1.png"}, {}))
    assert len({record.id for record in records}) == len({record.content for record in records}) == 3
    picture(tmp_path / "2.png", seed=0)
    with pytest.raises(ConfigError, match="same prompt again"):
        read_prompts(write(tmp_path, {"images": "0.png"}, {"images": "2.png"}))


def test_a_picture_taken_sideways_is_turned(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    [image] = find_images("x", picture(tmp_path / "a.jpg", size=(20, 14), exif=exif).name, tmp_path)
    assert open_image(image).size == (14, 20)


def turns(*contents: str) -> tuple[Message, ...]:
    roles = ("system", "user", "assistant", "user")
    return tuple(Message(role=role, content=content) for role, content in zip(roles, contents, strict=False))


def test_marks_say_where_pictures_stand() -> None:
    plain = turns("be brief", "left", "yes", "right")
    assert place_images("x", plain, 0) == plain
    assert place_images("x", plain, 2) == turns("be brief", "<image><image>left", "yes", "right")
    marked = turns("be brief", "a<image>b", "yes", "<image>")
    assert place_images("x", marked, 2) == marked
    assert place_images("x", marked, 0) == marked  # a text that speaks of <image>
    with pytest.raises(ConfigError, match="x: the text has 2 <image> marks for 3 pictures"):
        place_images("x", marked, 3)
    assert parts_of("a<image><image>b") == [
        {"type": "text", "text": "a"},
        {"type": "image"},
        {"type": "image"},
        {"type": "text", "text": "b"},
    ]
    assert parts_of("") == []


class Places:
    """Pictures without a model: the image token of a text becomes two tokens."""

    image_token = "<image>"

    def __init__(self) -> None:
        self.tokenizer = image_tokenizer()

    def encode(self, text: str, images: Any, *, add_special_tokens: bool) -> tuple[list[int], list[int]]:
        ids = list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens))
        return ids, ids


@pytest.mark.parametrize("template", ["chat", "boxed", "raw", "file"])
def test_every_template_places_pictures(tmp_path: Path, template: str) -> None:
    if template == "file":
        template = str(tmp_path / "t.txt")
        Path(template).write_text("q: {prompt} a:")
    record = PromptRecord(
        id="a", messages=(Message(role="user", content="one<image>two"),), images=(ImageFile(path="p", digest="d"),)
    )
    places: Any = Places()
    tokenizer: Any = places.tokenizer
    [made] = tokenize([record], tokenizer, template, None, places)
    text = tokenizer.decode(made.token_ids)
    assert "one<image>two" in text and text.count("<image>") == 1
    assert text.startswith("<s>") == (template in ("chat", "boxed"))
    assert made.images == record.images


def test_image_tokens_are_counted_and_cannot_be_forged(tmp_path: Path) -> None:
    from ttrl.model.processor import open_pictures

    processor = open_pictures(str(save_tiny_llava(tmp_path / "m")))
    picture(tmp_path / "a.png")
    tokenizer: Any = image_tokenizer()
    records = read_prompts(
        write(tmp_path, {"images": ["a.png", "a.png"], "prompt": "l<image>r<image>"}, {"prompt": "plain"})
    )
    two, plain = tokenize(records, tokenizer, "chat", None, processor)
    image = processor.image_token_id
    assert int((two.token_ids == image).sum()) == 2 * TOKENS
    assert not (plain.token_ids == image).any() and plain.marked_ids is None
    assert two.marked_ids is not None and int((two.marked_ids == image).sum()) == 2
    np.testing.assert_array_equal(two.marked_ids[two.marked_ids != image], two.token_ids[two.token_ids != image])
    np.testing.assert_array_equal(plain.token_ids, tokenize(records[1:], tokenizer, "chat", None)[0].token_ids)
    blind: Any = image_tokenizer()
    blind.chat_template = "{% for message in messages %}hello{% endfor %}"
    with pytest.raises(
        ConfigError, match=r"prompt '.*': .* has 0 image tokens .* for 2 pictures: the template does not place"
    ):
        tokenize(records[:1], blind, "chat", None, processor)
    forged = read_prompts(write(tmp_path, {"prompt": "look at <image>"}))
    with pytest.raises(ConfigError, match=r"prompt '.*': .*has 1 image tokens .* for 0 pictures"):
        tokenize(forged, tokenizer, "raw", None, processor)
    with pytest.raises(ConfigError, match=f"has {2 * TOKENS + 4} tokens, more than data.max_prompt_tokens"):
        tokenize(records[:1], tokenizer, "chat", 20, processor)
    assert "<image>" in TEMPLATE


def test_thumbs_are_small_and_missing_files_leave_their_name(tmp_path: Path) -> None:
    [image] = find_images("x", picture(tmp_path / "a&b.png", size=(1000, 500)).name, tmp_path)
    group = {
        "images": [{"path": image.path, "digest": image.digest}, {"path": str(tmp_path / "gone.png"), "digest": "0"}]
    }
    shown, gone = thumbs(group)
    assert (gone.name, gone.data) == ("gone.png", None)
    assert shown.data is not None and re.fullmatch(r"data:image/png;base64,[A-Za-z0-9+/=]+", shown.data)
    regions = {"screen": [1000, 500], "label": "[1,2,30,40]", "rollouts": [{"answer": "[1,2,30,40]"}]}
    assert str(vote_map(regions, shown.data)).count("<image href=") == 1
    assert "<image" not in str(vote_map(regions))
