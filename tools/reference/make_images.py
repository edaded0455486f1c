"""Small synthetic pictures in every format the decoder reads, with the pixels Pillow sees in them.

Writes tests/fixtures/images/*, and tests/fixtures/images/pixels.safetensors holding for each file
`<name>.rgb`   u8 [h, w, 3]  Image.open(f).convert("RGB"): alpha dropped, EXIF orientation ignored (original LLaVA, transformers 4.x);
`<name>.white` u8 [h, w, 3]  composited on white, as transformers 5.x does when handed a PIL image with alpha (only where it differs);
`<name>.upright` u8 [h, w, 3]  with the EXIF orientation applied, as transformers' load_image does (only where it differs).
"""

import numpy as np
from PIL import Image, ImageOps
from safetensors.numpy import save_file

from common import FIXTURES, rng

DIR = FIXTURES / "images"


def picture(name: str, width: int, height: int, channels: int) -> np.ndarray:
    """Gradients, hard edges and some noise: a shifted crop, a swapped channel or a wrong filter all change it visibly."""
    r = rng("image", name)
    y, x = np.mgrid[0:height, 0:width]
    planes = []
    for c in range(channels):
        gradient = 255 * ((x * (c + 1) / max(width - 1, 1) + y * (2 - c % 3) / max(height - 1, 1)) % 1.0)
        disc = (x - width * (0.3 + 0.15 * c)) ** 2 + (y - height * 0.55) ** 2 < (min(width, height) * 0.28) ** 2
        stripes = ((x + 2 * y) // 5 + c) % 4 == 0
        plane = np.where(disc, 235 - 60 * c, gradient)
        plane = np.where(stripes & ~disc, 255 - plane, plane)
        planes.append(plane + r.normal(0, 6, (height, width)))
    return np.clip(np.rint(np.stack(planes, -1)), 0, 255).astype(np.uint8)


def build() -> dict[str, Image.Image]:
    DIR.mkdir(parents=True, exist_ok=True)

    def rgb(name, w, h):
        return Image.fromarray(picture(name, w, h, 3))

    def save(image, name, **options):
        # Kept if present: another version of libjpeg or libpng may write other bytes for the same pixels.
        if not (DIR / name).exists():
            image.save(DIR / name, **options)

    save(rgb("square", 64, 64), "square.png")
    save(rgb("odd", 61, 37), "odd.png")
    save(Image.fromarray(picture("rgba", 30, 45, 4)), "tall_rgba.png")
    save(Image.fromarray(picture("grey", 50, 33, 1)[..., 0]), "grey.png")
    save(Image.fromarray(picture("grey_alpha", 21, 20, 2), "LA"), "grey_alpha.png")
    save(rgb("palette", 48, 31).quantize(24), "palette.png")
    save(rgb("palette_clear", 24, 24).quantize(16), "palette_clear.png", transparency=3)
    save(rgb("interlaced", 17, 23), "rgb_17x23.png")
    save(rgb("one", 1, 1), "one.png")
    save(rgb("jpeg420", 45, 52), "photo_420.jpg", quality=88, subsampling=2)
    save(rgb("jpeg444", 33, 20), "photo_444.jpg", quality=92, subsampling=0)
    save(rgb("jpegprog", 40, 28), "photo_progressive.jpg", quality=80, progressive=True)
    save(Image.fromarray(picture("jpeggrey", 19, 26, 1)[..., 0]), "photo_grey.jpg", quality=90)
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate 90 degrees clockwise to display"
    save(rgb("rotated", 36, 24), "photo_rotated.jpg", quality=90, exif=exif)
    save(rgb("webp", 39, 27), "lossless.webp", lossless=True)
    save(rgb("gif", 41, 29).quantize(32), "single.gif")
    save(rgb("bmp", 27, 19), "plain.bmp")
    return {p.name: Image.open(p) for p in sorted(DIR.iterdir()) if p.suffix != ".safetensors"}


def main() -> None:
    pixels = {}
    for name, image in build().items():
        rgb = np.array(image.convert("RGB"))
        pixels[f"{name}.rgb"] = rgb
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            rgba = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            pixels[f"{name}.white"] = np.array(Image.alpha_composite(white, rgba).convert("RGB"))
        upright = np.array(ImageOps.exif_transpose(image).convert("RGB"))
        if upright.shape != rgb.shape or (upright != rgb).any():
            pixels[f"{name}.upright"] = upright
    path = DIR / "pixels.safetensors"
    save_file({k: np.ascontiguousarray(v) for k, v in pixels.items()}, path)
    path.chmod(0o644)


if __name__ == "__main__":
    main()
