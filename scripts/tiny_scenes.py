"""What the bundled ``tiny-eyes`` model looks at: small screens with three coloured shapes, and questions about them.

A screen is 48 x 48 pixels, light or dark, with three shapes of 16 x 16 pixels whose forms and colours differ. There are two kinds of
questions about one of them: *click* (where is it? a box in pixels) and *choice* (which colour, which shape? one of four letters).

Screens are split by a hash of their pixels: one in sixteen is reserved for the bundled prompts, and nothing is trained on these.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

SIDE = 48
CELL = 8
SIZE = 2 * CELL
LETTERS = "ABCD"
SHAPES = ("frame", "disc", "cross", "tent")
COLOURS = {
    "red": (220, 40, 40), "pink": (240, 120, 190), "blue": (50, 80, 220), "cyan": (40, 200, 210), "green": (40, 170, 60),
    "gold": (235, 190, 30),
}  # fmt: skip
THEMES = {"light": (240, 240, 240), "dark": (30, 30, 30)}

Box = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Thing:
    """A shape on the screen; its box is half open, in pixels."""

    shape: str
    colour: str
    box: Box


@dataclass(frozen=True, slots=True)
class Scene:
    """A theme and three things that differ in shape and in colour."""

    theme: str
    things: tuple[Thing, ...]


@dataclass(frozen=True, slots=True)
class Question:
    """A text about one thing of the scene."""

    text: str
    thing: Thing
    by: str
    """what the text names of the thing: colour | shape"""
    options: tuple[str, ...]
    """the four words of a choice; for a click, what the things are called that could be meant"""

    def word(self, thing: Thing) -> str:
        """The name of a thing that the text does not give away."""
        return thing.shape if self.by == "colour" else thing.colour


def draw_scene(rng: random.Random) -> Scene:
    """A random scene on a grid of 8 pixels; things may touch, but do not overlap."""
    boxes: list[Box] = []
    while len(boxes) < 3:
        x, y = (CELL * rng.randrange((SIDE - SIZE) // CELL + 1) for _ in range(2))
        if all(abs(x - a) >= SIZE or abs(y - b) >= SIZE for a, b, *_ in boxes):
            boxes.append((x, y, x + SIZE, y + SIZE))
    looks = zip(rng.sample(SHAPES, 3), rng.sample(list(COLOURS), 3), boxes, strict=True)
    return Scene(theme=rng.choice(list(THEMES)), things=tuple(Thing(*look) for look in looks))


def paint(scene: Scene) -> Image.Image:
    """The picture of a scene, RGB, 48 x 48; a margin of one pixel inside every box."""
    picture = Image.new("RGB", (SIDE, SIDE), THEMES[scene.theme])
    pen = ImageDraw.Draw(picture)
    for thing in scene.things:
        left, top, right, bottom = thing.box[0] + 1, thing.box[1] + 1, thing.box[2] - 2, thing.box[3] - 2
        fill = COLOURS[thing.colour]
        if thing.shape == "frame":
            pen.rectangle((left, top, right, bottom), outline=fill, width=3)
        elif thing.shape == "disc":
            pen.ellipse((left, top, right, bottom), fill=fill)
        elif thing.shape == "cross":
            pen.rectangle((left + 4, top, right - 4, bottom), fill=fill)
            pen.rectangle((left, top + 4, right, bottom - 4), fill=fill)
        else:
            pen.polygon(((left, bottom), (right, bottom), ((left + right) // 2, top)), fill=fill)
    return picture


def is_reserved(picture: Image.Image) -> bool:
    """Whether the picture belongs to the side of the split that the bundled prompts come from (1 in 16)."""
    return hashlib.sha256(picture.tobytes()).digest()[0] % 16 == 0


def draw_picture(rng: random.Random, reserved: bool) -> tuple[Scene, Image.Image]:
    """A random scene and its picture, from one side of the split."""
    while True:
        scene = draw_scene(rng)
        picture = paint(scene)
        if is_reserved(picture) == reserved:
            return scene, picture


def ask(scene: Scene, kind: str, rng: random.Random) -> Question:
    """A random question of one kind.

    click:  ``click red``, ``click disc``
    choice: ``disc A tent B frame C cross D shape of red``, ``red A blue B pink C gold D colour of disc``
    """
    thing, by = rng.choice(scene.things), rng.choice(("colour", "shape"))
    named = thing.colour if by == "colour" else thing.shape
    if kind == "click":
        names = tuple(other.shape if by == "colour" else other.colour for other in scene.things)
        return Question(f"click {named}", thing, by, names)
    if by == "colour":
        options = rng.sample(SHAPES, 4)
    else:
        # the colours of the other things are among the options: they are the mistakes one can make
        present = [other.colour for other in scene.things]
        absent = rng.choice([colour for colour in COLOURS if colour not in present])
        options = rng.sample([*present, absent], 4)
    listed = "".join(f"{option} {letter} " for letter, option in zip(LETTERS, options, strict=True))
    return Question(f"{listed}{'shape' if by == 'colour' else 'colour'} of {named}", thing, by, tuple(options))
