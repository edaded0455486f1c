"""The original LLaVA's `image_aspect_ratio` modes, in front of transformers' PIL-based CLIP processor."""

import numpy as np
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from common import CLIP_MEAN, CLIP_STD


def clip_processor(size: int) -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, image_mean=CLIP_MEAN, image_std=CLIP_STD,
    )


def pad_to_square(image: Image.Image) -> Image.Image:
    """The image in the middle of a square of its longer side, filled with int(mean * 255)."""
    width, height = image.size
    side = max(width, height)
    square = Image.new("RGB", (side, side), tuple(int(m * 255) for m in CLIP_MEAN))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def pixel_values(images: list[Image.Image], processor, aspect_ratio: str | None) -> np.ndarray:
    """f32 [images, 3, size, size]"""
    if aspect_ratio == "pad":
        images = [pad_to_square(image) for image in images]
    return np.stack([processor(image, return_tensors="np")["pixel_values"][0] for image in images])
