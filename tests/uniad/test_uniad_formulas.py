"""Each formula against a slow NumPy version in float64, written from the paper."""

import math

import numpy as np
import pytest
import torch

from anomalib_uniad.anomaly_map import full_size, image_score, reconstruction_error
from anomalib_uniad.components import Cnn, LearnedPositions, Mlp, SinePositions, Transformer, neighbor_mask
from anomalib_uniad.loss import UniadLoss
from anomalib_uniad.torch_model import Reconstruction, jitter, join_features

GRID = (3, 4)
TOKENS, CHANNELS, HEADS = 12, 8, 2


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("neighbors", [(1, 1), (3, 3), (3, 5), (1, 4), (2, 2)])
def test_neighbor_mask(neighbors: tuple[int, int]) -> None:
    """Fig. 5, one pair of tokens after the other."""
    h, w = 5, 6
    expected = np.zeros((h * w, h * w))
    for row in range(h):
        for column in range(w):
            for other_row in range(h):
                for other_column in range(w):
                    if abs(row - other_row) <= neighbors[0] // 2 and abs(column - other_column) <= neighbors[1] // 2:
                        expected[row * w + column, other_row * w + other_column] = -np.inf
    np.testing.assert_array_equal(neighbor_mask((h, w), neighbors).numpy(), expected)


@pytest.mark.parametrize(("grid", "neighbors"), [((7, 7), (7, 7)), ((4, 4), (5, 5)), ((2, 9), (3, 17))])
def test_window_that_hides_everything(grid: tuple[int, int], neighbors: tuple[int, int]) -> None:
    """The middle of a 7 x 7 grid sees nothing past a 7 x 7 window: softmax over nothing is NaN."""
    with pytest.raises(ValueError, match=f"neighbor_size .*{neighbors[0]} x {neighbors[1]}.*{grid[0]} x {grid[1]}"):
        neighbor_mask(grid, neighbors)


def layer_norm(tokens: np.ndarray, norm: torch.nn.LayerNorm) -> np.ndarray:
    mean, variance = tokens.mean(-1, keepdims=True), tokens.var(-1, keepdims=True)
    normalised = (tokens - mean) / np.sqrt(variance + 1e-5)
    return normalised * array(norm.weight) + array(norm.bias)


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def linear(tokens: np.ndarray, layer: torch.nn.Linear) -> np.ndarray:
    return tokens @ array(layer.weight).T + array(layer.bias)


