"""Pictures in the engine and in the forward pass of training: what they compute is what the model says of prompt and pixels."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_images import (
    InternVLProcessor,
    QwenProcessor,
    image_prompt,
    pictures,
    row_scores,
    save_internvl_processor,
    save_qwen_processor,
    save_tiny_internvl,
    save_tiny_llava,
    save_tiny_qwen,
    text_prompt,
)
from helpers_torch import VOCABULARY, gradients, largest_difference, request, sample, section, tiny_llama
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from ttrl.errors import ConfigError
from ttrl.model import eyes
from ttrl.model.eyes import open_eyes
from ttrl.model.processor import Pictures, open_pictures
from ttrl.rollout.engines import hf
from ttrl.rollout.hf import HFEngine
from ttrl.trainers.dealing import split
from ttrl.trainers.forward import CompletionScorer
from ttrl.trainers.lockstep import common, padded, shapes
from ttrl.trainers.packing import pack
from ttrl.types import ImageFile, PackedBatch, Prompt, Request, SamplingSpec

SPEC = SamplingSpec(max_new_tokens=10, temperature=0.8)


@dataclass(frozen=True)
class World:
    """A vision-language model on disk, its processor and some pictures."""

    folder: Path
    processor: Any
    pictures: Pictures
    files: tuple[ImageFile, ...]

    def load(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        return AutoModelForImageTextToText.from_pretrained(self.folder).to(dtype).eval()

    def engine(self, **options: Any) -> HFEngine:
        made = hf(section(self.folder), lambda: None, **options)
        assert isinstance(made, HFEngine)
        return made

    def prompts(self) -> list[Prompt]:
        """One picture, two pictures, none."""
        one, two = self.files[:1], self.files[1:3]
        return [image_prompt(self.pictures, "one", one), image_prompt(self.pictures, "two", two), text_prompt("none")]


KINDS: dict[str, tuple[Callable[[Path], Path], Callable[[], Any]]] = {
    "qwen2.5-vl": (save_tiny_qwen, QwenProcessor), "internvl": (save_tiny_internvl, InternVLProcessor)
}  # fmt: skip
"""With stand-ins for their own processors, which need torchvision."""
REAL = {"qwen2.5-vl, torchvision": (save_tiny_qwen, save_qwen_processor),
        "internvl, torchvision": (save_tiny_internvl, save_internvl_processor)}  # fmt: skip
with_torchvision = pytest.mark.skipif(find_spec("torchvision") is None, reason="needs torchvision")
WORLDS = ["llava", "qwen2.5-vl", pytest.param("internvl", marks=pytest.mark.slow),
          *(pytest.param(name, marks=with_torchvision) for name in REAL)]  # fmt: skip


@pytest.fixture(scope="module", params=WORLDS)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp(re.sub(r"\W+", "-", request.param))
    files = pictures(folder / "pictures", 4)
    if request.param == "llava":
        save_tiny_llava(folder / "model")
        processor = AutoProcessor.from_pretrained(folder / "model")
        yield World(folder / "model", processor, open_pictures(str(folder / "model")), files)
        return
    if request.param in REAL:
        save, save_processor = REAL[request.param]
        processor = save_processor(save(folder / "model"))
        yield World(folder / "model", processor, open_pictures(str(folder / "model")), files)
        return
    save, stand_in = KINDS[request.param]
    processor = stand_in()
    made = Pictures(processor, str(save(folder / "model")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eyes, "open_pictures", lambda path: made)
        yield World(folder / "model", processor, made, files)


def requests(world: World, votes: int = 3, spec: SamplingSpec = SPEC) -> list[Request]:
    return [request(of, i, spec) for of in world.prompts() for i in range(votes)]


@pytest.mark.parametrize("shared_prefix", [True, False])
def test_records_equal_a_forward_pass_over_pixels_and_final_text(world: World, shared_prefix: bool) -> None:
    made, model, wanted = world.engine(shared_prefix=shared_prefix), world.load(torch.float64), requests(world)
    assert made._shared is shared_prefix
    for item, rollout in zip(wanted, made.generate(wanted), strict=True):
        if world.pictures.image_token_id in rollout.token_ids:
            continue  # the plain call would look for a picture there; see the test of such completions
        with torch.no_grad():
            [expected] = row_scores(model, world.processor, [(item.prompt, rollout.token_ids)], 0.8)
        np.testing.assert_allclose(rollout.logprobs, expected.numpy(), atol=1e-5)


def test_another_picture_gives_other_numbers_and_the_order_of_pictures_counts(world: World) -> None:
    made, [one, two, _] = world.engine(), world.prompts()
    greedy = replace(SPEC, temperature=0.0, max_new_tokens=3)

    def first(of: Prompt, *files: ImageFile) -> float:
        return float(made.generate([request(replace(of, images=files), 0, greedy)])[0].logprobs[0])

    seen = [first(one, file) for file in world.files]
    assert len({round(value, 4) for value in seen}) == len(seen)
    assert abs(first(two, *world.files[1:3]) - first(two, *world.files[2:0:-1])) > 1e-4


def test_fast_path_and_slow_twin_draw_the_same_tokens_and_prefixes_are_continued(world: World) -> None:
    fast, slow = world.engine(), world.engine(shared_prefix=False)
    wanted = requests(world)
    drawn = fast.generate(wanted)
    assert [r.token_ids.tolist() for r in drawn] == [r.token_ids.tolist() for r in slow.generate(wanted)]
    for made in (fast, slow):
        for item, whole in zip(wanted, drawn, strict=True):
            kept = len(whole.token_ids) // 2
            spec = replace(item.spec, max_new_tokens=item.spec.max_new_tokens - kept)
            [rest] = made.generate([replace(item, prefix=whole.token_ids[:kept], spec=spec)])
            assert rest.token_ids.tolist() == whole.token_ids[kept:].tolist()
            np.testing.assert_allclose(rest.logprobs, whole.logprobs[kept:], atol=1e-5)


def packed(world: World, *, image_tokens: bool = False) -> tuple[list[tuple[Prompt, Any]], list[PackedBatch]]:
    """Three groups of three rows, and the same as micro-batches; with `image_tokens`, completions hold some."""
    rows, items = [], []
    for group, of in enumerate(world.prompts()):
        for row, length in enumerate((5, 2, 7)):
            item = replace(sample(of, length, seed=10 * group + row), images=of.images)
            if image_tokens:
                item.completion_ids[length // 2] = world.pictures.image_token_id
            items.append(item)
    batches = pack(items, 10_000)
    start, flat = 0, np.concatenate([batch.completion_ids for batch in batches])
    for of, batch_segment in zip(world.prompts(), (s for b in batches for s in b.segments), strict=True):
        assert batch_segment.images == of.images
        for length in batch_segment.lengths:
            rows.append((of, flat[start : start + length]))
            start += int(length)
    return rows, batches


@pytest.mark.parametrize("shared_prefix", [True, False])
def test_training_scores_and_gradients_equal_a_padded_pass_over_the_rows(world: World, shared_prefix: bool) -> None:
    rows, batches = packed(world)
    ours, plain = world.load(torch.float64), world.load(torch.float64)
    scorer = CompletionScorer(ours, 0.7, shared_prefix=shared_prefix, path=str(world.folder))
    assert scorer.shared_prefix is shared_prefix
    found = torch.cat([scorer(batch).logprobs for batch in batches])
    expected = torch.cat([score for pair in rows for score in row_scores(plain, world.processor, [pair], 0.7)])
    np.testing.assert_allclose(found.detach(), expected.detach(), atol=1e-5)

    weights = torch.linspace(-1, 1, len(found), dtype=torch.float64)
    (found * weights).sum().backward()
    by_group = [rows[i : i + 3] for i in (0, 3, 6)]
    again = torch.cat([torch.cat(row_scores(plain, world.processor, group, 0.7)) for group in by_group])
    (again * weights).sum().backward()
    theirs = gradients(plain)
    largest = max(float(value.abs().max()) for value in theirs.values())
    assert largest_difference(gradients(ours), theirs) < 1e-6 * largest
    assert any("vis" in name and float(value.abs().max()) > 1e-3 for name, value in theirs.items())


def test_image_tokens_in_a_completion_are_tokens_like_others(world: World) -> None:
    """A model may sample them. No picture stands there, whichever way the row is computed."""
    _, batches = packed(world, image_tokens=True)
    model = world.load()
    fast = CompletionScorer(model, 1.0, path=str(world.folder))
    slow = CompletionScorer(world.load(), 1.0, shared_prefix=False, path=str(world.folder))
    for batch in batches:
        np.testing.assert_allclose(fast(batch).logprobs.detach(), slow(batch).logprobs.detach(), atol=2e-5)
    item = request(world.prompts()[0], 0, SPEC)
    prefix = np.asarray([5, world.pictures.image_token_id, 6], np.int32)
    results = [world.engine(shared_prefix=s).generate([replace(item, prefix=prefix)])[0] for s in (True, False)]
    assert results[0].token_ids.tolist() == results[1].token_ids.tolist()


def test_pictures_side_by_side_are_refused_where_positions_need_to_tell_them_apart(world: World) -> None:
    two = world.files[:2]
    ids, _ = world.pictures.encode(world.pictures.image_token * 2, two, add_special_tokens=False)
    of = replace(world.prompts()[0], token_ids=np.asarray(ids, np.int32), images=two)
    if hasattr(world.load().base_model, "get_rope_index"):
        with pytest.raises(ConfigError, match="side by side"):
            world.engine().generate([request(of, 0, SPEC)])
    else:
        assert world.engine().generate([request(of, 0, SPEC)])[0].token_ids.size


@pytest.mark.parametrize("shared_prefix", [True, False])
def test_ranks_run_modules_in_one_order_with_and_without_pictures(world: World, shared_prefix: bool) -> None:
    """Under ZeRO every call of a module is a meeting of all ranks."""
    _, [batch] = packed(world)
    parts = split(batch)  # one prompt with a picture; one with two, and one without
    shape = common(np.max([shapes([part], 1) for part in parts], axis=0))[0]
    assert shape.pictures
    model = world.load()
    scorer = CompletionScorer(model, 1.0, shared_prefix=shared_prefix, path=str(world.folder))
    order: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: order.append(name))
    seen = []
    for part in (*parts, None):
        order.clear()
        together = padded(part, shape.segments)
        scores = scorer(together, shape).logprobs
        seen.append(list(order))
        if part is not None:
            torch.testing.assert_close(scores[: len(part.completion_ids)], scorer(part).logprobs, rtol=1e-5, atol=2e-5)
    assert seen[0] == seen[1] == seen[2]
    assert any("vis" in name for name in seen[0])


def test_a_model_that_does_more_with_pictures_is_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type(world.load().base_model)
    original = kind.forward

    def forward(self: Any, *args: Any, pixel_values: Any = None, **kwargs: Any) -> Any:
        out = original(self, *args, pixel_values=pixel_values, **kwargs)
        if pixel_values is not None:  # like models that add features to deeper layers
            out.last_hidden_state = out.last_hidden_state + 0.1
        return out

    monkeypatch.setattr(kind, "forward", forward)
    made, [one, _, none] = world.engine(), world.prompts()
    with pytest.raises(ConfigError, match="not supported: its own forward pass is"):
        made.generate([request(one, 0, SPEC)])
    assert made.generate([request(none, 0, SPEC)])[0].token_ids.size


def test_texts_on_such_a_model_need_no_processor(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: str) -> Pictures:
        raise ConfigError("no processor here")

    monkeypatch.setattr(eyes, "open_pictures", missing)
    made, [one, _, none] = world.engine(), world.prompts()
    assert made.generate([request(none, 0, SPEC)])[0].token_ids.size
    with pytest.raises(ConfigError, match="no processor here"):
        made.generate([request(one, 0, SPEC)])


def test_a_text_model_has_no_eyes(tiny_model_dir: Path, world: World) -> None:
    assert open_eyes(tiny_llama(), str(tiny_model_dir)) is None
    made = hf(section(tiny_model_dir), lambda: None)
    ids = world.prompts()[0].token_ids % VOCABULARY
    with pytest.raises(ConfigError, match="'one' has images, but the model is one of text only"):
        made.generate([request(replace(world.prompts()[0], token_ids=ids), 0, SPEC)])


def test_the_pixel_cache_is_bounded_and_a_changed_file_is_seen(world: World, tmp_path: Path) -> None:
    files = pictures(tmp_path, 3)
    small = Pictures(world.processor, "m", cache_bytes=1)
    first = small.pixels(files[:1])
    assert small.pixels(files[:1]) is first
    small.pixels(files[1:2])
    assert small.pixels(files[:1]) is not first
    Path(files[2].path).write_bytes(Path(files[0].path).read_bytes())
    with pytest.raises(ConfigError, match="has changed since the prompts were read"):
        small.pixels(files[2:])
