"""Synthetic scenes, and questions about them whose answers follow from the scene alone.

A scene is one to three coloured shapes on a plain, gradient or noisy background.
Everything is a function of an integer seed, so a data set is named by its seeds.

Coordinates: object centres and diameters are in units of the picture's centre
square (side = shorter edge), because the llava-hf preprocessing crops to it.
"""

import io
import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ["circle", "square", "triangle", "star", "cross", "diamond", "ring"]
COLOURS = {
    "red": (215, 32, 38),
    "green": (38, 160, 58),
    "blue": (38, 75, 215),
    "yellow": (245, 218, 40),
    "orange": (245, 128, 22),
    "purple": (142, 48, 178),
    "black": (20, 20, 22),
    "white": (246, 246, 246),
}
COLOUR_NAMES = list(COLOURS)
SIZES = {"small": (0.19, 0.22), "large": (0.34, 0.40)}
SIZE_NAMES = list(SIZES)
BACKGROUNDS = ["plain", "gradient", "noisy"]
BACKGROUND_PHRASE = {"plain": "plain", "gradient": "a gradient", "noisy": "noisy"}

# Below this distance (in centre-square units) "left of" and "above" would be a matter of taste.
MIN_GAP = 0.14


@dataclass
class Object:
    shape: str
    colour: str
    size: str
    x: float
    y: float
    diameter: float
    angle: float
    rgb: tuple

    @property
    def name(self):
        return f"{self.colour} {self.shape}"


@dataclass
class Scene:
    seed: int
    width: int
    height: int
    background: str
    tints: list  # one rgb for plain and noisy, two for gradient
    direction: float
    noise: float
    jpeg_quality: int  # 0: never compressed
    objects: list  # left to right


# ---------------------------------------------------------------- sampling


def _picture_size(rng):
    side = rng.randint(160, 360)
    # 4:3 at most: padded to a square, a large object then still looks larger than any small one
    long = side if rng.random() < 0.3 else round(side * rng.uniform(1.05, 4 / 3))
    return (side, long) if rng.random() < 0.4 else (long, side)


def _grey_tint(rng, low, high):
    grey = rng.uniform(low, high)
    return tuple(int(min(215, max(70, grey + rng.uniform(-20, 20)))) for _ in range(3))


def _kinds(rng, count):
    """(shape, colour) of each object, all different; half the scenes repeat a shape or a colour."""
    while True:
        kinds = [(rng.choice(SHAPES), rng.choice(COLOUR_NAMES)) for _ in range(count)]
        if count > 1 and rng.random() < 0.5:
            i, j = rng.sample(range(count), 2)
            kinds[i] = (kinds[j][0], kinds[i][1]) if rng.random() < 0.5 else (kinds[i][0], kinds[j][1])
        if len(set(kinds)) == count:
            return kinds


def _place(rng, diameters, min_gap):
    """(x, y, diameter) of each object, clear of the others; None if there is no room."""
    spots = []
    for d in diameters:
        reach = d / 2 + 0.015
        for _ in range(40):
            x, y = rng.uniform(reach, 1 - reach), rng.uniform(reach, 1 - reach)
            if all(abs(x - a) >= min_gap and math.hypot(x - a, y - b) >= (d + e) / 2 + 0.03 for a, b, e in spots):
                spots.append((x, y, d))
                break
        else:
            return None
    return spots


