"""Training rows that are no conversations: lessons, each of which teaches one thing that answers need.

    patches   what each patch shows, all of them in turn: 64 words for a picture teach the tower to see, and the decoder to read a patch
    pairs     each object's words in turn, in any order: a word finds the patches that show it, and these say what else they show
    restated  short questions, whose answers begin with what was asked about: the same, asked
    drills    the same questions with answers of a word or two

From conversations alone a model of this size learns to look up nothing for thousands of steps: most of their words can be guessed.
"""

import numpy as np

from scenes import NUMBER

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


# All of one length in tokens: each word of an answer then lies as far behind its patch.
PATCH_QUESTIONS = {
    "What shape is where?": lambda scene, k: scene.objects[k].shape,
    "What color is where?": lambda scene, k: scene.objects[k].colour,
    "What size is where?": lambda scene, k: scene.objects[k].size,
    "What number is where?": lambda scene, k: NUMBER[k + 1],
}


def patches(scene, pad, crowded):
    """Three turns; objects have numbers, from left to right, where there are few."""
    shown = patch_objects(scene, pad)
    questions = [q for q in PATCH_QUESTIONS if q != ("What number is where?" if crowded else "What size is where?")]
    return [(q, " ".join("no" if k < 0 else PATCH_QUESTIONS[q](scene, k) for k in shown)) for q in questions]


def pairs(scene, rng):
    """Two turns: objects in any order, first by colour, then by shape."""

    def shuffled():
        return rng.sample(scene.objects, len(scene.objects))

    return [
        ("Objects by color?", " ".join(f"{o.colour} {o.shape} {o.size}" for o in shuffled())),
        ("Objects by shape?", " ".join(f"{o.shape} {o.colour} {o.size}" for o in shuffled())),
    ]


def drills(scene, rng, turns, crowded, restated):
    """At most `turns` short questions, each about an object that its words tell from all others.

    `restated`: answers begin with these words, so that one step leads from each to the next, as in `pairs`.
    """
    out = []

    def is_only(o, *keys):
        return sum(all(getattr(o, key) == getattr(p, key) for key in keys) for p in scene.objects) == 1

    def ask(what, reference, answer):
        said = reference.removesuffix(" object")
        out.append((f"{what} of the {reference}?", f"{said} {answer}" if restated else answer))

    for k, o in enumerate(scene.objects):
        names = [o.name]
        if is_only(o, "shape"):
            ask("Color", o.shape, o.colour)
            ask("Size", o.shape, o.size)
            names.append(o.shape)
        if is_only(o, "colour"):
            ask("Shape", f"{o.colour} object", o.shape)
            ask("Size", f"{o.colour} object", o.size)
            names.append(f"{o.colour} object")
        if is_only(o, "size"):
            ask("Shape", f"{o.size} object", o.shape)
            ask("Color", f"{o.size} object", o.colour)
        if is_only(o, "size", "shape"):
            ask("Color", f"{o.size} {o.shape}", o.colour)
        if is_only(o, "size", "colour"):
            ask("Shape", f"{o.size} {o.colour} object", o.shape)
        ask("Size", o.name, o.size)
        if not crowded:
            number = NUMBER[k + 1]
            ask("Number", rng.choice(names), number)
            out.append((f"Object {number}?", f"{number} {o.size} {o.name}" if restated else f"{o.size} {o.name}"))
            for side, there in (("Right", k + 1), ("Left", k - 1)):
                is_there = 0 <= there < len(scene.objects)
                name, answer = rng.choice(names), scene.objects[there].name if is_there else "Nothing"
                # by way of numbers: whose neighbour, its number, the neighbour's number
                way = [name.removesuffix(" object"), number, *([NUMBER[there + 1]] if is_there else [])]
                out.append((f"{side} of the {name}?", " ".join([*way, answer]) if restated else answer))
    rng.shuffle(out)
    return out[:turns]
