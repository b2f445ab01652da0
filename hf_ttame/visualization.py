"""Pictures of maps: overlays and sheets of them."""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Low to high. "spectrum" is readable over photographs; "viridis" and "inferno" also without colour vision.
COLOURS = {
    name: np.array([tuple(bytes.fromhex(anchor)) for anchor in anchors.split()], dtype=np.float64)
    for name, anchors in {
        "spectrum": "241763 2b63e3 26bed6 6ce26a f0d83a ef6b24 9e1610",
        "viridis": "440154 443983 31688e 21918c 35b779 90d743 fde725",
        "inferno": "000004 320a5e 781c6d bc3754 ed6925 fbb61a fcffa4",
        "grey": "000000 ffffff",
        "blue-red": "1748a8 78a5e6 f4f4f4 ec8e68 b21820",  # for differences
    }.items()
}


def colour_map(values: np.ndarray, colours: str = "spectrum") -> np.ndarray:
    """Colours (..., 3) uint8 of values in [0, 1], by linear interpolation between the anchors of one of COLOURS."""
    if colours not in COLOURS:
        raise ValueError(f"colours must be one of {', '.join(COLOURS)}, got {colours!r}")
    anchors = COLOURS[colours]
    position = np.clip(values, 0, 1) * (len(anchors) - 1)
    low = np.minimum(position.astype(int), len(anchors) - 2)
    part = (position - low)[..., None]
    return np.rint(anchors[low] * (1 - part) + anchors[low + 1] * part).astype(np.uint8)


def overlay(
    image: Image.Image, explanation: np.ndarray, seen: np.ndarray, strength: float = 0.55, colours: str = "spectrum"
) -> Image.Image:
    """A map over its picture; pixels that the classifier never saw are greyed.

    Args:
        image: RGB, W x H.
        explanation: (H, W) in [0, 1].
        seen: (H, W) bool.
        strength: share of colour in the blend, 0 to 1.
        colours: one of COLOURS.

    Returns:
        RGB, W x H.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must lie in [0, 1], got {strength}")
    photo = np.asarray(image, dtype=np.float64)
    blend = (1 - strength) * photo + strength * colour_map(explanation, colours)
    grey = photo.mean(axis=-1, keepdims=True) * 0.5 + 64
    return Image.fromarray(np.rint(np.where(seen[..., None], blend, grey)).astype(np.uint8))


def contact_sheet(rows: Sequence[Sequence[tuple[Image.Image, str]]], height: int = 300) -> Image.Image:
    """Pictures with captions, row by row, all at the same height in pixels."""
    font = ImageFont.load_default(size=max(11, height // 18))
    gap, caption = 8, max(16, height // 11)
    scaled = [
        [
            (picture.resize((max(1, round(picture.width * height / picture.height)), height)), text)
            for picture, text in row
        ]
        for row in rows
    ]
    width = max(sum(picture.width + gap for picture, _ in row) + gap for row in scaled)
    sheet = Image.new("RGB", (width, len(scaled) * (height + caption + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for index, row in enumerate(scaled):
        x, y = gap, gap + index * (height + caption + gap)
        for picture, text in row:
            sheet.paste(picture, (x, y))
            while len(text) > 4 and draw.textlength(text, font=font) > picture.width:
                text = text[:-4] + "..."
            draw.text((x, y + height + 2), text, fill="black", font=font)
            x += picture.width + gap
    return sheet


_LINES = ("#2b63e3", "#d62728", "#2ca02c", "#e0861a", "#7b3fb5", "#17a2b8", "#8c564b", "#555555")


def plot_curves(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], size: tuple[int, int] = (440, 300)
) -> Image.Image:
    """Line charts side by side, two to a row.

    Args:
        panels: title -> {name of a line: its (x, y) points}; lines without points are left out.
        size: (W, H) of one panel in pixels.
    """
    width, height = size
    rows = -(-len(panels) // 2)
    sheet = Image.new("RGB", (2 * width if len(panels) > 1 else width, max(1, rows) * height), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=12)
    for index, (title, lines) in enumerate(panels.items()):
        x0, y0 = index % 2 * width, index // 2 * height
        left, top, right, bottom = x0 + 58, y0 + 38, x0 + width - 14, y0 + height - 26
        draw.text((left, y0 + 4), title, fill="black", font=font)
        draw.rectangle((left, top, right, bottom), outline="#bbbbbb")
        lines = {name: [(x, y) for x, y in points if np.isfinite(y)] for name, points in lines.items()}
        lines = {name: points for name, points in lines.items() if points}
        if not lines:
            continue
        xs, ys = (np.array([p[axis] for points in lines.values() for p in points]) for axis in (0, 1))
        x_low, x_span = xs.min(), max(float(np.ptp(xs)), 1e-9)
        y_low, y_span = ys.min(), max(float(np.ptp(ys)), 1e-9)
        for share in (0.0, 0.5, 1.0):
            y = bottom - share * (bottom - top)
            draw.text((x0 + 4, y - 7), f"{y_low + share * y_span:.4g}", fill="black", font=font)
            x = left + share * (right - left)
            draw.text((x - 16 * share, bottom + 5), f"{x_low + share * x_span:.4g}", fill="black", font=font)
        legend = right - sum(draw.textlength(name, font=font) + 10 for name in lines) + 10
        for colour, (name, points) in zip(_LINES * len(lines), lines.items(), strict=False):
            path = [
                (left + (x - x_low) / x_span * (right - left), bottom - (y - y_low) / y_span * (bottom - top))
                for x, y in points
            ]
            draw.line(path, fill=colour, width=2)
            if len(path) < 40:
                for x, y in path:
                    draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour)
            draw.text((legend, y0 + 20), name, fill=colour, font=font)
            legend += draw.textlength(name, font=font) + 10
    return sheet


def plot_intervals(title: str, rows: Sequence[tuple[str, float, float, float]], width: int = 760) -> Image.Image:
    """One line per row: its name, a dot at the value, a bar from low to high.

    Args:
        title: stands above.
        rows: (name, value, low, high).
        width: of the picture in pixels.
    """
    if not rows:
        raise ValueError("plot_intervals needs at least one row")
    font = ImageFont.load_default(size=13)
    step, top = 24, 34
    sheet = Image.new("RGB", (width, top + step * len(rows) + 30), "white")
    draw = ImageDraw.Draw(sheet)
    left = 20 + max(int(draw.textlength(name, font=font)) for name, *_ in rows)
    right = width - 70
    low, high = min(row[2] for row in rows), max(row[3] for row in rows)
    span = max(high - low, 1e-9)
    draw.text((10, 8), title, fill="black", font=font)

    def place(value: float) -> float:
        return left + (value - low) / span * (right - left)

    if low < 0 < high:
        draw.line((place(0), top, place(0), top + step * len(rows)), fill="#bbbbbb")
    for index, (name, value, start, end) in enumerate(rows):
        y = top + step * index + step / 2
        draw.text((10, y - 8), name, fill="black", font=font)
        draw.line((place(start), y, place(end), y), fill=_LINES[0], width=2)
        draw.ellipse((place(value) - 4, y - 4, place(value) + 4, y + 4), fill=_LINES[0])
        draw.text((right + 10, y - 8), f"{value:.4g}", fill="black", font=font)
    for value in (low, (low + high) / 2, high):
        draw.text((place(value) - 14, top + step * len(rows) + 6), f"{value:.4g}", fill="black", font=font)
    return sheet
