"""Maps for property tests."""

import torch
from hypothesis import strategies as st


@st.composite
def map_and_increased(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """A map (1, 6, 6) with ties, and the same after a strictly increasing change: ties stay ties."""
    values = draw(st.lists(st.integers(0, 35), min_size=36, max_size=36))
    rises = draw(st.lists(st.integers(1, 50), min_size=36, max_size=36))
    maps = torch.tensor(values).reshape(1, 6, 6)
    return maps.float(), torch.tensor(rises).cumsum(dim=0)[maps].float()  # value k becomes the k-th of a rising list
