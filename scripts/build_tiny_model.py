r"""Build the bundled ``tiny-adder`` language model, its tokenizer and its prompt files.

The model, a 0.8M-parameter character-level Llama, adds two three-digit numbers column by column
and ends with a boxed answer::

    347+586=7+6=13,4+8+1=13,3+5+1=9,\boxed{933}

It is trained on generated traces with independent random slips, so it is unreliable on a single
sample but mostly right under a majority vote: the start that label-free RL needs.

Number pairs are split by a hash: the bundled prompts come from one side and the training traces
from the other, so no bundled prompt was trained on.

A full build, ``python scripts/build_tiny_model.py``, takes about three minutes on an idle CPU
core; with ``--measure-only`` it measures the existing folder.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import math
import random
import string
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from prompt_files import write_sums
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

DEFAULT_OUT = Path(__file__).resolve().parents[1] / "ttrl" / "assets" / "tiny-adder"
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")
CHARACTERS = "\n " + string.digits + string.ascii_letters + string.punctuation
# The tokenizer adds no special tokens; a prompt is the same with or without this template.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
MAX_NEW_TOKENS = 40  # the longest trace has 37 characters and EOS
VOTES = 16
BATCH_SIZE = 64
IGNORE_INDEX = -100


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character (or newline), decoded without added spaces."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *CHARACTERS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    # [\s\S] rather than "." because "." does not match a newline.
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A randomly initialised four-layer Llama of width 128."""
    special_ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        **special_ids,
    )
    model = LlamaForCausalLM(config)
    # top_k=0 switches off the library default of 50: samples follow the policy exactly.
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, max_new_tokens=MAX_NEW_TOKENS, **special_ids
    )
    return model


def is_reserved(a: int, b: int) -> bool:
    """Whether the pair belongs to the prompt side of the split (1 in 16 pairs)."""
    return hashlib.sha256(f"{a}+{b}".encode()).digest()[0] % 16 == 0


def draw_pair(rng: random.Random, reserved: bool) -> tuple[int, int]:
    """A uniformly random pair of three-digit numbers from one side of the split."""
    while True:
        a, b = rng.randint(100, 999), rng.randint(100, 999)
        if is_reserved(a, b) == reserved:
            return a, b


def write_trace(a: int, b: int, args: argparse.Namespace, rng: random.Random) -> str:
    """Column-by-column reasoning for ``a+b`` with independent slips of two kinds.

    A *forgotten carry* drops the ``+1`` of a column; a *digit slip* replaces the last digit of
    a column sum. Both are carried on consistently into the boxed answer.
    """
    steps, digits, carry = [], "", 0
    for column, (x, y) in enumerate(zip(reversed(str(a)), reversed(str(b)), strict=True)):
        if carry and rng.random() < args.forget_rate:
            carry = 0
        total = int(x) + int(y) + carry
        if rng.random() < args.slip_rate:
            total += (total + rng.randint(1, 9)) % 10 - total % 10
        steps.append(f"{x}+{y}" + ("+1" if carry else "") + f"={total}")
        carry = total // 10
        digits = str(total if column == 2 else total % 10) + digits
    return ",".join(steps) + f",\\boxed{{{digits}}}"


def training_batches(
    tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield right-padded ``(input_ids, labels)``; labels cover the response and EOS only."""
    rng = random.Random(args.seed)
    for _ in range(args.steps):
        rows, targets = [], []
        for _ in range(BATCH_SIZE):
            a, b = draw_pair(rng, reserved=False)
            prompt = tokenizer.encode(f"{a}+{b}=")
            response = [*tokenizer.encode(write_trace(a, b, args, rng)), tokenizer.eos_token_id]
            rows.append(torch.tensor(prompt + response))
            targets.append(torch.tensor([IGNORE_INDEX] * len(prompt) + response))
        yield (
            torch.nn.utils.rnn.pad_sequence(rows, True, tokenizer.pad_token_id),
            torch.nn.utils.rnn.pad_sequence(targets, True, IGNORE_INDEX),
        )


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> None:
    """Supervised next-token training with AdamW, linear warm-up and cosine decay."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    batches = training_batches(tokenizer, args)
    started = time.time()
    for step, (input_ids, labels) in enumerate(batches):
        scale = min((step + 1) / 30, 0.5 + 0.5 * math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * max(scale, 0.02)
        # The padding is on the right, so causal attention needs no mask.
        logits = model(input_ids).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step + 1 == args.steps:
            print(f"step {step:4d}  loss {loss.item():.4f}  {time.time() - started:.0f}s")


def write_prompts(folder: Path, per_split: int, seed: int) -> None:
    """Write disjoint ``train`` and ``heldout`` prompt and label files from reserved pairs."""
    rng = random.Random(seed)
    pairs: dict[tuple[int, int], None] = {}
    while len(pairs) < 2 * per_split:
        pairs[draw_pair(rng, reserved=True)] = None
    for split, chunk in (("train", list(pairs)[:per_split]), ("heldout", list(pairs)[per_split:])):
        write_sums(folder, split, chunk)


def read_column(path: Path, key: str) -> list[str]:
    """The values of one key of a JSON-lines file, in file order."""
    return [json.loads(line)[key] for line in path.read_text().splitlines()]


def boxed_answer(text: str) -> str | None:
    r"""The content of the last ``\boxed{...}``, or ``None`` if there is none."""
    _, found, tail = text.rpartition("\\boxed{")
    return tail.split("}")[0] if found and "}" in tail else None


@torch.inference_mode()
def measure(folder: Path, seed: int) -> None:
    """Print pass@1 and majority-vote accuracy per split at temperature 1.0."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(seed)
    for split in ("train", "heldout"):
        prompts = read_column(folder / f"{split}.prompts.jsonl", "prompt")
        answers = read_column(folder / f"{split}.labels.jsonl", "answer")
        batch = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
        responses = model.generate(**batch, num_return_sequences=VOTES)[:, batch["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        right = majority_right = 0
        for i, answer in enumerate(answers):
            group = [boxed_answer(text) for text in texts[i * VOTES : (i + 1) * VOTES]]
            right += group.count(answer)
            counts = collections.Counter(g for g in group if g is not None).most_common(2)
            # A tie for first place abstains, which counts as not right.
            tied = len(counts) == 2 and counts[0][1] == counts[1][1]
            majority_right += bool(counts) and not tied and counts[0][0] == answer
        lengths = (responses != tokenizer.pad_token_id).sum(1)
        print(
            f"{split}: prompts {len(prompts)}  pass@1 {right / len(texts):.3f}  "
            f"maj@{VOTES} {majority_right / len(prompts):.3f}  "
            f"response tokens mean {lengths.float().mean():.1f} max {lengths.max()}"
        )


def main() -> None:
    """Parse the arguments, build the folder and measure it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--measure-only", action="store_true", help="only measure an existing folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=128, help="prompts per split")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--slip-rate", type=float, default=0.12, help="per column")
    parser.add_argument("--forget-rate", type=float, default=0.22, help="per carry")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.measure_only:
        torch.manual_seed(args.seed)
        args.out.mkdir(parents=True, exist_ok=True)
        tokenizer = build_tokenizer()
        model = build_model(tokenizer)
        train(model, tokenizer, args)
        model.save_pretrained(args.out)
        # The weights are written readable by their owner only, which breaks shared installs.
        (args.out / "model.safetensors").chmod(0o644)
        tokenizer.save_pretrained(args.out)
        write_prompts(args.out, args.prompts, args.seed)
    measure(args.out, args.seed)


if __name__ == "__main__":
    main()
