"""Read frames of an animated GIF, WebP or PNG through Pillow."""

from itertools import accumulate

from PIL import Image

from internvl3_mlx.images.colour import to_rgb
from internvl3_mlx.images.fetch import Located
from internvl3_mlx.images.load import one_line
from internvl3_mlx.images.taken import Choose, Taken, still

STILL_MS = 100  # how long browsers show a frame of no duration


def read_animation(located: Located, choose: Choose) -> Taken:
    """Read an animation through Pillow: once for the times, once for the frames."""
    with located.open() as file, one_line(located.name):
        image = Image.open(file, formats=["GIF", "WEBP", "PNG"])
        count = getattr(image, "n_frames", 1)
        if count == 1:
            raise still(located.name)
        lengths = []
        for number in range(count):
            image.seek(number)
            image.load()
            lengths.append((image.info.get("duration") or STILL_MS) / 1000)
        seconds = [0.0, *accumulate(lengths)]
        indices = choose(count, count / seconds[-1])
        images = {}
        for number in sorted(set(indices)):
            image.seek(number)
            images[number] = to_rgb(image.copy())
    return Taken(indices, images, seconds)
