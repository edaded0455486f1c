"""Write rows with their picture files, as LLaVA JSON: to train by, or to evaluate by; or one scene.

    python make_data.py patches --out data/patches --count 12000       # also places, pairs, restated, order, talk
    python make_data.py eval --out eval --count 300
    python make_data.py scene --out scene.png --first-seed 1 --width 448 --height 336
"""

import argparse
import json
import random
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from PIL import Image

import lessons
from scenes import TRAINING_WEIGHTS, conversation, render, sample_scene
from tokenizer import SYSTEM

IMAGE_SIZE = 112
PATCH_SIZE = 14
N_PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2
PAD_COLOUR = (122, 116, 104)  # LLaVA-1.5's pad to square: int(255 * CLIP mean)

PAD_SHARE = 0.25  # pictures padded to square (original profile); the others are cropped (hf profile)

# Training scenes have seeds from 0 on (those of lessons from 500,000,000); evaluation scenes start here.
EVAL_SEED = 1_000_000_000


def model_input(image, pad):
    """uint8 [IMAGE_SIZE, IMAGE_SIZE, 3], as CLIPImageProcessor's resize and centre crop give it."""
    if pad and image.width != image.height:
        side = max(image.size)
        square = Image.new("RGB", (side, side), PAD_COLOUR)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    w, h = image.size
    short = min(w, h)
    image = image.resize((int(IMAGE_SIZE * w / short), int(IMAGE_SIZE * h / short)), Image.BICUBIC)
    left, top = (image.width - IMAGE_SIZE) // 2, (image.height - IMAGE_SIZE) // 2
    return np.asarray(image.crop((left, top, left + IMAGE_SIZE, top + IMAGE_SIZE)))


LESSON_SEED = 500_000_000
CROWDED = {"patches": 1, "places": 1 / 2, "pairs": 1, "restated": 1 / 2, "order": 1 / 8, "talk": 0}  # shares of pictures

PROMPTED = {"order": 1 / 3, "talk": 1 / 3}  # shares of rows with LLaVA-1.5's system prompt
ORDER_SHARE = {"restated": 1 / 3, "order": 3 / 4}  # of short questions, those about what stands where


def training_rows(what, folder, turns, i):
    """The rows of picture `i`, which is written as the model sees it."""
    rng = random.Random(f"{what} {i}")
    pad = rng.random() < PAD_SHARE
    crowded = rng.random() < CROWDED[what]
    seed = i if what == "talk" else LESSON_SEED + i
    scene = sample_scene(seed, crowded=crowded)
    while what in ORDER_SHARE and not 2 <= len(scene.objects) <= 6:  # of more, few words name one alone
        scene = sample_scene(rng.randrange(LESSON_SEED, EVAL_SEED), crowded=crowded)
    name = f"{what}/{i}.png"
    Image.fromarray(model_input(render(scene), pad)).save(folder / f"{i}.png", compress_level=3)
    rows = []
    if what == "talk":
        talk = [(question, answer) for _, question, answer in conversation(scene, seed, turns, weights=TRAINING_WEIGHTS)]
        rows.append(talk)
        if i % 4 == 1:
            # llava-hf's chat template has a space, and no "</s>", between turns: such a row has them in its one question
            last = rng.randrange(1, min(4, turns))
            rows.append([(" USER: ".join(f"{q} ASSISTANT: {a}" for q, a in talk[:last]) + f" USER: {talk[last][0]}", talk[last][1])])
    if what in ORDER_SHARE:
        rows.append(lessons.restated(scene, rng, turns, crowded, ORDER_SHARE[what]))
    # What was learnt before is not to be forgotten.
    if what == "pairs" or (what == "restated" and i % 4 == 2):
        rows.append(lessons.pairs(scene, rng) + lessons.pairs(scene, rng))
    if what in ("patches", "places") or i % 8 == 0:
        rows.append(lessons.patches(scene, pad, crowded, rng))
    rows = [said(row, has_system=rng.random() < PROMPTED.get(what, 0)) for row in rows]
    return [{"id": f"{name} {k}", "image": name, "conversations": row} for k, row in enumerate(rows)]


def said(turns, has_system=False):
    """Questions and answers as LLaVA's rows have them, the picture before the first."""
    mark = ["<image>\n"] + [""] * (len(turns) - 1)
    spoken = [part for m, (q, a) in zip(mark, turns) for part in ({"from": "human", "value": m + q}, {"from": "gpt", "value": a})]
    return [{"from": "system", "value": SYSTEM}] * has_system + spoken


def write_training(what, folder, count, turns, first):
    """Pictures and `rows.json`, in which their paths begin at the folder above."""
    folder.mkdir(parents=True, exist_ok=True)
    with Pool() as pool:
        rows = pool.map(partial(training_rows, what, folder, turns), range(first, first + count), chunksize=50)
    (folder / "rows.json").write_text(json.dumps([row for some in rows for row in some]))


def write_eval(folder, count, turns, first_seed, side=None):
    """Pictures (half PNG, half JPEG) and `questions.json` in LLaVA's conversation format.

    `types` beside `conversations` names each turn's kind of question; LLaVA's readers ignore it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        scene = sample_scene(first_seed + i)
        image = render(scene)
        if side:
            scale = side / max(image.size)
            image = image.resize((round(image.width * scale), round(image.height * scale)), Image.LANCZOS)
        # PNG where the scene has had its JPEG loss already, or noise would make it large
        name = f"{i:04d}.jpg" if i % 2 or (side and scene.background == "noisy") else f"{i:04d}.png"
        image.save(folder / name, **({"quality": 90} if name.endswith("jpg") else {"optimize": True}))
        talk = conversation(scene, scene.seed, turns)
        types = [kind for kind, _, _ in talk]
        rows.append({"id": str(scene.seed), "image": name, "conversations": said([(q, a) for _, q, a in talk]), "types": types})
    (folder / "questions.json").write_text(json.dumps(rows, indent=1))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*CROWDED, "eval", "scene"])
    parser.add_argument("--out", required=True)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--first-seed", type=int, help="0 to train by, 1,000,000,000 to evaluate by if absent")
    parser.add_argument("--side", type=int, help="longer side of the written pictures; absent: as sampled")
    parser.add_argument("--width", type=int)
    parser.add_argument("--height", type=int)
    args = parser.parse_args()
    first = args.first_seed if args.first_seed is not None else EVAL_SEED if args.what in ("eval", "scene") else 0
    if args.what == "scene":
        render(sample_scene(first, args.width, args.height)).save(args.out, optimize=True)
    elif args.what == "eval":
        write_eval(args.out, args.count, args.turns, first, args.side)
    else:
        write_training(args.what, Path(args.out), args.count, args.turns, first)


if __name__ == "__main__":
    main()
