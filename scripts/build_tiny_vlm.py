r"""Build the bundled ``tiny-eyes`` vision-language model, its processor, and its pictures and prompt files.

The model, a LLaVA of 0.55M parameters (a CLIP vision tower and a Llama), looks at screens of 48 x 48 pixels and answers two kinds of
questions about them (see ``tiny_scenes.py``)::

    click red                                             disc [08,16,24,32]
    disc A tent B frame C cross D shape of red            disc (A)

It learns in four stages: the vision tower to say what each patch shows and where that lies; the language model to find the letter of a
word, to answer right, and then to answer with slips: it mistakes things for others, and boxes jitter. So it is unreliable on a single
sample but mostly right under a vote.

A full build, ``python scripts/build_tiny_vlm.py``, takes about five minutes on an idle CPU core.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from build_tiny_model import BATCH_SIZE, CHARACTERS, IGNORE_INDEX, SPECIAL_TOKENS
from PIL import Image
from prompt_files import write_pair
from tiny_scenes import CELL, COLOURS, LETTERS, SHAPES, SIDE, SIZE, Box, Question, Scene, ask, draw_picture
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

DEFAULT_OUT = Path(__file__).resolve().parents[1] / "ttrl" / "assets" / "tiny-eyes"
IMAGE_TOKEN = "<image>"
WORDS = (*SHAPES, *COLOURS, "click", "shape", "colour", "of")
HEADS, HEAD_SIZE = 6, 32  # vLLM's CPU attention takes no smaller heads
PATCHES = (SIDE // CELL) ** 2
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{% endfor %}"
)
MAX_NEW_TOKENS = 20  # the longest answer has 16 tokens and EOS
LOOKALIKES = {"red": "pink", "blue": "cyan", "frame": "disc"}
LOOKALIKES |= {second: first for first, second in LOOKALIKES.items()}


def build_processor() -> LlavaProcessor:
    """The tokenizer of tiny-adder with a token for each word of this little world, and pictures as they are, in [-1, 1]."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *CHARACTERS, IMAGE_TOKEN, *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(rf"\b(?:{'|'.join(WORDS)})\b|[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": AddedToken(IMAGE_TOKEN, special=True, normalized=False)},
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
        chat_template=CHAT_TEMPLATE,
    )
    square = {"height": SIDE, "width": SIDE}
    half = [0.5, 0.5, 0.5]
    images = CLIPImageProcessorPil(size=square, crop_size=square, do_center_crop=False, image_mean=half, image_std=half)
    return LlavaProcessor(
        images, tokenizer, patch_size=CELL, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """Two vision layers of width 64 and three language layers of width 96, randomly initialised."""
    special_ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=SIDE, patch_size=CELL,
        projection_dim=64,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, head_dim=HEAD_SIZE, max_position_embeddings=512, tie_word_embeddings=True,
        attention_bias=True, **special_ids,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=PATCHES, vision_feature_layer=-1, vision_feature_select_strategy="default", tie_word_embeddings=True,
        **special_ids,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, max_new_tokens=MAX_NEW_TOKENS, **special_ids
    )
    initialise(model)
    return model


