"""Training rows that are no conversations: lessons, each of which teaches one thing that answers need.

    patches   what each patch shows, all of them in turn: 64 words for a picture teach the tower to see, and the decoder to read a patch
    places    the same, and of scenes with few objects also which from the left (right, top, bottom) each is, and how many are like it
    pairs     each object's words in turn, in any order: a word finds the patches that show it, and these say what else they show
    restated  short questions, whose answers begin with what was asked about: the same, asked
    order     the same, mostly about what stands where: answers say on the way which object is which

From conversations alone a model of this size learns to look up nothing for thousands of steps: most of their words can be guessed.
"""

import numpy as np

from scenes import COLOUR_NAMES, MIN_GAP, NUMBER, SHAPES, SIDES, plural

GRID = 8  # patches in a row


def patch_objects(scene, pad):
    """For each patch, row by row, the index of the object that it shows, -1 for none."""
    scale = min(scene.width, scene.height) / max(scene.width, scene.height) if pad else 1.0
    centres = (np.arange(GRID) + 0.5) / GRID
    out = np.full((GRID, GRID), -1)
    for k, o in enumerate(scene.objects):
        u, v = ((1 - scale) / 2 + c * scale for c in (o.x, o.y))
        distance = np.hypot(centres[None, :] - u, centres[:, None] - v)
        out[(distance < 0.45 * o.diameter * scale) | (distance == distance.min())] = k
    return out.reshape(-1)


def rank(scene, o, key):
    """Which `o` is, in words: one, two or three by `key`."""
    return NUMBER[sum(key(p) < key(o) for p in scene.objects) + 1]


def how_many(scene, value, key):
    return NUMBER[sum(key(o) == value for o in scene.objects)]


# All of one length in tokens: each word of an answer then lies as far behind its patch. What an object is:
KINDS = {
    "What shape is where?": lambda scene, o: o.shape,
    "What color is where?": lambda scene, o: o.colour,
    "What size is where?": lambda scene, o: o.size,
}
# Where it is among the others and how many are like it: in scenes of at most three.
PLACES = {
    "What left is where?": lambda scene, o: rank(scene, o, lambda p: p.x),
    "What right is where?": lambda scene, o: rank(scene, o, lambda p: -p.x),
    "What top is where?": lambda scene, o: rank(scene, o, lambda p: p.y),
    "What bottom is where?": lambda scene, o: rank(scene, o, lambda p: -p.y),
    "What shapes is where?": lambda scene, o: how_many(scene, o.shape, lambda p: p.shape),
    "What colour is where?": lambda scene, o: how_many(scene, o.colour, lambda p: p.colour),
}
# Of the whole picture, so that every patch says it.
WHOLE = {
    "What objects is where?": lambda scene: NUMBER[len(scene.objects)],
    "What background is where?": lambda scene: scene.background,
}


def patches(scene, pad, crowded, rng):
    """Three turns of 64 words each, in any order, or what is asked would be told by the turn."""
    shown = patch_objects(scene, pad)
    if crowded:
        questions = [*KINDS]
    else:
        questions = rng.sample([*KINDS, *PLACES], 3)
        if rng.random() < 0.25:  # what all patches say is learnt soon
            questions[0] = rng.choice([*WHOLE])
    rng.shuffle(questions)
    turns = []
    for question in questions:
        if question in WHOLE:
            words = [WHOLE[question](scene)] * len(shown)
        else:
            say = KINDS.get(question) or PLACES[question]
            words = ["no" if k < 0 else say(scene, scene.objects[k]) for k in shown]
        turns.append((question, " ".join(words)))
    return turns


def pairs(scene, rng):
    """Two turns: objects in any order, first by colour, then by shape."""

    def shuffled():
        return rng.sample(scene.objects, len(scene.objects))

    return [
        ("objects by color?", " ".join(f"{o.colour} {o.shape} {o.size}" for o in shuffled())),
        ("objects by shape?", " ".join(f"{o.shape} {o.colour} {o.size}" for o in shuffled())),
    ]


AXES = {"left": lambda o: o.x, "right": lambda o: o.x, "above": lambda o: o.y, "below": lambda o: o.y}


def restated(scene, rng, turns, crowded, share):
    """At most `turns` short questions, in words that each are one token; answers begin with what was asked about, so that one step leads
    from each word to the next. `share` of them at most are about what stands where, of which crowds have none."""
    out, order = [], []
    by_height = sorted(scene.objects, key=lambda o: o.y)
    is_clear = all(b.y - a.y >= MIN_GAP for a, b in zip(by_height, by_height[1:]))  # what stands above what

    def is_only(o, *keys):
        return sum(all(getattr(o, key) == getattr(p, key) for key in keys) for p in scene.objects) == 1

    def ask(what, reference, answer, out=out):
        """`reference` tells one object from all others."""
        out.append((f"{what} {reference}?", f"{reference.removesuffix(' object')} {answer}"))

    for k, o in enumerate(scene.objects):
        names = [o.name]
        if is_only(o, "shape"):
            ask("color of", o.shape, o.colour)
            ask("size of", o.shape, o.size)
            names.append(o.shape)
        if is_only(o, "colour"):
            ask("shape of", f"{o.colour} object", o.shape)
            ask("size of", f"{o.colour} object", o.size)
            names.append(f"{o.colour} object")
        if is_only(o, "size"):
            ask("shape of", f"{o.size} object", o.shape)
            ask("color of", f"{o.size} object", o.colour)
        if is_only(o, "size", "shape"):
            ask("color of", f"{o.size} {o.shape}", o.colour)
        if is_only(o, "size", "colour"):
            ask("shape of", f"{o.size} {o.colour} object", o.shape)
        ask("size of", o.name, o.size)
        if not crowded:
            number = NUMBER[k + 1]
            ask("which one is", rng.choice(names), number, order)
            order.append((f"object {number}?", f"{number} {o.size} {o.name}"))
            for side, along in AXES.items():
                if side in ("left", "right") or is_clear:
                    # by way of numbers: which it is, counted along the axis, and which the others are that stand there
                    found = [f"{rank(scene, p, along)} {p.name}" for p in scene.objects if SIDES[side][1](p, o)]
                    ask(f"{side} of", rng.choice(names), " ".join([rank(scene, o, along), *(found or ["Nothing"])]), order)
    if not crowded:
        for shape in sorted({rng.choice(SHAPES), *(o.shape for o in scene.objects)}):
            out.append((f"many {plural(shape)}?", f"{plural(shape)} {how_many(scene, shape, lambda o: o.shape)}"))
        for colour in sorted({rng.choice(COLOUR_NAMES), *(o.colour for o in scene.objects)}):
            out.append((f"many {colour} objects?", f"{colour} {how_many(scene, colour, lambda o: o.colour)}"))
        ends = {"leftmost": scene.objects[0], "rightmost": scene.objects[-1]}
        if is_clear:
            ends |= {"highest": by_height[0], "lowest": by_height[-1]}
        order += [(f"object {end}?", f"{end} {o.size} {o.name}") for end, o in ends.items()]
    rng.shuffle(order)
    order = order[: round(share * turns)]
    chosen = order + rng.sample(out, min(len(out), turns - len(order)))
    rng.shuffle(chosen)
    return chosen
