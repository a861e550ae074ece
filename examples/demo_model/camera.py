"""Spoil a finished image as cameras, screens and messengers do."""

import io

import numpy as np
from PIL import Image, ImageFilter

Random = np.random.Generator


def spoil(pixels: np.ndarray, random: Random) -> np.ndarray:
    """Change light, blur, add noise and compress, each now and then: (H, W, 3) uint8."""
    if random.random() < 0.2:
        gain, shift = random.uniform(0.7, 1.25, 3), random.uniform(-25, 25)
        pixels = np.clip((pixels - 128.0) * gain + 128 + shift, 0, 255).astype(np.uint8)
    if random.random() < 0.1:
        image = Image.fromarray(pixels)
        pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(random.uniform(0.3, 0.9))))
    if random.random() < 0.12:
        noisy = pixels + random.normal(0, random.uniform(2, 12), pixels.shape)
        pixels = np.clip(noisy, 0, 255).astype(np.uint8)
    if random.random() < 0.25:
        pixels = compress(pixels, int(random.integers(30, 92)))
    return pixels


def compress(pixels: np.ndarray, quality: int) -> np.ndarray:
    """Store an image as JPEG and read it again."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file).convert("RGB"))
