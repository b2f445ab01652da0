"""The Space: launches the page of hf-ttame. TTAME_MODEL names another explainer to show first, a Hub id."""

import os

from hf_ttame.space.serving import launch

if __name__ == "__main__":
    launch(os.environ.get("TTAME_MODEL") or "efficientnet-lite0")