def sample_scene(seed, width=None, height=None, crowded=False):
    """`crowded`: four to nine objects side by side, to learn shapes from; no questions are asked about these."""
    rng = random.Random(seed)
    picture = _picture_size(rng)
    if width:
        picture = (width, height)
    background = rng.choice(BACKGROUNDS)
    if background == "gradient":
        tints = [_grey_tint(rng, 85, 115), _grey_tint(rng, 165, 200)]
    else:
        tints = [_grey_tint(rng, 100, 185)]
    spots = None
    while spots is None:
        if crowded:
            count = rng.randint(4, 9)
            sizes = ["large" if i < (9 - count) // 2 else "small" for i in range(count)]
        else:
            count = rng.choices([1, 2, 3], [0.2, 0.35, 0.45])[0]
            sizes = [rng.choice(SIZE_NAMES) for _ in range(count)]
        spots = _place(rng, [rng.uniform(*SIZES[s]) for s in sizes], 0 if crowded else MIN_GAP)
    objects = []
    for (shape, colour), size, (x, y, d) in zip(_kinds(rng, count), sizes, spots):
        rgb = tuple(min(255, max(0, c + rng.randint(-12, 12))) for c in COLOURS[colour])
        objects.append(Object(shape, colour, size, x, y, d, rng.uniform(-8, 8), rgb))
    objects.sort(key=lambda o: o.x)
    return Scene(
        seed=seed,
        width=picture[0],
        height=picture[1],
        background=background,
        tints=tints,
        direction=rng.uniform(0, 2 * math.pi),
        noise=rng.uniform(22, 34),
        jpeg_quality=rng.choice([0, 0, rng.randint(50, 95)]),
        objects=objects,
    )


# ---------------------------------------------------------------- rendering

SUPERSAMPLE = 4


def _polygon(shape):
    """Corners in a box of half-width 1, y down."""
    if shape == "square":
        return [(-0.78, -0.78), (0.78, -0.78), (0.78, 0.78), (-0.78, 0.78)]
    if shape == "triangle":
        return [(0, -0.92), (0.95, 0.75), (-0.95, 0.75)]
    if shape == "diamond":
        return [(0, -1), (0.68, 0), (0, 1), (-0.68, 0)]
    if shape == "cross":
        a = 0.3
        return [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)]
    assert shape == "star", shape
    corners = []
    for i in range(10):
        radius = 1.0 if i % 2 == 0 else 0.42
        turn = math.pi * i / 5 - math.pi / 2
        corners.append((radius * math.cos(turn), radius * math.sin(turn)))
    return corners


def _mask(obj, pixels):
    """Antialiased coverage of one object, in a box of pixels x pixels."""
    n = pixels * SUPERSAMPLE
    big = Image.new("L", (n, n), 0)
    draw = ImageDraw.Draw(big)
    half = n / 2 - 1
    if obj.shape in ("circle", "ring"):
        draw.ellipse([1, 1, n - 2, n - 2], fill=255)
        if obj.shape == "ring":
            hole = half * 0.56
            draw.ellipse([n / 2 - hole, n / 2 - hole, n / 2 + hole, n / 2 + hole], fill=0)
    else:
        c, s = math.cos(math.radians(obj.angle)), math.sin(math.radians(obj.angle))
        draw.polygon([(n / 2 + half * (c * x - s * y), n / 2 + half * (s * x + c * y)) for x, y in _polygon(obj.shape)], fill=255)
    return big.reduce(SUPERSAMPLE)


