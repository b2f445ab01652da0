"""The pictures of a page by address: made when they are asked for, never written to disk, for who knows the token."""

from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..visualization import COLOURS
from . import rendering
from .analysis import METHODS, Analysis
from .sessions import Sessions

PREFIX = "ttame"
_PRIVATE = {
    "Cache-Control": "private, no-store",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'",
}
_TYPES = {"jpg": "image/jpeg", "png": "image/png", "npy": "application/octet-stream"}


def picture_routes(sessions: Sessions) -> list[Route]:
    """Routes for the server that shows the page: /ttame/{token}/{name}."""

    # Not async: the server runs it in a thread of its own.
    def picture(request: Request) -> Response:
        analysis = sessions.by_token(request.path_params["token"])
        name = request.path_params["name"]
        if analysis is None or name not in _MAKERS:
            return Response("this picture is no longer here", 404)
        try:
            content = _MAKERS[name](analysis, _Asked(analysis, request))
        except (ValueError, KeyError) as error:
            return Response(f"this picture cannot be made: {error}", 400, media_type="text/plain")
        headers = dict(_PRIVATE)
        if "download" in request.query_params:
            headers["Content-Disposition"] = "attachment"
        return Response(content, media_type=_TYPES[name.rpartition(".")[2]], headers=headers)

    return [Route(f"/{PREFIX}/{{token}}/{{name}}", picture, methods=["GET"])]


class _Asked:
    """The parameters of an address, each checked when it is read."""

    def __init__(self, analysis: Analysis, request: Request):
        self._analysis = analysis
        self._query = request.query_params

    def class_id(self, name: str = "class") -> int:
        return self._whole(name, 0, len(self._analysis.scores) - 1)

    @property
    def percent(self) -> int:
        return self._whole("percent", 1, 100)

    @property
    def method(self) -> str:
        method = self._query.get("method", "ttame")
        # A map that would cost passes of the backbone is made by the page's own events alone, which wait in a queue.
        if method not in METHODS or not self._analysis.has_map(method, self.class_id()):
            raise ValueError(f"there is no map of {method!r}")
        return method

    @property
    def colours(self) -> str:
        colours = self._query.get("colours", "spectrum")
        if colours not in COLOURS:
            raise ValueError("colours are unknown")
        return colours

    @property
    def strength(self) -> float:
        return self._whole("strength", 0, 100) / 100

    def _whole(self, name: str, low: int, high: int) -> int:
        text = self._query.get(name, "")
        if not (text.isascii() and text.isdigit() and low <= int(text[:9]) <= high):
            raise ValueError(f"{name} must lie in {low}..{high}")
        return int(text)


_MAKERS: dict[str, Callable[[Analysis, _Asked], bytes]] = {
    "picture.jpg": lambda a, _: rendering.photograph(a),
    "ground.jpg": lambda a, _: rendering.ground(a),
    "layer.png": lambda a, q: rendering.layer(a, q.method, q.class_id(), q.colours),
    "change.png": lambda a, q: rendering.change_layer(a, q.class_id("first"), q.class_id("second")),
    "kept.jpg": lambda a, q: rendering.masked(a, q.method, q.class_id(), q.percent, hidden=False),
    "hidden.jpg": lambda a, q: rendering.masked(a, q.method, q.class_id(), q.percent, hidden=True),
    "overlay.png": lambda a, q: rendering.overlay_png(a, q.method, q.class_id(), q.strength, q.colours),
    "map.npy": lambda a, q: rendering.map_npy(a, q.method, q.class_id()),
}
