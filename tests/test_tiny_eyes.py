"""The bundled vision-language model: its pictures and labels, the split from what it was trained on, and that it sees."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from ttrl.config import load_recipe
from ttrl.config.load import ASSETS
from ttrl.config.schema import ModelSection
from ttrl.model.processor import open_pictures
from ttrl.prompts import PromptRecord, read_prompts, tokenize
from ttrl.rewards.structured import box_answer, parse_box
from ttrl.rollout.engines import hf
from ttrl.run import run
from ttrl.types import Request, SamplingSpec

FOLDER = ASSETS / "tiny-eyes"
SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
SPLITS = ("train", "heldout")
KEEP = ("image_size", "data_source", "data_type")


@pytest.fixture(scope="module")
def scenes() -> Iterator[ModuleType]:
    sys.path.insert(0, str(SCRIPTS))
    import tiny_scenes

    yield tiny_scenes
    sys.path.remove(str(SCRIPTS))


def records(kind: str, split: str) -> list[PromptRecord]:
    return read_prompts(f"bundled:tiny-eyes/{kind}.{split}.prompts.jsonl", keep=KEEP)


def labels(kind: str, split: str) -> dict[str, str]:
    lines = (FOLDER / f"{kind}.{split}.labels.jsonl").read_text().splitlines()
    return {row["id"]: row["answer"] for row in map(json.loads, lines)}


def picture(record: PromptRecord) -> Image.Image:
    with Image.open(record.images[0].path) as image:
        return image.convert("RGB")


def question(record: PromptRecord) -> str:
    return record.messages[0].content.removeprefix("<image>")


def test_bundled_pictures_are_reserved_and_the_splits_share_none(scenes: ModuleType) -> None:
    seen: list[set[str]] = []
    for split in SPLITS:
        click, choice = records("click", split), records("choice", split)
        assert [r.images for r in click] == [r.images for r in choice]
        assert all(scenes.is_reserved(picture(record)) for record in click)
        seen.append({record.images[0].digest for record in click})
        assert len(seen[-1]) == len(click)
    assert not seen[0] & seen[1]
    rng = random.Random(1)
    assert not any(scenes.is_reserved(scenes.draw_picture(rng, reserved=False)[1]) for _ in range(200))


@pytest.mark.parametrize("split", SPLITS)
def test_a_click_label_is_the_box_of_what_the_prompt_names(scenes: ModuleType, split: str) -> None:
    """Read from the pixels: by colour, the named colour fills that box up to its margin of one and stands nowhere else."""
    right = labels("click", split)
    for record in records("click", split):
        x1, y1, x2, y2 = map(int, parse_box(box_answer(right[record.id]) or ""))
        pixels = np.asarray(picture(record)).astype(int)
        _, name = question(record).split()
        if record.meta["data_type"] == "colour":
            rows, columns = np.nonzero((pixels == scenes.COLOURS[name]).all(2))
        else:
            background = scenes.THEMES[record.meta["data_source"]]
            rows, columns = np.nonzero((pixels[y1:y2, x1:x2] != background).any(2))
            rows, columns = rows + y1, columns + x1
        assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (x1 + 1, y1 + 1, x2 - 1, y2 - 1)


@pytest.mark.parametrize("split", SPLITS)
def test_a_choice_label_is_the_letter_of_a_word_that_is_in_the_picture(scenes: ModuleType, split: str) -> None:
    right = labels("choice", split)
    boxes = labels("click", split)
    for record in records("choice", split):
        options = {letter: word for word, letter in re.findall(r"(\w+) ([A-D])\b", question(record))}
        assert sorted(options) == list("ABCD") and len(set(options.values())) == 4
        word, pixels = options[right[record.id]], np.asarray(picture(record))
        if record.meta["data_type"] == "shape":  # the shape is named, a colour is asked for
            assert (pixels == scenes.COLOURS[word]).all(2).any()
        else:
            named = question(record).split()[-1]
            ys, xs = np.nonzero((pixels == scenes.COLOURS[named]).all(2))
            x, y = xs.min() - 1, ys.min() - 1
            thing = scenes.Thing(word, named, (x, y, x + scenes.SIZE, y + scenes.SIZE))
            alone = np.asarray(scenes.paint(scenes.Scene(record.meta["data_source"], (thing,))))
            assert (alone[y : y + 16, x : x + 16] == pixels[y : y + 16, x : x + 16]).all()
    assert boxes.keys() != right.keys()


def test_the_prompt_files_are_what_the_script_writes(tmp_path: Path, scenes: ModuleType) -> None:
    import build_tiny_vlm

    build_tiny_vlm.write_prompts(tmp_path, 96, 0)
    for file in sorted(tmp_path.glob("*.jsonl")):
        assert file.read_bytes() == (FOLDER / file.name).read_bytes(), file.name
    for file in sorted(tmp_path.glob("pictures/*.png")):
        with Image.open(file) as made, Image.open(FOLDER / "pictures" / file.name) as bundled:
            assert made.tobytes() == bundled.tobytes(), file.name


def test_the_model_is_small_sees_and_is_unsure() -> None:
    """Sixteen samples of eight clicks: nearly all are boxes of the right size, and no two prompts get the same ones."""
    engine = hf(ModelSection(path="bundled:tiny-eyes", device="cpu", threads=1), lambda: None)
    pictures = open_pictures("bundled:tiny-eyes")
    prompts = tokenize(records("click", "heldout")[:8], engine.tokenizer, "raw", None, pictures)
    assert {int((p.token_ids == pictures.image_token_id).sum()) for p in prompts} == {36}
    assert sum(f.stat().st_size for f in FOLDER.rglob("*")) < 5_000_000
    spec = SamplingSpec(max_new_tokens=20, temperature=1.0)
    requests = [
        Request(prompt=p, index=i, seed=100 * n + i, spec=spec) for n, p in enumerate(prompts) for i in range(16)
    ]
    answers = [box_answer(rollout.text) for rollout in engine.generate(requests)]
    boxes = [parse_box(answer) for answer in answers if answer is not None]
    assert len(boxes) > 110
    assert sum((x2 - x1, y2 - y1) == (16, 16) for x1, y1, x2, y2 in boxes) > 0.9 * len(boxes)
    groups = [set(answers[16 * n : 16 * n + 16]) for n in range(8)]
    assert all(len(group) > 4 for group in groups)


def test_the_gui_recipe_runs_with_labels_per_kind_and_counts_no_luck(tmp_path: Path) -> None:
    """Boxes have no equality that would say how many labels were right; the evaluation by centres does."""
    small = ("steps=1", "data.limit=4", "data.prompts_per_step=4", "rollout.votes_per_prompt=4", "eval.samples=2", "eval.k=[1,2]",
             "eval.limit=4", "eval.heldout=null", "checkpoint.every=0", f"output={json.dumps(str(tmp_path / 'run'))}")  # fmt: skip
    assert (
        run(load_recipe("lab/gui-rcpo", list(small)), resume=False, console=Console(quiet=True)).status == "completed"
    )
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["luck"] is None
    assert not (tmp_path / "run" / "luck.jsonl").exists()
    last = json.loads((tmp_path / "run" / "eval.jsonl").read_text().splitlines()[-1])
    assert {"pass@1", "maj@2"} <= last.keys() and any(key.startswith("pass@1 [") for key in last)
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert metrics["reward/region_area"] > 0
