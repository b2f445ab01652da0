"""The page's own HTML: figures, bars of classes, words. All text in it is escaped: labels may come from anybody."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import urlencode

from .analysis import METHODS, Analysis, Tested
from .rendering import thumbnail
from .routes import PREFIX
from .sessions import Session
from .uploads import open_picture


def notice(text: str = "", kind: str = "error") -> str:
    """Words to the visitor: an "error" is read aloud at once, a "remark" when there is time."""
    if not text:
        return ""
    role = "alert" if kind == "error" else "status"
    return f'<div class="tt-notice tt-{kind}" role="{role}">{escape(text[:1].upper() + text[1:])}</div>'


def examples(files: Sequence[Path]) -> str:
    """Small photographs to choose from."""
    buttons = []
    for file in files:
        data = base64.b64encode(thumbnail(open_picture(file)[0])).decode()
        buttons.append(
            f'<button type="button" data-example="{escape(file.stem)}" title="Explain this photograph">'
            f'<img alt="Example: {escape(file.stem)}" src="data:image/jpeg;base64,{data}"></button>'
        )
    return f'<div class="tt-examples" role="group" aria-label="Example photographs">{"".join(buttons)}</div>'


def bars(session: Session) -> str:
    """The classes as buttons with their scores; the one whose map is shown is pressed."""
    analysis = session.analysis
    rows = []
    for class_id in [*analysis.top, *session.asked]:
        score = analysis.score(class_id)
        pressed = "true" if class_id == session.class_id else "false"
        full = analysis.explainer.model.config.id2label[class_id]
        rows.append(
            f'<button type="button" class="tt-bar" data-class="{class_id}" aria-pressed="{pressed}" '
            f'title="{escape(str(full))}"><span class="tt-fill" style="width:{100 * score:.1f}%"></span>'
            f'<span class="tt-label">{escape(analysis.label(class_id))}</span>'
            f'<span class="tt-score">{percent(score)}</span></button>'
        )
    return f'<div class="tt-bars" role="group" aria-label="Classes: choose whose map is shown">{"".join(rows)}</div>'


def stage(session: Session, strength: int, colours: str) -> str:
    """The picture and, beside it, the map of the chosen class; links to take it along."""
    analysis, class_id = session.analysis, session.class_id
    label = escape(analysis.label(class_id))
    remark = "" if _trained(analysis, class_id) else "<br>In training this class never came up: its map is unchecked."
    size = f"{analysis.picture.width} x {analysis.picture.height}"
    query = {"class": class_id, "colours": colours, "strength": strength, "download": 1}
    overlay = _url(analysis, "overlay.png", **query)
    raw = _url(analysis, "map.npy", **{"class": class_id, "download": 1})
    # With `download` the browser does not leave the page, which would end the connection.
    links = (
        f'<a class="tt-take" data-strength download="overlay_{class_id}.png" href="{overlay}">Overlay, PNG</a>'
        f'<a class="tt-take" download="map_{class_id}.npy" href="{raw}">Map, NumPy</a>'
    )
    return _figures(
        _figure(analysis, _image(analysis, "picture.jpg", "The picture"), f"Picture <small>{size}</small>"),
        _figure(
            analysis,
            _map(analysis, "ttame", class_id, colours, f"Map of {analysis.label(class_id)}"),
            f"Where the classifier sees <b>{label}</b>{remark}",
            links,
        ),
    )


def test(session: Session, keep: int, tested: Tested) -> str:
    """The picture with only the map's top, and without it, each with what the classifier then says."""
    analysis, class_id = session.analysis, session.class_id
    query = {"class": class_id, "percent": keep}
    label = escape(analysis.label(class_id))
    rows = (
        ("Whole picture", analysis.score(class_id), "whole"),
        (f"Only the top {keep} %", tested.kept, "kept"),
        (f"All but the top {keep} %", tested.hidden, "hidden"),
    )
    chart = "".join(
        f'<div class="tt-row tt-{kind}"><dt>{name}</dt><dd>{percent(value)}</dd>'
        f'<span class="tt-meter"><span style="width:{100 * value:.1f}%"></span></span></div>'
        for name, value, kind in rows
    )
    figures = _figures(
        _figure(
            analysis,
            _image(analysis, "kept.jpg", f"Only the top {keep} percent of the map", **query),
            f"Only the top {keep} %",
        ),
        _figure(
            analysis,
            _image(analysis, "hidden.jpg", f"All but the top {keep} percent of the map", **query),
            f"All but the top {keep} %",
        ),
    )
    return (
        f'<div class="tt-test"><div><p class="tt-lead">Confidence in <b>{label}</b></p>'
        f'<dl class="tt-chart">{chart}</dl></div>{figures}</div>'
    )


