"""Pictures as tenants send them: sound ones, and files that only look like it."""

import io

from PIL import Image, ImageDraw


def a_picture(width_px: int = 96, height_px: int = 64, *, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """A ramp with a disc in it: different everywhere, and its own mirror image nowhere."""
    ramp = Image.linear_gradient("L").resize((width_px, height_px))
    picture = Image.merge("RGB", (ramp, ramp.transpose(Image.Transpose.ROTATE_180), Image.new("L", ramp.size, 40 * (seed % 6))))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((width_px // 8, height_px // 8, width_px // 2, height_px // 2), fill=(200, (30 * seed) % 256, 60))
    return picture.convert(mode)


def png(picture: Image.Image | None = None, **options) -> bytes:
    return encoded(picture or a_picture(), "PNG", **options)


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()