def _background(scene):
    w, h = scene.width, scene.height
    if scene.background == "plain":
        return Image.new("RGB", (w, h), scene.tints[0])
    if scene.background == "gradient":
        # 64 steps a side then bilinear: smooth, and far cheaper than a ramp at full size
        y, x = np.mgrid[0:64, 0:64] / 63 - 0.5
        c, s = math.cos(scene.direction), math.sin(scene.direction)
        t = ((c * x + s * y) / (abs(c) + abs(s)) + 0.5)[..., None]
        ramp = (1 - t) * np.array(scene.tints[0]) + t * np.array(scene.tints[1])
        return Image.fromarray(ramp.round().astype(np.uint8)).resize((w, h), Image.BILINEAR)
    # Noise grains scale with the picture, else resizing to the model's input would average them away.
    grain = max(2, round(min(w, h) / 70))
    noise = np.random.default_rng(scene.seed).normal(0, scene.noise, (h // grain + 1, w // grain + 1, 1))
    noisy = np.clip(np.array(scene.tints[0]) + noise, 0, 255).astype(np.uint8)
    full = Image.fromarray(noisy).resize((noisy.shape[1] * grain, noisy.shape[0] * grain), Image.NEAREST)
    return full.crop((0, 0, w, h))


def render(scene):
    """The picture as PIL RGB, after its JPEG loss if it has one."""
    image = _background(scene)
    side = min(scene.width, scene.height)
    left, top = (scene.width - side) / 2, (scene.height - side) / 2
    for obj in scene.objects:
        pixels = round(obj.diameter * side)
        corner = (round(left + obj.x * side - pixels / 2), round(top + obj.y * side - pixels / 2))
        image.paste(obj.rgb, corner, _mask(obj, pixels))
    if scene.jpeg_quality:
        data = io.BytesIO()
        image.save(data, "JPEG", quality=scene.jpeg_quality)
        image = Image.open(data).convert("RGB")
    return image


# ---------------------------------------------------------------- questions and answers

NUMBER = ["no", "one", "two", "three"]


def _a(phrase):
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def _join(phrases):
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]


def _sentence(text):
    return text[0].upper() + text[1:] + "."


def _named(objects):
    return _sentence(_join([_a(o.name) for o in objects])) if objects else "Nothing."


def plural(shape):
    return shape + ("es" if shape == "cross" else "s")


def _colour_word(rng):
    return rng.choice(["color", "colour"])


def _picture_word(rng):
    return rng.choice(["picture", "image"])


class Cannot(Exception):
    """The scene gives this type of question no unambiguous instance."""


def _pick(rng, items):
    items = list(items)
    if not items:
        raise Cannot
    return rng.choice(items)


def _only(scene, key):
    """Objects that `key` tells from all others of the scene."""
    return [o for o in scene.objects if sum(key(o) == key(p) for p in scene.objects) == 1]


def q_describe(scene, rng):
    phrases = [_a(f"{o.size} {o.name}") for o in scene.objects]
    question = rng.choice(
        [
            f"Describe the {_picture_word(rng)}.",
            f"Describe this {_picture_word(rng)} in detail.",
            "Describe the scene.",
            f"Can you describe the {_picture_word(rng)}?",
        ]
    )
    ground = {"plain": "a plain background", "gradient": "a gradient background", "noisy": "a noisy background"}
    return question, _sentence(_join(phrases) + " on " + ground[scene.background]), None


def q_list(scene, rng):
    question = rng.choice(
        [
            f"What is in this {_picture_word(rng)}?",
            f"What is in the {_picture_word(rng)}?",
            f"What objects are in the {_picture_word(rng)}?",
            "What do you see?",
            f"What do you see in this {_picture_word(rng)}?",
            "What is this?",
            "List the objects.",
        ]
    )
    return question, _named(scene.objects), scene.objects[0] if len(scene.objects) == 1 else None


def q_count(scene, rng):
    question = rng.choice(
        [
            "How many objects are there?",
            f"How many objects are in the {_picture_word(rng)}?",
            "How many shapes are there?",
            "How many objects do you see?",
            "Count the objects.",
        ]
    )
    n = len(scene.objects)
    return question, ("There is one object." if n == 1 else f"There are {NUMBER[n]} objects."), None


def q_count_of(scene, rng):
    if rng.random() < 0.5:
        value = rng.choice(scene.objects).shape if rng.random() < 0.75 else rng.choice(SHAPES)
        n = sum(o.shape == value for o in scene.objects)
        asked, one = plural(value), value
    else:
        value = rng.choice(scene.objects).colour if rng.random() < 0.75 else rng.choice(COLOUR_NAMES)
        n = sum(o.colour == value for o in scene.objects)
        asked, one = f"{value} objects", f"{value} object"
    question = rng.choice([f"How many {asked} are there?", f"How many {asked} do you see?", f"How many {asked} are in the {_picture_word(rng)}?"])
    return question, (f"There is one {one}." if n == 1 else f"There are {NUMBER[n]} {asked}."), None


def q_colour(scene, rng):
    options = [(o, o.shape) for o in _only(scene, lambda o: o.shape)]
    options += [(o, f"{o.size} {o.shape}") for o in _only(scene, lambda o: (o.size, o.shape))]
    options += [(o, f"{o.size} object") for o in _only(scene, lambda o: o.size)]
    obj, reference = _pick(rng, options)
    word = _colour_word(rng)
    question = rng.choice(
        [
            f"What {word} is the {reference}?",
            f"What is the {word} of the {reference}?",
            f"Which {word} does the {reference} have?",
            f"What {word} does the {reference} have?",
            f"Tell me the {word} of the {reference}.",
        ]
    )
    return question, f"The {reference} is {obj.colour}.", obj


def q_shape(scene, rng):
    options = [(o, f"{o.colour} object") for o in _only(scene, lambda o: o.colour)] * 2
    options += [(o, f"{o.size} {o.colour} object") for o in _only(scene, lambda o: (o.size, o.colour))]
    options += [(o, f"{o.size} object") for o in _only(scene, lambda o: o.size)]
    obj, reference = _pick(rng, options)
    question = rng.choice(
        [
            f"What shape is the {reference}?",
            f"What is the shape of the {reference}?",
            f"Which shape does the {reference} have?",
            f"What is the {reference}?",
            f"What kind of shape is the {reference}?",
        ]
    )
    return question, f"It is {_a(obj.shape)}.", obj


def q_exists(scene, rng):
    """Half yes, half no; half of the no-questions miss a present object by one attribute only."""
    kinds = {(o.shape, o.colour) for o in scene.objects}
    shape, colour = rng.choice(SHAPES), rng.choice(COLOUR_NAMES)
    form = rng.choice(["name", "name", "shape", "colour"])
    present = rng.choice(scene.objects)
    if rng.random() < 0.5:
        shape, colour = present.shape, present.colour
    elif rng.random() < 0.5 and form == "name":
        shape, colour = (present.shape, colour) if rng.random() < 0.5 else (shape, present.colour)
    if form == "shape":
        asked, yes = _a(shape), any(s == shape for s, _ in kinds)
    elif form == "colour":
        asked, yes = _a(f"{colour} object"), any(c == colour for _, c in kinds)
    else:
        asked, yes = _a(f"{colour} {shape}"), (shape, colour) in kinds
    question = rng.choice(
        [
            f"Is there {asked}?",
            f"Is there {asked} in the {_picture_word(rng)}?",
            f"Do you see {asked}?",
            f"Does the {_picture_word(rng)} contain {asked}?",
            f"Can you see {asked}?",
        ]
    )
    return question, ("Yes." if yes else "No."), None


SIDES = {
    "left": (["to the left of", "left of"], lambda o, r: o.x < r.x),
    "right": (["to the right of", "right of"], lambda o, r: o.x > r.x),
    "above": (["above"], lambda o, r: o.y < r.y),
    "below": (["below"], lambda o, r: o.y > r.y),
}


def _relation(scene, rng, reference, phrase):
    others = [o for o in scene.objects if o is not reference]
    sides = ["left", "right"]
    if all(abs(o.y - reference.y) >= MIN_GAP for o in others):
        sides += ["above", "below"]
    side = rng.choice(sides)
    words, holds = SIDES[side]
    found = [o for o in others if holds(o, reference)]
    # "Nothing" is cheap to guess and would fill half the answers: mostly ask where something is
    if not found and rng.random() < 0.7:
        raise Cannot
    question = rng.choice(
        [
            f"What is {rng.choice(words)} {phrase}?",
            f"Which objects are {rng.choice(words)} {phrase}?" if len(found) != 1 else f"Which object is {rng.choice(words)} {phrase}?",
            f"What do you see {rng.choice(words)} {phrase}?",
        ]
    )
    return question, _named(found), found[0] if len(found) == 1 else None


def q_relation(scene, rng):
    if len(scene.objects) < 2:
        raise Cannot
    reference = rng.choice(scene.objects)
    names = [f"the {reference.name}"]
    if reference in _only(scene, lambda o: o.shape):
        names.append(f"the {reference.shape}")
    if reference in _only(scene, lambda o: o.colour):
        names.append(f"the {reference.colour} object")
    return _relation(scene, rng, reference, rng.choice(names))


def q_larger(scene, rng):
    if len(scene.objects) < 2:
        raise Cannot
    obj = _pick(rng, _only(scene, lambda o: o.size))
    if obj.size == "large":
        words = ["larger", "bigger"] if len(scene.objects) == 2 else ["largest", "biggest"]
    else:
        words = ["smaller"] if len(scene.objects) == 2 else ["smallest"]
    word = rng.choice(words)
    return rng.choice([f"Which object is {word}?", f"What is the {word} object?", f"Which one is the {word}?"]), _named([obj]), obj


def q_position(scene, rng):
    n = len(scene.objects)
    if n < 2:
        raise Cannot
    options = [
        (scene.objects[0], ["on the far left", "the leftmost object"]),
        (scene.objects[-1], ["on the far right", "the rightmost object"]),
    ]
    if n == 3:
        options.append((scene.objects[1], ["in the middle from left to right", "the second object from the left"]))
    by_y = sorted(scene.objects, key=lambda o: o.y)
    if by_y[1].y - by_y[0].y >= MIN_GAP:
        options.append((by_y[0], ["at the top", "the highest object"]))
    if by_y[-1].y - by_y[-2].y >= MIN_GAP:
        options.append((by_y[-1], ["at the bottom", "the lowest object"]))
    obj, words = rng.choice(options)
    word = rng.choice(words)
    return f"What is {word}?", _named([obj]), obj


def q_background(scene, rng):
    question = rng.choice(["What is the background like?", "What kind of background is it?", "Describe the background.", "How does the background look?"])
    return question, f"The background is {BACKGROUND_PHRASE[scene.background]}.", None


def q_size(scene, rng):
    obj = rng.choice(scene.objects)
    names = [obj.name]
    if obj in _only(scene, lambda o: o.shape):
        names.append(obj.shape)
    name = rng.choice(names)
    question = rng.choice([f"How big is the {name}?", f"Is the {name} small or large?", f"What size is the {name}?"])
    return question, f"The {name} is {obj.size}.", obj


def q_follow_up(scene, rng, it):
    """Questions about "it": the one object that the turn before spoke of."""
    if it is None:
        raise Cannot
    form = rng.choice(["size", "colour", "shape", "relation", "relation"])
    if form == "size":
        return rng.choice(["How big is it?", "Is it small or large?"]), f"It is {it.size}.", it
    if form == "colour":
        word = _colour_word(rng)
        return rng.choice([f"What {word} is it?", f"And what {word} is it?"]), f"It is {it.colour}.", it
    if form == "shape":
        return rng.choice(["What shape is it?", "And what shape is it?"]), f"It is {_a(it.shape)}.", it
    if len(scene.objects) < 2:
        raise Cannot
    return _relation(scene, rng, it, "it")


QUESTIONS = {
    # name: (function, weight in a conversation)
    "describe": (q_describe, 8),
    "list": (q_list, 10),
    "count": (q_count, 8),
    "count_of": (q_count_of, 7),
    "colour": (q_colour, 15),
    "shape": (q_shape, 15),
    "exists": (q_exists, 9),
    "relation": (q_relation, 13),
    "larger": (q_larger, 4),
    "position": (q_position, 7),
    "background": (q_background, 3),
    "size": (q_size, 4),
    "follow_up": (q_follow_up, 7),
}
_TYPES = list(QUESTIONS)
WEIGHTS = [weight for _, weight in QUESTIONS.values()]
# What training asks: the kinds that are learnt last come more often. Evaluation keeps to WEIGHTS.
_OFTEN = {"relation": 40, "count_of": 16, "position": 15, "exists": 12, "follow_up": 9, "colour": 8, "shape": 8, "list": 7, "count": 4}
TRAINING_WEIGHTS = [_OFTEN.get(kind, weight) for kind, weight in zip(_TYPES, WEIGHTS)]


def spoken_of(scene, answer, it):
    """The objects behind an answer's attribute words, in the order of speaking."""
    if it is not None:
        return [it]
    names = [word.strip(",.") for word in answer.split()]
    pairs = set(zip(names, names[1:]))
    return [o for o in scene.objects if (o.colour, o.shape) in pairs]


def conversation(scene, seed, turns, with_objects=False, weights=WEIGHTS):
    """[(type, question, answer)], no question asked twice; `with_objects` adds what each answer speaks of.

    `weights`: how often each kind of question is asked, in the order of QUESTIONS.
    """
    rng = random.Random(seed)
    out, asked, it = [], set(), None
    while len(out) < turns:
        kind = rng.choices(_TYPES, weights)[0]
        function = QUESTIONS[kind][0]
        try:
            question, answer, referent = function(scene, rng, it) if kind == "follow_up" else function(scene, rng)
        except Cannot:
            continue
        # "it" means another object each time, so a follow-up may be repeated
        if question in asked and kind != "follow_up":
            continue
        asked.add(question)
        out.append((kind, question, answer, spoken_of(scene, answer, referent)) if with_objects else (kind, question, answer))
        it = referent
    return out
