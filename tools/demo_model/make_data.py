"""Write an evaluation set (picture files with LLaVA JSON), or one scene.

    python make_data.py eval --out eval --count 300
    python make_data.py scene --out scene.png --first-seed 1 --width 448 --height 336
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from scenes import conversation, render, sample_scene

IMAGE_SIZE = 112
PAD_COLOUR = (122, 116, 104)  # LLaVA-1.5's pad to square: int(255 * CLIP mean)

# Training scenes have seeds from 0 on (those without text from 500,000,000); evaluation scenes start here.
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
        turns_out, types = [], []
        for k, (kind, question, answer) in enumerate(conversation(scene, scene.seed, turns)):
            turns_out.append({"from": "human", "value": ("<image>\n" if k == 0 else "") + question})
            turns_out.append({"from": "gpt", "value": answer})
            types.append(kind)
        rows.append({"id": str(scene.seed), "image": name, "conversations": turns_out, "types": types})
    (folder / "questions.json").write_text(json.dumps(rows, indent=1))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["eval", "scene"])
    parser.add_argument("--out", required=True)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--first-seed", type=int, default=EVAL_SEED)
    parser.add_argument("--side", type=int, help="longer side of the written pictures; absent: as sampled")
    parser.add_argument("--width", type=int)
    parser.add_argument("--height", type=int)
    args = parser.parse_args()
    if args.what == "scene":
        render(sample_scene(args.first_seed, args.width, args.height)).save(args.out, optimize=True)
    else:
        write_eval(args.out, args.count, args.turns, args.first_seed, args.side)


if __name__ == "__main__":
    main()
