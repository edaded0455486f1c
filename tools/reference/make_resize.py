"""Golden vectors of Pillow's bicubic resize, of padding to a square, of centre cropping and of the shortest-edge rule.

Writes tests/fixtures/resize.safetensors (`<name>.input`, `<name>.output`, u8 [h, w, 3]; `<name>.output_pillow12` where Pillow 13
takes the passes in the other order) and tests/fixtures/resize.json, which also holds the large cases: input by formula, output
as SHA-256 of its bytes (row-major, interleaved RGB).
"""

import hashlib
import math

import numpy as np
from PIL import Image
from safetensors.numpy import save_file
from transformers.image_transforms import center_crop, get_resize_output_image_size

from common import FIXTURES, rng, write_json
from preprocess import pad_to_square

FORMULA = "value[y][x][c] = (31*x + 17*y + 101*c + (x*y) % 251) % 256"

# (width, height) -> (width, height); names say what they catch.
SMALL = {
    "down_even": ((48, 40), (24, 20)),
    "down_odd": ((61, 37), (23, 14)),
    "down_a_lot": ((97, 83), (7, 5)),
    "up_even": ((12, 10), (36, 30)),
    "up_odd": ((7, 5), (31, 17)),
    "up_and_down": ((50, 9), (20, 33)),
    "one_row": ((40, 1), (17, 1)),
    "one_column": ((1, 40), (1, 17)),
    "one_pixel": ((1, 1), (9, 4)),
    "two_by_two": ((2, 2), (28, 28)),
    "three_by_two": ((3, 2), (14, 14)),
    "only_width": ((30, 16), (19, 16)),
    "only_height": ((16, 30), (16, 19)),
    "unchanged": ((13, 11), (13, 11)),
    "extreme_wide": ((200, 3), (28, 28)),
    "extreme_tall": ((3, 200), (28, 28)),
    "black_white_edges": ((33, 21), (56, 36)),
    "shortest_edge_28": ((45, 52), (28, 32)),
    "tall_aspect_kept": ((30, 75), (14, 35)),
    "tall_at_the_limit": ((40, 60), (30, 40)),
    "tall_past_the_limit": ((40, 61), (30, 40)),
}
LARGE = {
    "two_to_336": ((2, 2), (336, 336)),
    "577x111": ((577, 111), (1746, 336)),
    "1024x683": ((1024, 683), (503, 336)),
    "683x1024": ((683, 1024), (336, 503)),
    "337x336": ((337, 336), (337, 336)),
    "2000x3": ((2000, 3), (336, 336)),
    "1x999": ((1, 999), (336, 336)),
    "1333x800_to_224": ((1333, 800), (373, 224)),
    "336_to_672": ((336, 336), (672, 672)),
    "3000x2000": ((3000, 2000), (504, 336)),
    "600x1500": ((600, 1500), (336, 840)),
    "500x333_squashed": ((500, 333), (336, 336)),
    "480x640_squashed": ((480, 640), (336, 336)),
}
PADDED = {"wide": (9, 4), "tall": (4, 9), "square": (5, 5), "odd_difference": (8, 3), "one_row": (7, 1), "one_column": (1, 6)}
CROPPED = {
    "even": ((10, 8), (6, 6)), "odd_offset": ((11, 8), (6, 6)), "exact": ((6, 6), (6, 6)), "smaller": ((4, 5), (6, 6)),
    "smaller_one_way": ((9, 3), (6, 6)), "smaller_odd": ((3, 9), (6, 6)),
}
EDGES = [(w, h) for w, h in [
    (336, 336), (337, 336), (336, 337), (500, 333), (333, 500), (640, 427), (640, 480), (1920, 1080), (1, 1000), (1000, 1),
    (577, 111), (111, 577), (1023, 767), (45, 52), (33, 20), (2, 3), (999, 998),
]]


def formula(width: int, height: int) -> np.ndarray:
    y, x, c = np.mgrid[0:height, 0:width, 0:3]
    return ((31 * x + 17 * y + 101 * c + (x * y) % 251) % 256).astype(np.uint8)


def noise(name: str, width: int, height: int) -> np.ndarray:
    values = rng("resize", name).integers(0, 256, (height, width, 3))
    if name == "black_white_edges":
        values = np.where(values > 127, 255, 0)  # overshoot on both sides of the range must be clipped after each pass
    return values.astype(np.uint8)


