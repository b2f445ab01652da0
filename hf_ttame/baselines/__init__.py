"""What one would use otherwise: other explainers, and trivial maps, behind one contract."""

from .contract import KINDS, Explain, Method
from .counting import Cost
from .registry import ALL, FROM_THE_HEAD, TRIVIAL, MethodSettings, cam_layer, expand_names, make_method
from .trivial import MapBank

__all__ = [
    "ALL",
    "FROM_THE_HEAD",
    "KINDS",
    "TRIVIAL",
    "Cost",
    "Explain",
    "MapBank",
    "Method",
    "MethodSettings",
    "cam_layer",
    "expand_names",
    "make_method",
]
