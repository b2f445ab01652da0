"""The head against a slow, literal copy of the published form (arXiv 2403.04523, fig. 3)."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from hf_ttame import TTameHead
from hf_ttame.head import unsaturate

BATCH, CLASSES = 3, 5
CHANNELS = (3, 4, 6)
GRIDS = ((6, 7), (4, 4), (2, 3))
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
CLASS_IDS = {
    "all": None,
    "shared": torch.tensor([4, 0]),
    "shared, repeated": torch.tensor([2, 2, 1]),
    "one per image": torch.tensor([[3], [0], [3]]),
    "per image": torch.tensor([[0, 4], [2, 2], [1, 0]]),
}
SWITCHES = [
    pytest.param(
        layers,
        {"skip_connection": skip, "batch_norm": norm, "branch_activation": activation, "last_layer_relu": last},
        id=f"{layers}-{activation}" + "-skip" * skip + "-bn" * norm + "-last" * last,
    )
    for layers, skip, norm, activation, last in product(
        (1, 2, 3), (True, False), (True, False), ("relu", "sigmoid"), (True, False)
    )
]


def bilinear_matrix(source: int, target: int, dtype: torch.dtype) -> torch.Tensor:
    """(target, source) weights of bilinear resizing with align_corners=False along one side."""
    matrix = torch.zeros(target, source, dtype=dtype)
    for i in range(target):
        position = max(0.0, (i + 0.5) * source / target - 0.5)
        low = min(int(position), source - 1)
        high = min(low + 1, source - 1)
        matrix[i, low] += 1 - (position - low)
        matrix[i, high] += position - low
    return matrix


def literal_map_logits(
    head: TTameHead, features: list[torch.Tensor], *, skip_connection: bool, batch_norm: bool, last_layer_relu: bool
) -> torch.Tensor:
    """Convolution, batch norm, skip, activation; resize; concatenate; fuse: all K classes at map size."""
    resized = []
    for layer, f in enumerate(features):
        conv = head.convs[layer]
        x = torch.einsum("oc,bchw->bohw", conv.weight[:, :, 0, 0], f) + conv.bias[:, None, None]
        if batch_norm:
            bn = head.bns[layer]
            mean, variance = bn.running_mean, bn.running_var
            if head.training:
                mean, variance = x.mean(dim=(0, 2, 3)), x.var(dim=(0, 2, 3), unbiased=False)
            x = (x - mean[:, None, None]) / torch.sqrt(variance[:, None, None] + bn.eps)
            x = x * bn.weight[:, None, None] + bn.bias[:, None, None]
        if skip_connection:
            x = x + f
        if last_layer_relu or layer < len(features) - 1:
            x = 1 / (1 + torch.exp(-x)) if head.branch_activation == "sigmoid" else x.clamp(min=0)
        down = bilinear_matrix(f.shape[2], head.map_size[0], f.dtype)
        across = bilinear_matrix(f.shape[3], head.map_size[1], f.dtype)
        resized.append(torch.einsum("ih,bchw,jw->bcij", down, x, across))
    concatenated = torch.cat(resized, dim=1)
    return torch.einsum("kc,bchw->bkhw", head.fuser.weight[:, :, 0, 0], concatenated) + head.fuser.bias[:, None, None]


def literal_choice(map_logits: torch.Tensor, class_ids: torch.Tensor | None) -> torch.Tensor:
    if class_ids is None:
        return map_logits
    ids = class_ids if class_ids.ndim == 2 else class_ids.expand(len(map_logits), -1)
    return torch.stack([torch.stack([maps[k] for k in row]) for maps, row in zip(map_logits, ids, strict=True)])


def literal_switches(switches: dict) -> dict:
    return {name: value for name, value in switches.items() if name != "branch_activation"}


def random_head(layers: int, dtype: torch.dtype, map_size: tuple[int, int] = GRIDS[0], **switches) -> TTameHead:
    generator = torch.Generator().manual_seed(7)
    head = TTameHead(CHANNELS[:layers], CLASSES, map_size, **switches).to(dtype)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
        for bn in head.bns or ():
            bn.running_mean.copy_(torch.randn(bn.num_features, generator=generator, dtype=dtype))
            bn.running_var.copy_(0.3 + 2 * torch.rand(bn.num_features, generator=generator, dtype=dtype))
    return head


def random_features(layers: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(8)
    shapes = zip(CHANNELS[:layers], GRIDS, strict=False)
    return [torch.randn(BATCH, c, *grid, generator=generator, dtype=dtype) for c, grid in shapes]


def test_the_bilinear_matrix_is_torchs() -> None:
    line = torch.randn(1, 1, 5, 1, dtype=torch.float64)
    for target in (1, 3, 5, 8, 12):
        expected = F.interpolate(line, size=(target, 1), mode="bilinear", align_corners=False)
        assert torch.allclose(bilinear_matrix(5, target, torch.float64) @ line[0, 0], expected[0, 0], atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("layers", "switches"), SWITCHES)
def test_masks_equal_the_literal_form(layers: int, switches: dict, training: bool, dtype: torch.dtype) -> None:
    head = random_head(layers, dtype, **switches).train(training)
    features = random_features(layers, dtype)
    with torch.no_grad():
        every_class = literal_map_logits(head, features, **literal_switches(switches))
        for name, class_ids in CLASS_IDS.items():
            found = head(features, class_ids)
            expected = literal_choice(every_class, class_ids)
            assert (found.shape, found.dtype) == (expected.shape, dtype), name
            assert (found.sigmoid() - expected.sigmoid()).abs().max() < TOLERANCE[dtype], name


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("layers", "switches"), SWITCHES)
def test_gradients_equal_those_of_the_literal_form(layers: int, switches: dict, training: bool) -> None:
    head = random_head(layers, torch.float64, **switches).train(training)
    features = [f.requires_grad_() for f in random_features(layers, torch.float64)]
    leaves = [*head.parameters(), *features]

    def gradients(map_logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        slope = torch.linspace(-1, 1, map_logits.numel(), dtype=map_logits.dtype).reshape(map_logits.shape)
        return torch.autograd.grad((map_logits.sigmoid() * slope).sum(), leaves)

    for class_ids in (CLASS_IDS["shared, repeated"], CLASS_IDS["per image"]):
        literal = literal_choice(literal_map_logits(head, features, **literal_switches(switches)), class_ids)
        for found, expected in zip(gradients(head(features, class_ids)), gradients(literal), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("map_size", [(9, 11), (3, 2), (1, 1)])
def test_any_map_grid_equals_the_literal_form(map_size: tuple[int, int]) -> None:
    head = random_head(3, torch.float64, map_size).eval()
    features = random_features(3, torch.float64)
    expected = literal_map_logits(head, features, skip_connection=True, batch_norm=True, last_layer_relu=True)
    assert expected.shape == (BATCH, CLASSES, *map_size)
    torch.testing.assert_close(head(features), expected, rtol=0, atol=1e-10)


def test_a_head_worked_by_hand() -> None:
    head = TTameHead([1], 2, (1, 2), batch_norm=False)
    with torch.no_grad():
        head.convs[0].weight.fill_(2.0)
        head.convs[0].bias.fill_(-3.0)
        head.fuser.weight.copy_(torch.tensor([10.0, -1.0]).reshape(2, 1, 1, 1))
        head.fuser.bias.copy_(torch.tensor([0.5, 0.0]))
    # Z = relu(2 F - 3 + F): F = 0.5 gives relu(-1.5) = 0, F = 2 gives 3.
    found = head([torch.tensor([[[[0.5, 2.0]]]])])
    assert found.tolist() == [[[[0.5, 30.5]], [[0.0, -3.0]]]]


def test_training_updates_the_running_statistics_of_the_convolution_output() -> None:
    head = random_head(1, torch.float64).train()
    (features,) = random_features(1, torch.float64)
    bn = head.bns[0]
    mean, variance = bn.running_mean.clone(), bn.running_var.clone()
    x = head.convs[0](features).detach()
    head([features])
    torch.testing.assert_close(bn.running_mean, 0.9 * mean + 0.1 * x.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(bn.running_var, 0.9 * variance + 0.1 * x.var(dim=(0, 2, 3), unbiased=True))


def test_eval_mode_follows_the_weights_and_leaves_the_statistics() -> None:
    head = random_head(2, torch.float64).eval()
    features = random_features(2, torch.float64)
    before = {name: value.clone() for name, value in head.state_dict().items()}
    head(features)
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())
    with torch.no_grad():
        head.convs[0].weight.mul_(-2)
        head.bns[1].running_var.mul_(3)
    expected = literal_map_logits(head, features, skip_connection=True, batch_norm=True, last_layer_relu=True)
    torch.testing.assert_close(head(features), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "class_ids", [torch.tensor([3, 1]), torch.tensor([[3], [1], [3]])], ids=["shared", "per image"]
)
def test_rows_not_asked_for_get_zero_gradient(class_ids: torch.Tensor, training: bool) -> None:
    head = random_head(3, torch.float64).train(training)
    head(random_features(3, torch.float64), class_ids).square().sum().backward()
    for parameter in (head.fuser.weight, head.fuser.bias):
        asked = parameter.grad.reshape(CLASSES, -1).abs().sum(dim=1) > 0
        assert asked.tolist() == [False, True, False, True, False]


def test_the_tensor_of_all_channels_at_map_size_is_never_made(monkeypatch: pytest.MonkeyPatch) -> None:
    resized: list[int] = []
    interpolate: Callable[..., torch.Tensor] = F.interpolate

    def watched(maps: torch.Tensor, **options) -> torch.Tensor:
        resized.append(maps.shape[1])
        return interpolate(maps, **options)

    monkeypatch.setattr(F, "interpolate", watched)
    random_head(3, torch.float32).eval()(random_features(3, torch.float32), torch.tensor([[0], [1], [2]]))
    assert resized == [1, 1, 1]


@pytest.mark.parametrize("given", [0, 1, 3])
def test_wrong_number_of_features_raises(given: int) -> None:
    with pytest.raises(ValueError, match=f"reads 2 feature layers, got {given}"):
        random_head(2, torch.float32)(random_features(given, torch.float32))


def test_a_saturated_start_is_scaled_down_and_another_left_alone():
    torch.manual_seed(0)
    head = TTameHead([6, 8], 5, (4, 4)).eval()
    before = head.fuser.weight.clone()
    features = [torch.randn(2, 6, 4, 4), torch.randn(2, 8, 2, 2)]
    unsaturate(head, features)
    assert torch.equal(head.fuser.weight, before)
    large = [1000 * maps for maps in features]
    unsaturate(head, large)
    assert head(large).square().mean().sqrt().item() == pytest.approx(1, abs=0.05)
