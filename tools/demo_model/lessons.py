"""Training rows that are no conversations: lessons, each of which teaches one thing that answers need.

    patches   what each patch shows, all of them in turn: 64 words for a picture teach the tower to see, and the decoder to read a patch
    pairs     each object's words in turn, in any order: a word finds the patches that show it, and these say what else they show
    drills    short questions with answers of a word or two: the same, asked

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


def drills(scene, rng, turns, crowded):
    """At most `turns` short questions, each about an object that its words tell from all others."""
    out = []

    def is_only(o, *keys):
        return sum(all(getattr(o, key) == getattr(p, key) for key in keys) for p in scene.objects) == 1

    for k, o in enumerate(scene.objects):
        names = [o.name]
        if is_only(o, "shape"):
            out += [(f"Color of the {o.shape}?", o.colour), (f"Size of the {o.shape}?", o.size)]
            names.append(o.shape)
        if is_only(o, "colour"):
            out += [(f"Shape of the {o.colour} object?", o.shape), (f"Size of the {o.colour} object?", o.size)]
            names.append(f"{o.colour} object")
        if is_only(o, "size"):
            out += [(f"Shape of the {o.size} object?", o.shape), (f"Color of the {o.size} object?", o.colour)]
        if is_only(o, "size", "shape"):
            out.append((f"Color of the {o.size} {o.shape}?", o.colour))
        if is_only(o, "size", "colour"):
            out.append((f"Shape of the {o.size} {o.colour} object?", o.shape))
        out.append((f"Size of the {o.name}?", o.size))
        if not crowded:
            left, right = scene.objects[:k], scene.objects[k + 1 :]
            out += [
                (f"Number of the {rng.choice(names)}?", NUMBER[k + 1]),
                (f"Object {NUMBER[k + 1]}?", f"{o.size} {o.name}"),
                (f"Right of the {rng.choice(names)}?", right[0].name if right else "Nothing"),
                (f"Left of the {rng.choice(names)}?", left[-1].name if left else "Nothing"),
            ]
    rng.shuffle(out)
    return out[:turns]
