"""The start model of the MRT comparison: the bundled adder, taught to answer when it is stopped.

    python scripts/bench/mrt_start.py --output runs/stoppable-adder [--steps 400]

The bundled model opens its box only after all columns, so an answer forced earlier means nothing; a language model can be asked at
any time. Half of each batch is as in scripts/build_tiny_model.py (columns with slips, then the box). The other half is cut after 0
to 3 columns and boxed; loss is on the boxed digits only, so the model does not learn to stop by itself. Both halves weigh the same.
The digits follow the columns written so far, slips included, and are right for the rest. Prompts of the bundled files are not
trained on.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import build_tiny_model as tiny


def stopped(a: int, b: int, args: argparse.Namespace, rng: random.Random) -> tuple[str, str]:
    """(columns written so far, what follows: digits, brace)."""
    steps = tiny.write_trace(a, b, args, rng).split(",")[:-1]
    done = rng.choice((0, 1, 2, 2, 3))
    digits, carry = "", 0
    for step in steps[:done]:
        total = int(step.rpartition("=")[2])
        digits, carry = str(total % 10) + digits, total // 10
    rest = a // 10**done + b // 10**done + carry  # after all columns: the carry
    answer = (str(rest) if rest else "") + digits
    return ",".join(steps[:done]) + ("," if done else "") + "\\boxed{", answer + "}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slip-rate", type=float, default=0.12)
    parser.add_argument("--forget-rate", type=float, default=0.22)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    rng = random.Random(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(tiny.DEFAULT_OUT)
    model = AutoModelForCausalLM.from_pretrained(tiny.DEFAULT_OUT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    for step in range(args.steps):
        rows, targets = [], []
        for number in range(tiny.BATCH_SIZE):
            a, b = tiny.draw_pair(rng, reserved=False)
            given, wanted = stopped(a, b, args, rng) if number % 2 else ("", tiny.write_trace(a, b, args, rng))
            known = tokenizer.encode(f"{a}+{b}={given}")
            learned = [*tokenizer.encode(wanted), tokenizer.eos_token_id]
            rows.append(torch.tensor(known + learned))
            targets.append(torch.tensor([tiny.IGNORE_INDEX] * len(known) + learned))
        ids = torch.nn.utils.rnn.pad_sequence(rows, True, tokenizer.pad_token_id)
        labels = torch.nn.utils.rnn.pad_sequence(targets, True, tiny.IGNORE_INDEX)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * max(min((step + 1) / 20, 0.5 + 0.5 * math.cos(math.pi * step / args.steps)), 0.02)
        logits = model(ids).logits[:, :-1]
        halves = [F.cross_entropy(logits[n::2].flatten(0, 1), labels[n::2, 1:].flatten()) for n in (0, 1)]
        loss = halves[0] + halves[1]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step + 1 == args.steps:
            print(f"step {step:4d}  loss {halves[0].item():.4f} of traces, {halves[1].item():.4f} of forced answers")
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