def methods(session: Session, keep: int, colours: str, tested: dict[str, Tested | str]) -> str:
    """The methods side by side, each with its confidence when the same share of pixels is kept.

    Args:
        session: whose picture and class.
        keep: percent of the pixels.
        colours: of the maps.
        tested: method -> its test, or words in place of its map.
    """
    analysis, class_id = session.analysis, session.class_id
    shown = []
    for method, found in tested.items():
        name = METHODS[method]
        if method == "rise" and class_id in analysis.rise_masks:
            name += f" <small>{analysis.rise_masks[class_id]:,d} masks</small>"
        if isinstance(found, str):
            inside = f'<span class="tt-empty">{escape(found)}</span>'
            shown.append(_figure(analysis, inside, f"<b>{name}</b>"))
            continue
        extra = {"masks": analysis.rise_masks[class_id]} if method == "rise" else {}
        inside = _map(analysis, method, class_id, colours, f"{METHODS[method]} map", **extra)
        caption = f"<b>{name}</b><br>Kept: {percent(found.kept)} · hidden: {percent(found.hidden)}"
        shown.append(_figure(analysis, inside, caption))
    return _figures(*shown)


def pair(session: Session, colours: str) -> str:
    """Two classes of one picture, and where their maps differ."""
    analysis = session.analysis
    first, second = session.pair
    names = [escape(analysis.label(class_id)) for class_id in session.pair]
    difference = _layered(
        analysis,
        _url(analysis, "change.png", first=first, second=second),
        f"Difference of {analysis.label(first)} and {analysis.label(second)}",
    )
    return _figures(
        *(
            _figure(
                analysis,
                _map(analysis, "ttame", class_id, colours, f"Map of {analysis.label(class_id)}"),
                f"<b>{name}</b> {percent(analysis.score(class_id))}",
            )
            for class_id, name in zip(session.pair, names, strict=True)
        ),
        _figure(
            analysis,
            difference,
            f'Difference: <b class="tt-red">{names[0]}</b> or <b class="tt-blue">{names[1]}</b> stronger',
        ),
    )


def percent(share: float) -> str:
    """A probability as it is read: 93.1 %, and never 100 % or 0 % where it is not."""
    if 0.9995 <= share < 1:
        return "> 99.9 %"
    if 0 < share < 0.0005:
        return "< 0.1 %"
    return f"{100 * share:.1f} %"


def _trained(analysis: Analysis, class_id: int) -> bool:
    counts = analysis.explainer.model.head.class_counts
    return not bool(counts.any()) or bool(counts[class_id] > 0)


def _url(analysis: Analysis, name: str, **query: object) -> str:
    # Relative: the page may lie under a path of a larger site.
    return escape(f"{PREFIX}/{analysis.token}/{name}" + (f"?{urlencode(query)}" if query else ""))


def _image(analysis: Analysis, name: str, alt: str, **query: object) -> str:
    return f'<img src="{_url(analysis, name, **query)}" alt="{escape(alt)}">'


def _map(analysis: Analysis, method: str, class_id: int, colours: str, alt: str, **extra: object) -> str:
    query = {"method": method, "class": class_id, "colours": colours, **extra}
    return _layered(analysis, _url(analysis, "layer.png", **query), alt)


def _layered(analysis: Analysis, layer: str, alt: str) -> str:
    return _image(analysis, "ground.jpg", alt) + f'<img class="tt-layer" src="{layer}" alt="">'


def _figure(analysis: Analysis, inside: str, caption: str, below: str = "") -> str:
    shape = f"--w:{analysis.picture.width};--h:{analysis.picture.height}"
    links = f'<span class="tt-links">{below}</span>' if below else ""
    return (
        f'<figure style="{shape}"><div class="tt-frame">{inside}</div>'
        f"<figcaption><span>{caption}</span>{links}</figcaption></figure>"
    )


def _figures(*figures: str) -> str:
    return f'<div class="tt-figures tt-{len(figures)}">{"".join(figures)}</div>'