def pillow(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.array(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def bicubic(x: float) -> float:
    x, a = abs(x), -0.5
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0


def one_pass(image: np.ndarray, size: int) -> np.ndarray:
    """Pillow's rule along axis 1, spelt out: f64 weights, rounded to 22 fractional bits, integer sums, rounded to u8."""
    n = image.shape[1]
    scale = n / size
    stretch = max(scale, 1.0)
    out = np.empty((image.shape[0], size, image.shape[2]), np.uint8)
    for i in range(size):
        center = (i + 0.5) * scale
        first = max(0, int(center - 2 * stretch + 0.5))
        last = min(n, int(center + 2 * stretch + 0.5))
        weights = [bicubic((k - center + 0.5) * (1 / stretch)) for k in range(first, last)]
        total_weight = sum(weights)
        fixed = [int(math.copysign(0.5, w) + w / total_weight * (1 << 22)) for w in weights]
        total = np.tensordot(image[:, first:last].astype(np.int64), np.array(fixed), ([1], [0])) + (1 << 21)
        out[:, i] = np.clip(total >> 22, 0, 255)
    return out


def vertical_first(before: tuple[int, int], after: tuple[int, int]) -> bool:
    """Pillow 13 runs the vertical pass first where the height shrinks by more than twice what the width shrinks by.

    Pillow 12 and older always run the horizontal pass first; each pass rounds to u8, so the results differ.
    """
    lost_width, lost_height = before[0] - after[0], before[1] - after[1]
    return lost_height > 0 and lost_height > 2 * lost_width


def by_the_rule(image: np.ndarray, size: tuple[int, int], vertical: bool) -> np.ndarray:
    """Two passes, each left out where the length stays."""
    for axis in ("v", "h") if vertical else ("h", "v"):
        if axis == "h" and image.shape[1] != size[0]:
            image = one_pass(image, size[0])
        if axis == "v" and image.shape[0] != size[1]:
            image = one_pass(image.transpose(1, 0, 2), size[1]).transpose(1, 0, 2)
    return np.ascontiguousarray(image)


def main() -> None:
    tensors, small, large = {}, [], []
    for name, (before, after) in SMALL.items():
        image = noise(name, *before)
        result = pillow(image, after)
        vertical = vertical_first(before, after)
        assert np.array_equal(result, by_the_rule(image, after, vertical)), f"{name}: the rule above is not Pillow's"
        tensors |= {f"resize_{name}.input": image, f"resize_{name}.output": result}
        if vertical:
            tensors[f"resize_{name}.output_pillow12"] = by_the_rule(image, after, False)
        small.append({"name": f"resize_{name}", "from": before, "to": after, "vertical_first": vertical})
    for name, (before, after) in LARGE.items():
        result = pillow(formula(*before), after)
        large.append({"name": name, "from": before, "to": after, "vertical_first": vertical_first(before, after),
                      "sha256": hashlib.sha256(result.tobytes()).hexdigest()})
    for name, size in PADDED.items():
        image = noise(f"pad_{name}", *size)
        tensors |= {f"pad_{name}.input": image, f"pad_{name}.output": np.array(pad_to_square(Image.fromarray(image)))}
    crops = []
    for name, (size, crop) in CROPPED.items():
        image = noise(f"crop_{name}", *size)
        result = center_crop(image, (crop[1], crop[0]), input_data_format="channels_last")
        tensors |= {f"crop_{name}.input": image, f"crop_{name}.output": np.ascontiguousarray(result)}
        crops.append({"name": f"crop_{name}", "from": size, "to": crop})
    edges = []
    for width, height in EDGES:
        blank = np.broadcast_to(np.uint8(0), (3, height, width))
        for edge in (336, 224, 56):
            h, w = get_resize_output_image_size(blank, edge, default_to_square=False, input_data_format="channels_first")
            edges.append({"from": [width, height], "edge": edge, "to": [w, h]})
    path = FIXTURES / "resize.safetensors"
    save_file(tensors, path)
    path.chmod(0o644)
    write_json(FIXTURES / "resize.json", {
        "oracle": f"Pillow {Image.__version__}, BICUBIC",
        "small": small,
        "formula": FORMULA,
        "large": large,
        "crop": crops,
        "shortest_edge": edges,
    })


if __name__ == "__main__":
    main()
