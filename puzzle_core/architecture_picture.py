"""A picture of what each layer became. Drawn with Pillow: to load matplotlib takes longer than a search, and sweeps run many."""
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from puzzle_core.files import atomic
from puzzle_core.spec import ATTENTION, FFN, NO_OP, PARENT, SUBBLOCKS, Architecture, Variant, by_size

NAMES = {ATTENTION: "attention", FFN: "FFN"}
SCALES = {  # dark to light: ColorBrewer's Blues and Greens
    ATTENTION: ("#08306b", "#2171b5", "#6baed6", "#c6dbef", "#f7fbff"),
    FFN: ("#00441b", "#238b45", "#74c476", "#c7e9c0", "#f7fcf5"),
}
WIDTH, HEIGHT = 1800, 540  # pixels: twice the 900 of a README, for sharp screens
LEFT, RIGHT, TOP, ROW = 212, 1792, 50, 154
INK = "#222222"


def architecture_picture(architecture: Architecture, path: str | Path, title: str) -> None:
    """Draw to a PNG what each layer became: the darker a cell, the more is left of the parent."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, num_layers = ImageDraw.Draw(image), len(architecture.layers)
    edges = np.linspace(LEFT, RIGHT, num_layers + 1)
    cell = edges[1] - edges[0]
    size = 25.0  # of the labels: as large as their cells allow, upright where they are narrow
    rotated = any(_font(size).getlength(str(variant)) > 0.95 * cell for _, _, variant in architecture.items())
    size = min(size, 0.85 * cell) if rotated else size
    draw.text((LEFT, 8), title, INK, _font(31))
    for row, subblock in enumerate(SUBBLOCKS):
        variants = [architecture[layer, subblock] for layer in range(num_layers)]
        colors = _colors(subblock, set(variants))
        top = TOP + row * ROW
        draw.text((LEFT - 12, top + ROW / 2), NAMES[subblock], INK, _font(28), anchor="rm")
        for layer, variant in enumerate(variants):
            right, bottom = edges[layer + 1] - (2 if cell > 10 else 0), top + ROW - 2
            draw.rectangle((edges[layer], top, right - 1, bottom - 1), colors[variant])
            middle = (edges[layer] + right) / 2, (top + bottom) / 2
            _label(image, middle, str(variant), size, "white" if np.mean(colors[variant]) < 153 else INK, rotated)
        _key(draw, HEIGHT - 72 + 46 * row, subblock, [(v, color, variants.count(v)) for v, color in colors.items()])
    for layer in range(0, num_layers, -(-num_layers // 20)):
        draw.text(((edges[layer] + edges[layer + 1]) / 2, TOP + 2 * ROW + 6), str(layer), INK, _font(25), anchor="ma")
    draw.text(((LEFT + RIGHT) / 2, TOP + 2 * ROW + 46), "layer", INK, _font(27), anchor="ma")
    with atomic(path) as part:
        image.save(part, format="png")


def _font(size: float) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(max(1.0, size))


def _label(image: Image.Image, middle: tuple[float, float], text: str, size: float, ink: str, rotated: bool) -> None:
    font = _font(size)
    mask = Image.new("L", (int(font.getlength(text)) + 4, int(1.4 * size) + 2))
    ImageDraw.Draw(mask).text((mask.width / 2, mask.height / 2), text, 255, font, anchor="mm")
    mask = mask.rotate(90, expand=True) if rotated else mask
    image.paste(ink, (round(middle[0] - mask.width / 2), round(middle[1] - mask.height / 2)), mask)


def _key(draw: ImageDraw.ImageDraw, y: int, subblock: str, entries: Sequence[tuple[Variant, tuple[int, ...], int]]) -> None:
    texts = [f"{variant} ({count})" for variant, _, count in entries]
    size = 24.0
    while size > 8 and sum(_font(size).getlength(text) + 3.2 * size for text in texts) > RIGHT - LEFT:
        size -= 1
    draw.text((LEFT - 12, y), f"{NAMES[subblock]} (layers)", INK, _font(23), anchor="rm")
    x = LEFT + 18.0
    for text, (_, color, _) in zip(texts, entries, strict=True):
        draw.rectangle((x, y - 0.35 * size, x + 1.2 * size, y + 0.35 * size), color, "#999999", 2)
        draw.text((x + 1.6 * size, y), text, INK, _font(size), anchor="lm")
        x += _font(size).getlength(text) + 3.2 * size


def _colors(subblock: str, variants: set[Variant]) -> dict[Variant, tuple[int, ...]]:
    """A colour per variant, largest first; parent and no_op are the ends of the scale even where they are absent."""
    scale = by_size(variants | {PARENT, NO_OP})
    anchors = np.array([ImageColor.getrgb(color) for color in SCALES[subblock]])
    at = np.linspace(0.4, len(anchors) - 1.08, len(scale))
    shades = np.stack([np.interp(at, range(len(anchors)), channel) for channel in anchors.T], axis=1).round().astype(int)
    return {variant: tuple(shade.tolist()) for variant, shade in zip(scale, shades, strict=True) if variant in variants}