def attend(module, query: np.ndarray, key: np.ndarray, value: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Token by token and head by head, (N, D)."""
    weight, bias, size = array(module.in_proj_weight), array(module.in_proj_bias), CHANNELS // HEADS
    q, k, v = (
        tokens @ weight[part * CHANNELS : (part + 1) * CHANNELS].T + bias[part * CHANNELS : (part + 1) * CHANNELS]
        for part, tokens in enumerate((query, key, value))
    )
    result = np.zeros_like(query)
    for head in range(HEADS):
        columns = slice(head * size, (head + 1) * size)
        for token in range(len(query)):
            logits = [q[token, columns] @ other / math.sqrt(size) for other in k[:, columns]]
            weights = np.exp(np.array(logits) + mask[token])
            result[token, columns] = (weights / weights.sum()) @ v[:, columns]
    return linear(result, module.out_proj)


def feed_forward(layer, tokens: np.ndarray) -> np.ndarray:
    return linear(np.maximum(linear(tokens, layer.linear1), 0), layer.linear2)


# Appendix C.2 as nested attentions "one" and "two", of query and source, over the query embedding q, the encoder's
# output e and the previous layer's p.
DESIGNS = {
    "encoder_then_previous": lambda one, two, q, e, p: two(one(q, e), p),  # Fig. A1 (a)
    "previous_then_encoder": lambda one, two, q, e, p: two(one(q, p), e),
    "encoder_reads_previous": lambda one, two, q, e, p: two(q, one(e, p)),
    "previous_reads_encoder": lambda one, two, q, e, p: two(q, one(p, e)),
    "encoder_for_previous": lambda one, two, q, e, p: two(p, one(q, e)),
    "previous_for_encoder": lambda one, two, q, e, p: two(e, one(q, p)),
}


def reference(
    model: Transformer, tokens: np.ndarray, positions: np.ndarray, masks: list[np.ndarray], decoder: str
) -> np.ndarray:
    """Encoder and decoder of Sec. 3.2 (layer-wise queries) or of appendix B.1 (the others) for one image."""
    memory = tokens
    for layer in model.encoder.layers:
        located = memory + positions
        memory = layer_norm(memory + attend(layer.self_attn, located, located, memory, masks[0]), layer.norm1)
        memory = layer_norm(memory + feed_forward(layer, memory), layer.norm2)
    first = model.decoder.first_query
    output = memory if first is None else array(first.weight)
    for layer in model.decoder.layers:

        def one(query: np.ndarray, source: np.ndarray, layer=layer) -> np.ndarray:
            attended = attend(layer.self_attn, query + positions, source + positions, source, masks[1])
            return layer_norm(query + attended, layer.norm1)

        def two(query: np.ndarray, source: np.ndarray, layer=layer) -> np.ndarray:
            attended = attend(layer.multihead_attn, query + positions, source + positions, source, masks[2])
            return layer_norm(query + attended, layer.norm2)

        if layer.learned_embed is None:  # self-attention, then cross-attention
            fused = two(one(output, output), memory)
        else:
            fused = DESIGNS[decoder](one, two, array(layer.learned_embed.weight), memory, output)
        output = layer_norm(fused + feed_forward(layer, fused), layer.norm3)
    return layer_norm(output, model.decoder.norm)


@torch.no_grad()
def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """Random also where a network starts with 0 or 1: biases and norms."""
    for parameter in model.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize(
    ("query", "decoder"), [*(("layerwise", name) for name in DESIGNS), ("first", None), ("none", None)]
)
@pytest.mark.parametrize("layers", [(2, 2), (0, 2), (2, 1)])
def test_transformer(query: str, decoder: str | None, layers: tuple[int, int]) -> None:
    torch.manual_seed(0)
    design = {} if decoder is None else {"decoder": decoder}
    model = shaken(Transformer(TOKENS, CHANNELS, HEADS, 16, layers, 0.1, query, **design))
    tokens, positions = random(2, TOKENS, CHANNELS), random(TOKENS, CHANNELS, seed=1)
    masks = [neighbor_mask(GRID, (1, 1)), neighbor_mask(GRID, (1, 3)), neighbor_mask(GRID, (3, 3))]
    ours = model(tokens, positions, masks)
    for image in range(2):
        expected = reference(model, array(tokens[image]), array(positions), [array(mask) for mask in masks], decoder)
        np.testing.assert_allclose(array(ours[image]), expected, atol=1e-5)


def project(module, tokens: np.ndarray) -> np.ndarray:
    return np.maximum(layer_norm(linear(tokens, module.linear), module.norm), 0)


@torch.no_grad()
def test_mlp() -> None:
    """Appendix B.1: projections where the vanilla transformer has attentions, and no positions."""
    torch.manual_seed(0)
    model = shaken(Mlp(TOKENS, CHANNELS, 16, (2, 2), 0.1))
    tokens = random(2, TOKENS, CHANNELS)
    ours = model(tokens)
    encoder, decoder = model.transformer.encoder, model.transformer.decoder
    for image in range(2):
        memory = array(tokens[image])
        for layer in encoder.layers:
            memory = layer_norm(memory + project(layer.self_attn, memory), layer.norm1)
            memory = layer_norm(memory + feed_forward(layer, memory), layer.norm2)
        output = array(decoder.first_query.weight)
        for layer in decoder.layers:
            output = layer_norm(output + project(layer.self_attn, output), layer.norm1)
            joined = np.concatenate([output, memory], axis=1)
            output = layer_norm(output + project(layer.multihead_attn, joined), layer.norm2)
            output = layer_norm(output + feed_forward(layer, output), layer.norm3)
        np.testing.assert_allclose(array(ours[image]), layer_norm(output, decoder.norm), atol=1e-5)


def convolve(maps: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Stride 1, zeros outside: (C, h, w) -> (C', h, w)."""
    reach = kernel.shape[2] // 2
    padded = np.pad(maps, ((0, 0), (reach, reach), (reach, reach)))
    result = np.zeros((len(kernel), *maps.shape[1:]))
    for row in range(maps.shape[1]):
        for column in range(maps.shape[2]):
            window = padded[:, row : row + kernel.shape[2], column : column + kernel.shape[3]]
            result[:, row, column] = (kernel * window).sum(axis=(1, 2, 3))
    return result


def batch_norm(maps: np.ndarray, norm: torch.nn.BatchNorm2d) -> np.ndarray:
    scale = array(norm.weight) / np.sqrt(array(norm.running_var) + 1e-5)
    return (maps - array(norm.running_mean)[:, None, None]) * scale[:, None, None] + array(norm.bias)[:, None, None]


@torch.no_grad()
def test_cnn() -> None:
    """Appendix B.1: the 3, 4, 6 and 3 blocks of ResNet-34 without stride, with D, D/2, D/2 and D channels."""
    torch.manual_seed(0)
    model = shaken(Cnn(GRID, CHANNELS))
    tokens = random(2, TOKENS, CHANNELS)
    ours = model(tokens)
    assert [block.conv2.out_channels for block in model.blocks] == [8, 8, 8] + 10 * [4] + [8, 8, 8]
    for image in range(2):
        maps = array(tokens[image]).T.reshape(CHANNELS, *GRID)
        for block in model.blocks:
            hidden = np.maximum(batch_norm(convolve(maps, array(block.conv1.weight)), block.bn1), 0)
            hidden = batch_norm(convolve(hidden, array(block.conv2.weight)), block.bn2)
            if block.downsample is not None:
                maps = batch_norm(convolve(maps, array(block.downsample[0].weight)), block.downsample[1])
            maps = np.maximum(hidden + maps, 0)
        np.testing.assert_allclose(array(ours[image]), maps.reshape(CHANNELS, TOKENS).T, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_learned_positions() -> None:
    torch.manual_seed(0)
    positions = LearnedPositions(GRID, CHANNELS)
    for row in range(3):
        for column in range(4):
            expected = torch.cat([positions.col_embed.weight[column], positions.row_embed.weight[row]])
            assert torch.equal(positions()[row * 4 + column], expected)
    tables = torch.cat([positions.row_embed.weight, positions.col_embed.weight])
    assert tables.min() >= 0
    assert tables.max() < 1


def test_sine_positions() -> None:
    positions = SinePositions(GRID, CHANNELS)().numpy()
    for row in range(3):
        for column in range(4):
            expected = []
            for place, length in ((row, 3), (column, 4)):
                angle = 2 * math.pi * (place + 1) / length
                for pair in range(CHANNELS // 4):
                    frequency = 10000 ** -(2 * pair / (CHANNELS // 2))
                    expected += [math.sin(angle * frequency), math.cos(angle * frequency)]
            np.testing.assert_allclose(positions[row * 4 + column], expected, atol=1e-6)


def test_jitter() -> None:
    """Eq. 3: the standard deviation is alpha times the token's norm over the number of channels."""
    tokens = random(1, 3, 50) * torch.tensor([1.0, 10.0, 0.0]).view(1, 3, 1)
    draws = torch.stack([jitter(tokens, random(1, 3, 50, seed=seed), scale=20.0) for seed in range(400)]) - tokens
    expected = 20 * tokens.norm(dim=2) / 50
    torch.testing.assert_close(draws.std(dim=(0, 3)), expected, rtol=0.03, atol=1e-6)
    assert draws.mean(dim=(0, 3))[0, 0].abs() < 0.05 * expected[0, 0]


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


ERRORS = {
    "mse": lambda theirs, ours: np.linalg.norm(theirs - ours),  # Eq. 5
    "normalized_mse": lambda theirs, ours: np.linalg.norm(unit(theirs) - unit(ours)),
    "cosine": lambda theirs, ours: 1 - unit(theirs) @ unit(ours),
}


@pytest.mark.parametrize("kind", list(ERRORS))
def test_errors_and_losses(kind: str) -> None:
    features, reconstruction = random(2, 5, *GRID), random(2, 5, *GRID, seed=1)
    expected = np.zeros((2, *GRID))
    for image in range(2):
        for row in range(3):
            for column in range(4):
                pixel = (image, slice(None), row, column)
                expected[image, row, column] = ERRORS[kind](array(features)[pixel], array(reconstruction)[pixel])
    np.testing.assert_allclose(reconstruction_error(features, reconstruction, kind), expected, atol=1e-6)
    loss = UniadLoss(kind)(Reconstruction(features, reconstruction)).item()
    losses = {  # mean over the locations; Eq. 4 also over the 5 channels
        "mse": (expected**2).mean() / 5,
        "normalized_mse": (expected**2).mean(),
        "cosine": expected.mean(),
    }
    assert loss == pytest.approx(losses[kind], rel=1e-5)


@pytest.mark.parametrize("kind", list(ERRORS))
def test_loss_has_a_gradient_where_the_reconstruction_is_exact(kind: str) -> None:
    features = random(1, 5, *GRID)
    reconstruction = features.clone().requires_grad_()
    UniadLoss(kind)(Reconstruction(features, reconstruction)).backward()
    assert reconstruction.grad.isfinite().all()
    assert reconstruction.grad.abs().max() < 1e-6


def test_full_size_keeps_corners() -> None:
    """align_corners: the outermost values lie on the outermost pixels, and what is between is linear."""
    error = torch.tensor([[[0.0, 3.0], [6.0, 9.0]]])
    maps = full_size(error, (3, 4))
    expected = torch.tensor([[0.0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]])
    torch.testing.assert_close(maps, expected.view(1, 1, 3, 4))


def test_join_features_takes_every_step_of_a_shrinking_grid() -> None:
    """No antialiasing: a 7 x 7 map on a 4 x 4 grid is every second value."""
    maps = random(1, 2, 7, 7)
    torch.testing.assert_close(join_features([maps], (4, 4)), maps[..., ::2, ::2])


def test_image_score() -> None:
    maps = random(2, 1, 20, 18)
    windows = [(slice(top, top + 16), slice(left, left + 16)) for top in range(5) for left in range(3)]
    expected = [max(image[0][window].mean() for window in windows) for image in maps]
    torch.testing.assert_close(image_score(maps, "max"), torch.stack(expected))
    np.testing.assert_allclose(image_score(maps, "mean"), [array(image).mean() for image in maps], atol=1e-6)
    np.testing.assert_allclose(image_score(maps, "std"), [array(image).std() for image in maps], atol=1e-6)
