"""vLLM on prompts with pictures, in a process of its own: its numbers are those of the model, before and after a sync.

vLLM's own code of LLaVA imports torchvision; the code of transformers inside vLLM does not.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers_images import image_prompt, pictures, row_scores, save_tiny_llava, text_prompt
from helpers_torch import request, section
from transformers import AutoModelForImageTextToText, AutoProcessor

from ttrl.config import load_recipe
from ttrl.errors import ConfigError, EngineError
from ttrl.model.processor import open_pictures
from ttrl.rollout.vllm_images import with_pictures
from ttrl.setup import check_recipe
from ttrl.types import Prompt, Request, SamplingSpec

TEXT, VISION = {"hidden_size": 128, "head_dim": 32}, {"hidden_size": 64, "num_attention_heads": 2}
"""Head width 32, the smallest that vLLM's CPU attention takes."""
VOTES = 3


def prompts(folder: Path) -> list[Prompt]:
    """One picture, two pictures, none."""
    files, made_by = pictures(folder / "pictures", 3), open_pictures(str(folder / "model"))
    return [image_prompt(made_by, "one", files[:1]), image_prompt(made_by, "two", files[1:]), text_prompt("none")]


def requests(folder: Path) -> list[Request]:
    spec = SamplingSpec(max_new_tokens=8, temperature=0.7)
    return [request(of, i, spec) for of in prompts(folder) for i in range(VOTES)]


def sample(folder: Path) -> None:
    """What the process with vLLM does: rollouts under the weights of `model`, then under those of `other`."""
    from ttrl.model.weights import NamedTensors, load_weights
    from ttrl.rollout.engines import vllm

    other = dict(
        AutoModelForImageTextToText.from_pretrained(folder / "other").named_parameters()
    )  # before vLLM changes the class
    engine: Any = vllm(section(folder / "model"), lambda: None, kv_cache_gib=0.1, implementation="transformers")
    found: dict[str, Any] = {}
    for version in range(2):
        for i, rollout in enumerate(engine.generate(requests(folder))):
            found |= {f"ids-{version}-{i}": rollout.token_ids, f"logprobs-{version}-{i}": rollout.logprobs}
        if version == 0:
            shapes = {name: tuple(tensor.shape) for name, tensor in other.items()}
            load_weights(engine, NamedTensors(1, shapes, lambda: iter((n, t.detach()) for n, t in other.items())))
    np.savez(folder / "found.npz", **found)


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("vllm") is None and os.environ.get("TTRL_REQUIRE_VLLM") != "1",
    reason="vLLM is not installed (scripts/setup_vllm_cpu)",
)
def test_vllm_says_of_pictures_what_the_model_says_also_after_a_sync(tmp_path: Path) -> None:
    for name, seed in (("model", 0), ("other", 1)):
        save_tiny_llava(tmp_path / name, seed, text=TEXT, vision=VISION)
    wanted = requests(tmp_path)
    result = subprocess.run([sys.executable, __file__, str(tmp_path)], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    found = np.load(tmp_path / "found.npz")
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    for version, name in enumerate(("model", "other")):
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / name).double().eval()
        for i, item in enumerate(wanted):
            ids = found[f"ids-{version}-{i}"]
            if processor.image_token_id in ids:
                continue  # the plain call would look for a picture there
            with torch.no_grad():
                [expected] = row_scores(model, processor, [(item.prompt, ids)], 0.7)
            np.testing.assert_allclose(found[f"logprobs-{version}-{i}"], expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("kept", "problem"), [(0, None), (1, "37 tokens of prompt 'two'"), (0, "no room for pictures")]
)
def test_vllm_must_arrive_at_the_tokens_of_the_processor(tmp_path: Path, kept: int, problem: str | None) -> None:
    save_tiny_llava(tmp_path / "model")
    of, prefix = prompts(tmp_path)[1], np.asarray([7, 8], np.int32)
    context = [*of.token_ids.tolist(), *prefix.tolist()]

    def render(given: list[dict[str, Any]]) -> list[dict[str, Any]]:
        [one] = given
        if problem == "no room for pictures":
            raise ValueError(problem)
        assert of.marked_ids is not None
        assert one["prompt_token_ids"] == [*of.marked_ids.tolist(), 7, 8]
        assert [image.size for image in one["multi_modal_data"]["image"]] == [(20, 14)] * 2
        return [{"prompt_token_ids": context[kept * 10 :]}]

    vllm = SimpleNamespace(renderer=SimpleNamespace(render_cmpl=render))
    item = replace(request(of, 0, SamplingSpec(max_new_tokens=1)), prefix=prefix)
    if problem is None:
        assert with_pictures(vllm, item, context) == {"prompt_token_ids": context}
    else:
        with pytest.raises(EngineError, match=problem):
            with_pictures(vllm, item, context)


def test_its_own_process_is_asked_for() -> None:
    changes = ["rollout.engine.use=vllm", "rollout.engine.with.implementation=transformers"]
    with pytest.raises(ConfigError, match=r"cluster\.backend: ray, which gives the engine a process"):
        check_recipe(load_recipe("quickstart", changes))


if __name__ == "__main__":
    sample(Path(sys.argv[1]))