@torch.no_grad()
def initialise(model: LlavaForConditionalGeneration) -> None:
    """Starting values for small widths; with the library's (standard deviation 0.02) training stands still for long.

    Vision positions start as column and row. In the language model queries and keys start equal, so that a word attends to what looks
    like it: the patches of a thing, once they are described by the same words. Two heads attend to that alone; biases let the others
    start on the token before, on the second and third before, and on about a dozen of the last ones.
    """
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and ("layers" in name or "projector" in name):
            weight.normal_(0, weight.shape[1] ** -0.5)
    for layer in model.model.language_model.layers:
        layer.self_attn.o_proj.weight *= 0.2
        layer.mlp.down_proj.weight *= 0.2
        query, key = layer.self_attn.q_proj, layer.self_attn.k_proj
        query.weight *= 0.7
        key.weight.copy_(query.weight)
        for head, (back, fastest) in enumerate(((1, 0), (2, 0), (3, 0), (4, 4))):
            attend_back(query, key, head, back, fastest)
    model.get_input_embeddings().weight.normal_(0, 0.1)
    seen = model.model.vision_tower.embeddings
    seen.patch_embedding.weight.normal_(0, 0.1)
    side, place = SIDE // CELL, torch.arange(PATCHES)
    seen.position_embedding.weight.zero_()
    seen.position_embedding.weight[1:, : 2 * side] = torch.cat(
        [F.one_hot(place % side), F.one_hot(place // side)], 1
    ).float()


def attend_back(query: torch.nn.Linear, key: torch.nn.Linear, head: int, back: int, fastest: int) -> None:
    """Biases of one head that, turned by the rotary embedding, agree best `back` tokens ago; `fastest` 0 is sharp, 4 is wide."""
    pairs = torch.arange(fastest, fastest + 4)
    turned = back * 10_000.0 ** (-pairs / (HEAD_SIZE / 2))
    first, second = head * HEAD_SIZE + pairs, head * HEAD_SIZE + HEAD_SIZE // 2 + pairs
    key.bias[first], query.bias[first], query.bias[second] = 4.0, 4.0 * turned.cos(), -4.0 * turned.sin()
    for part in (query, key):
        part.weight[head * HEAD_SIZE : (head + 1) * HEAD_SIZE] *= 0.3


def anneal(optimizers: Iterable[torch.optim.Optimizer], done: float) -> None:
    """Warm-up over the first tenth, cosine decay to a twentieth; `done` in [0, 1]."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            peak = group.setdefault("peak", group["lr"])
            group["lr"] = peak * min(0.1 + 9 * done, max(0.05, 0.5 + 0.5 * math.cos(math.pi * done)))


def pixels(pictures: Sequence[Image.Image]) -> Tensor:
    """[B, 3, 48, 48] in [-1, 1], as the processor makes them."""
    return (
        torch.from_numpy(np.stack([np.asarray(picture, np.float32) for picture in pictures])).permute(0, 3, 1, 2)
        / 127.5
        - 1
    )


def look(model: LlavaForConditionalGeneration, pictures: Sequence[Image.Image]) -> Tensor:
    """[B, 36, 96] what the language model is given for the patches."""
    return model.model.multi_modal_projector(model.model.vision_tower(pixels(pictures)).last_hidden_state[:, 1:])


def patch_targets(scene: Scene, words: dict[str, int]) -> tuple[list[list[int]], list[list[int]]]:
    """Per patch its two words (a blank twice for the background), and the eight digits of its thing's box (ignored there)."""
    named, digits = [], []
    for place in range(PATCHES):
        x, y = place % (SIDE // CELL) * CELL, place // (SIDE // CELL) * CELL
        here = [t for t in scene.things if t.box[0] <= x < t.box[2] and t.box[1] <= y < t.box[3]]
        named.append([words[here[0].colour], words[here[0].shape]] if here else [words[" "]] * 2)
        digits.append([int(d) for side in here[0].box for d in f"{side:02d}"] if here else [IGNORE_INDEX] * 8)
    return named, digits


def train_eyes(model: LlavaForConditionalGeneration, words: dict[str, int], args: argparse.Namespace) -> None:
    """Stage 1: every patch is described by the words of its thing, in the language model's own embeddings, and knows its box."""
    rng = random.Random(args.seed)
    where = torch.nn.Linear(96, 8 * 10)
    parts = [model.model.vision_tower, model.model.multi_modal_projector]
    named = [(name, weight) for part in parts for name, weight in part.named_parameters()]
    hidden = [weight for name, weight in named if weight.ndim == 2 and "embedding" not in name]
    rest = [weight for name, weight in named if weight.ndim != 2 or "embedding" in name]
    rest += [*where.parameters(), model.get_input_embeddings().weight]
    optimizers = [
        torch.optim.Muon(hidden, lr=2e-2, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=3e-3, weight_decay=0.01, betas=(0.9, 0.98)),
    ]
    for step in range(args.eye_steps):
        drawn = [draw_picture(rng, reserved=False) for _ in range(BATCH_SIZE)]
        targets = [patch_targets(scene, words) for scene, _ in drawn]
        seen = look(model, [picture for _, picture in drawn])
        described = model.lm_head(F.rms_norm(seen, seen.shape[-1:])).log_softmax(-1)
        loss = -described.gather(-1, torch.tensor([words_ for words_, _ in targets])).mean()
        digits = torch.tensor([digits_ for _, digits_ in targets])
        loss = loss + F.cross_entropy(where(seen).reshape(-1, 10), digits.flatten(), ignore_index=IGNORE_INDEX)
        update(loss, optimizers, step / args.eye_steps)
        if step % 20 == 0 or step + 1 == args.eye_steps:
            print(f"eyes    step {step:4d}  loss {loss.item():.4f}  {time.process_time():.0f}s")


def update(loss: Tensor, optimizers: Sequence[torch.optim.Optimizer], done: float) -> None:
    """One clipped step of all optimizers."""
    anneal(optimizers, done)
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_([w for o in optimizers for group in o.param_groups for w in group["params"]], 1.0)
    for optimizer in optimizers:
        optimizer.step()


def slip(question: Question, args: argparse.Namespace, rng: random.Random) -> str:
    """The right word, or with some probability another one of the options: rather the lookalike, where it is among them."""
    right = question.word(question.thing)
    like = LOOKALIKES.get(right)
    if like in question.options and rng.random() < args.lookalike_rate:
        return str(like)
    if rng.random() < args.slip_rate:
        return rng.choice([word for word in question.options if word != right])
    return right


def answer(
    scene: Scene, question: Question, kind: str, noisy: bool, args: argparse.Namespace, rng: random.Random
) -> str:
    """``disc (A)`` or ``disc [08,16,24,32]``; noisy ones slip, jitter and sometimes mean a place where nothing is."""
    word = slip(question, args, rng) if noisy else question.word(question.thing)
    if kind == "choice":
        return f"{word} ({LETTERS[question.options.index(word)]})"
    box: Box = next(thing.box for thing in scene.things if question.word(thing) == word)
    if noisy:
        x, y = box[:2]
        if rng.random() < args.astray_rate:
            x, y = (rng.randint(0, SIDE - SIZE) for _ in range(2))
        x, y = (min(max(0, side + rng.randint(-args.jitter, args.jitter)), SIDE - SIZE) for side in (x, y))
        box = (x, y, x + SIZE, y + SIZE)
    return f"{word} [{','.join(f'{side:02d}' for side in box)}]"


def batch(
    tokenizer: PreTrainedTokenizerFast, kind: str, stage: str, args: argparse.Namespace, rng: random.Random
) -> tuple[dict[str, Tensor], Tensor]:
    """Right-padded inputs of the model, and labels: the answer and EOS; in stage letters, without picture, only from the letter on."""
    rows, targets, pictures = [], [], []
    for _ in range(BATCH_SIZE if stage == "letters" else BATCH_SIZE // 2):
        scene, picture = draw_picture(rng, reserved=False)
        question = ask(scene, kind, rng)
        text = answer(scene, question, kind, stage == "noisy", args, rng)
        prompt = question.text if stage == "letters" else IMAGE_TOKEN * PATCHES + question.text
        # apart, as in sampling: together the last word of the question and the first of the answer would be no words any more
        before = tokenizer.encode(prompt)
        ids = [*before, *tokenizer.encode(text), tokenizer.eos_token_id]
        asked = len(ids) - 3 if stage == "letters" else len(before)  # the letter, a bracket and EOS
        rows.append(torch.tensor(ids))
        targets.append(torch.tensor([IGNORE_INDEX] * asked + ids[asked:]))
        pictures.append(picture)
    pad = torch.nn.utils.rnn.pad_sequence
    inputs = {"input_ids": pad(rows, True, tokenizer.pad_token_id)}
    if stage != "letters":
        inputs["pixel_values"] = pixels(pictures)
    return inputs, pad(targets, True, IGNORE_INDEX)


def train_answers(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, stage: str, args: argparse.Namespace
) -> None:
    """Stages 2 to 4: supervised next-token training of the language model; the eyes stay, lest early noise blinds them."""
    rng = random.Random(f"{args.seed} {stage}")
    steps, lr = getattr(args, f"{stage}_steps"), 1e-3 if stage == "noisy" else 3e-3
    optimizer = torch.optim.AdamW(model.model.language_model.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    for step in range(steps):
        losses = []
        for kind in ("choice",) if stage == "letters" else ("click", "choice"):
            inputs, labels = batch(tokenizer, kind, stage, args, rng)
            # The padding is on the right, so causal attention needs no mask.
            hidden = model.model(**inputs).last_hidden_state[:, :-1]
            answered = labels[:, 1:] != IGNORE_INDEX
            losses.append(F.cross_entropy(model.lm_head(hidden[answered]), labels[:, 1:][answered]))
        update(torch.stack(losses).mean(), [optimizer], step / steps)
        if step % 20 == 0 or step + 1 == steps:
            shown = "  ".join(f"{part.item():.4f}" for part in losses)
            print(f"{stage:7} step {step:4d}  loss {shown}  {time.process_time():.0f}s")


def write_prompts(folder: Path, per_split: int, seed: int) -> None:
    """Disjoint ``train`` and ``heldout`` pictures, and for each kind of question prompts and labels, one question per picture."""
    rng = random.Random(seed)
    drawn: dict[bytes, tuple[Scene, Image.Image]] = {}
    while len(drawn) < 2 * per_split:
        scene, picture = draw_picture(rng, reserved=True)
        drawn.setdefault(picture.tobytes(), (scene, picture))
    (folder / "pictures").mkdir(exist_ok=True)
    chosen = list(drawn.values())
    for split, chunk in (("train", chosen[:per_split]), ("heldout", chosen[per_split:])):
        for i, (_, picture) in enumerate(chunk):
            picture.save(folder / "pictures" / f"{split}-{i:03d}.png", optimize=True)
        for kind in ("click", "choice"):
            rows = []
            for i, (scene, _) in enumerate(chunk):
                question, name = ask(scene, kind, rng), f"{kind}-{split}-{i:03d}"
                row = {"id": name, "prompt": question.text, "images": [f"pictures/{split}-{i:03d}.png"]}
                kept = {"image_size": [SIDE, SIDE], "data_source": scene.theme, "data_type": question.by}
                right = question.word(question.thing)
                label = str(list(question.thing.box)) if kind == "click" else LETTERS[question.options.index(right)]
                rows.append((row | kept, label))
            write_pair(folder, f"{kind}.{split}", rows)


def main() -> None:
    """Parse the arguments and build the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--prompts-only", action="store_true", help="write pictures, prompts and labels, no model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=96, help="per split and kind of question")
    parser.add_argument("--eye-steps", type=int, default=100)
    parser.add_argument("--letters-steps", type=int, default=300)
    parser.add_argument("--clean-steps", type=int, default=260)
    parser.add_argument("--noisy-steps", type=int, default=150)
    parser.add_argument("--slip-rate", type=float, default=0.3, help="another option is meant")
    parser.add_argument(
        "--lookalike-rate", type=float, default=0.35, help="the lookalike is meant, where it is an option"
    )
    parser.add_argument("--astray-rate", type=float, default=0.2, help="a click lands anywhere")
    parser.add_argument("--jitter", type=int, default=3, help="largest shift of a box in pixels")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    write_prompts(args.out, args.prompts, args.seed)
    if args.prompts_only:
        return
    torch.manual_seed(args.seed)
    processor = build_processor()
    model = build_model(processor.tokenizer)
    train_eyes(model, processor.tokenizer.get_vocab(), args)
    for stage in ("letters", "clean", "noisy"):
        train_answers(model, processor.tokenizer, stage, args)
    model.save_pretrained(args.out)
    # The weights are written readable by their owner only, which breaks shared installs.
    (args.out / "model.safetensors").chmod(0o644)
    processor.save_pretrained(args.out)


if __name__ == "__main__":
    main()
