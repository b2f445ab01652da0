"""Explanations of frozen image classifiers in one forward pass (T-TAME, arXiv 2403.04523)."""

import importlib
import sys
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .configuration_ttame import TTameConfig as TTameConfig
    from .explanation import Explanation as Explanation
    from .head import TTameHead as TTameHead
    from .modeling_ttame import TTameModel as TTameModel
    from .modeling_ttame import TTameOutput as TTameOutput

__version__ = "0.1.0"

_PUBLIC = {
    "TTameConfig": "configuration_ttame",
    "TTameHead": "head",
    "TTameModel": "modeling_ttame",
    "TTameOutput": "modeling_ttame",
    "Explanation": "explanation",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# Importing registers the Auto classes and the pipeline. The command `ttame` alone leaves that to the moment when it
# needs a model: `ttame --help` must answer at once, and torch and transformers take seconds to import.
if PurePath((getattr(sys, "argv", None) or [""])[0]).name not in ("ttame", "ttame.exe"):
    importlib.import_module(".pipeline", __name__)
