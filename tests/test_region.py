"""Region consistency: the reward, the coordinate systems, GUI-RC against single predictions, and its evaluation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ttrl.errors import ConfigError
from ttrl.evaluate.estimators import bootstrap
from ttrl.evaluate.regions import RegionEvaluator, check_regions, label_box
from ttrl.prompts import PromptRecord, read_prompts
from ttrl.protocols import RewardContext
from ttrl.rewards.region import RegionConsistency
from ttrl.rewards.screen import Screen, resized
from ttrl.rewards.spots import covers, spot_vote, to_pixels
from ttrl.types import Finish, Group, Message, Prompt, Rollout, SamplingSpec, WeightStamp

CONTEXT = RewardContext(step=0, seed=0)


def prompt(size=(10, 10), identifier="p", **meta) -> Prompt:
    return Prompt(
        id=identifier, messages=(Message(role="user", content="?"),), token_ids=np.zeros(1, np.int32),
        meta={"image_size": list(size), **meta},
    )  # fmt: skip


def rollout(text: str, index: int = 0, identifier: str = "p") -> Rollout:
    return Rollout(
        prompt_id=identifier, index=index, token_ids=np.zeros(2, np.int32), logprobs=np.zeros(2, np.float32), entropy=None,
        text=text, finish=Finish.STOP, weights=WeightStamp(version=0, fingerprint=""),
    )  # fmt: skip


def score(reward: RegionConsistency, texts: list[str], size=(10, 10)):
    rollouts = tuple(rollout(text, i) for i, text in enumerate(texts))
    return reward(Group(prompt=prompt(size), rollouts=rollouts, trainable=np.ones(len(texts), np.bool_)), CONTEXT)


def test_golden_example():
    scored = score(RegionConsistency(), ["[0,0,4,4]", "box: [2, 2, 6, 6]", "[2,2,4,4]"])
    np.testing.assert_allclose(scored.rewards, [0.5, 0.5, 1.0])
    assert (scored.label, scored.share, scored.classes.tolist()) == ("[2,2,4,4]", 1.0, [0, 0, 0])
    assert scored.metrics["region_peak"] == 3.0
    assert scored.metrics["consensus_area"] == 0.04
    assert scored.metrics["region_area"] == pytest.approx((16 + 16 + 4) / 3 / 100)


def test_parse_failures_never_vote_even_as_the_majority():
    # the published code lets them vote for a square at the top left, which pays them 1
    scored = score(
        RegionConsistency(extractor="point", expand=10), ["(50,50)", "(52,50)", "", "here", "(900,900)"], (100, 100)
    )
    np.testing.assert_allclose(scored.rewards, [0.9, 0.9, 0, 0, 0])
    assert scored.classes.tolist() == [0, 0, -1, -1, -1]
    assert (scored.share, scored.label) == (1.0, "[47,45,55,55]")


def test_margin_counts_the_best_rival():
    scored = score(RegionConsistency(), ["[0,0,4,4]"] * 3 + ["[6,6,9,9]"] * 2 + ["nothing"])
    assert (scored.share, scored.margin) == (3 / 5, 1 / 5)
    assert scored.classes.tolist() == [0, 0, 0, 1, 1, -1]


def test_without_overlap_the_group_abstains():
    scored = score(RegionConsistency(), ["[0,0,2,2]", "[4,4,8,8]"])
    assert scored.label is None
    assert not scored.train.any()
    assert not score(RegionConsistency(), ["nothing", ""]).train.any()
    assert not score(RegionConsistency(min_share=0.7), ["[0,0,4,4]"] * 2 + ["[6,6,9,9]"] * 2).train.any()


def test_a_point_is_the_same_square_in_the_vote_and_in_the_reward():
    scored = score(RegionConsistency(extractor="point", expand=4), ["(5,5)", "(0,0)", "(5,5)"], (8, 8))
    assert scored.answers == ("[3,3,7,7]", "[-2,-2,2,2]", "[3,3,7,7]")
    assert scored.label == "[3,3,7,7]"
    np.testing.assert_allclose(scored.rewards, [1.0, 0.5, 1.0])


def test_shrinking_boxes_raise_the_alarm_and_the_first_area_survives_a_resume():
    reward = RegionConsistency()
    assert score(reward, ["[0,0,8,8]"] * 2).metrics["region_shrink"] == 1.0
    again = RegionConsistency()
    again.load_state(json.loads(json.dumps(reward.state())))
    shrunk = score(again, ["[0,0,4,4]"] * 2)
    np.testing.assert_array_equal(shrunk.rewards, [1, 1])  # the pay does not see it
    assert (shrunk.metrics["region_shrink"], shrunk.metrics["region_shrink_alarm"]) == (0.25, 1.0)


@pytest.mark.parametrize(
    ("coordinates", "text", "expected"),
    [
        ("pixels", "[96,108,192,216]", (96, 108, 192, 216)),
        ("fraction", "[0.05,0.1,0.1,0.2]", (96, 108, 192, 216)),
        ("thousandths", "[50,100,100,200]", (96, 108, 192, 216)),
        ("resized", "[483,273,966,546]", (480, 270, 960, 540)),
    ],
)
def test_coordinates_come_back_to_the_original_image(coordinates, text, expected):
    screen = Screen(coordinates, expand=50, factor=28, min_pixels=3136, max_pixels=12845056)
    assert screen.region(text, 1920, 1080) == pytest.approx(expected)
    assert screen.region(None, 1920, 1080) is None


def test_the_model_size_is_the_one_transformers_computes():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    rng = np.random.default_rng(0)
    for _ in range(500):
        width, height = (int(side) for side in rng.integers(20, 5000, 2))
        if max(width, height) / min(width, height) > 199:
            continue
        low, high = sorted(int(n) for n in rng.integers(3136, 3_000_000, 2))
        found = resized(width, height, 28, low, high)
        assert found == smart_resize(height, width, 28, low, high)[::-1], (width, height, low, high)


@pytest.mark.parametrize("size", [None, [10], [0, 5], ["10", "10"], [10.5, 3]])
def test_a_prompt_must_say_how_large_its_screen_is(size):
    record = PromptRecord(id="p", messages=(), meta={"image_size": size})
    with pytest.raises(ConfigError, match=r"data\.keep"):
        check_regions([record], None, None)


def noisy_boxes(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """A target of a 1920 x 1080 screen and `count` predictions: most near it, 40 % anywhere, edges jittered."""
    size = rng.uniform(20, 160, 2)
    corner = rng.uniform(0, (1920 - size[0], 1080 - size[1]))
    target = np.concatenate([corner, corner + size])
    near = target + rng.normal(0, 0.35, (count, 4)) * np.tile(size, 2)
    far = rng.uniform(0, (1920, 1080), (count, 2))
    far = np.hstack([far, far + rng.uniform(20, 200, (count, 2))])
    boxes = np.where(rng.random((count, 1)) < 0.4, far, near)
    return target, np.hstack([np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])])


def test_the_vote_beats_the_mean_single_prediction_beyond_the_intervals():
    rng = np.random.default_rng(3)
    single, together = [], []
    for _ in range(500):
        target, boxes = noisy_boxes(rng, 16)
        pixels = to_pixels([tuple(box) for box in boxes.tolist()], 1920, 1080)
        middles = np.column_stack([boxes[:, 0] + boxes[:, 2], boxes[:, 1] + boxes[:, 3]]) / 2
        single.append(np.mean([covers(target, middle) for middle in middles]))
        together.append(float(covers(target, spot_vote(pixels).centre)))
    one, many = bootstrap(np.asarray(single), 0), bootstrap(np.asarray(together), 0)
    assert one is not None and many is not None
    assert many[0] > one[1], (one, many)
    assert np.mean(together) > np.mean(single) + 0.2


def test_the_evaluator_counts_centres_in_boxes_per_source_and_type(tmp_path):
    labels = tmp_path / "labels.jsonl"
    labels.write_text("".join(json.dumps({"id": i, "answer": a}) + "\n" for i, a in [
        ("a", "[0,0,4,4]"), ("b", "[5,5,9,9]"), ("c", "[0,0,4,4]")
    ]))  # fmt: skip
    prompts = [
        prompt(identifier=i, data_source="web", data_type=t) for i, t in [("a", "icon"), ("b", "text"), ("c", "text")]
    ]
    texts = {
        "a": ["[1,1,3,3]", "[4,4,8,8]", "?", "[0,0,8,8]"],
        "b": ["[0,0,2,2]", "[6,6,8,8]", "[6,6,8,8]", "[0,0,2,2]"],
        "c": ["[0,0,3,4]", "[1,0,4,4]", "?", "?"],
    }

    class Scripted:
        def generate(self, requests):
            return [rollout(texts[r.prompt.id][r.index], r.index, r.prompt.id) for r in requests]

    reward = RegionConsistency()
    evaluator = RegionEvaluator(
        "adapted", prompts, str(labels), reward.reader, SamplingSpec(max_new_tokens=4), samples=4, ks=(1, 4), template="raw", seed=0,
        by=("data_source", "data_type"), reward=reward,
    )  # fmt: skip
    found = evaluator(0, Scripted())
    assert [r.correct for r in found.results] == [2, 2, 2]  # (4,4) is on the border of a's box and counts
    assert found.estimates["pass@1"].value == 0.5
    assert found.estimates["pass@1 [web/icon]"].value == 0.5
    # a: the peak is [1,1,3,3] (twice) and [4,4,8,8] (twice): the larger one wins, centre (6,6), wrong; b: a tie, the first wins, wrong
    # c: right, by a region that nobody gave
    assert found.per_prompt["maj@4"] == (0.0, 0.0, 1.0)
    assert [r.majority for r in found.results] == ["[4,4,8,8]", "[0,0,2,2]", "[1,0,3,4]"]
    assert found.estimates["maj@4 [web/text]"].value == 0.5


@pytest.mark.parametrize("label", ["[0.1,0.2]", "somewhere", "[5,5,1,1]"])
def test_a_label_must_be_a_box(label):
    with pytest.raises(ConfigError, match=r"must be a box \[x1,y1,x2,y2\]"):
        label_box("p", label)


def test_kept_columns_reach_the_prompt_and_answers_cannot(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"id": "a", "prompt": "x", "image_size": [4, 3], "bbox": [0, 0, 1, 1]}\n')
    assert read_prompts(str(file), keep=["image_size"])[0].meta == {"image_size": [4, 3]}
    with pytest.raises(ConfigError, match=r"data\.keep names bbox"):
        read_prompts(str(file), keep=["bbox"])
    with pytest.raises(ConfigError, match=r"p\.jsonl:1: no field 'imagesize'.*image_size"):
        read_prompts(str(file), keep=["imagesize"])


def test_screenspot_becomes_prompts_and_labels(tmp_path):
    row = {
        "id": 7, "image": "a.png", "instruction": "close", "bbox": [0.25, 0.5, 0.5, 0.75], "data_type": "icon", "data_source": "web",
        "image_size": [1920, 1080],
    }  # fmt: skip
    source = tmp_path / "s.jsonl"
    source.write_text(json.dumps(row) + "\n")
    script = [sys.executable, str(Path(__file__).parent.parent / "scripts/prepare_screenspot.py")]
    subprocess.run([*script, source, tmp_path], check=True, timeout=60)
    [record] = read_prompts(str(tmp_path / "screenspot.prompts.jsonl"), keep=["image_size", "data_type"])
    assert (record.id, record.meta) == ("7", {"image_size": [1920, 1080], "data_type": "icon"})
    check_regions([record], str(tmp_path / "screenspot.labels.jsonl"), None)
    assert (
        json.loads((tmp_path / "screenspot.labels.jsonl").read_text())["answer"] == "[480.000,540.000,960.000,810.000]"
    )
    source.write_text(json.dumps({**row, "bbox": [480, 540, 960, 810]}) + "\n")
    failed = subprocess.run([*script, source, tmp_path], capture_output=True, text=True, timeout=60)
    assert failed.returncode == 1
    assert "row 0: bbox" in failed.stderr
