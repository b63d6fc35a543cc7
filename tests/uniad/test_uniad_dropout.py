"""Dropout on a CPU: the distribution of PyTorch's, and gradients of exactly what was dropped."""

import pytest
import torch
from torch import nn

from anomalib_uniad.components import attention
from anomalib_uniad.components.attention import Attention, DropoutAttention
from anomalib_uniad.components.dropout import Dropout, draw

B, HEADS, N = 6, 2, 8
D = N  # as many channels as tokens, so that values can be a unit matrix: attention then gives the weights themselves
P = 0.3


def softmax_weights(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    logits = q @ k.mT / D**0.5
    return (logits if mask is None else logits + mask).softmax(dim=3)


@pytest.fixture
def inputs() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(B, N, HEADS, D).transpose(1, 2).requires_grad_() for _ in range(3)]


@pytest.fixture
def mask() -> torch.Tensor:
    return torch.zeros(N, N).masked_fill(torch.eye(N).bool(), float("-inf"))


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("cached", [1, 2 * HEADS * N * N, 2**20])
def test_attention_and_gradients(
    inputs: list[torch.Tensor], mask: torch.Tensor, masked: bool, cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of softmax, mask of kept weights and two products, whose gradients PyTorch knows."""
    monkeypatch.setattr(attention, "CACHED", cached)  # one image at a time, two, all
    q, k, v = inputs
    bias = mask if masked else None
    weights = softmax_weights(q, k, bias)
    unit = torch.eye(N).expand(B, HEADS, N, D).contiguous()
    torch.manual_seed(1)
    seen = DropoutAttention.apply(q, k, unit, bias, P).detach()
    factors = torch.where(seen > 0, seen / weights.detach(), 0)
    dropped = (seen == 0) & (weights > 0)
    assert 0.2 < dropped.float().mean() < 0.4
    torch.testing.assert_close(factors[seen > 0], torch.full_like(seen[seen > 0], 1 / (1 - P)), atol=1e-4, rtol=0)

    torch.manual_seed(1)  # the same weights are dropped
    ours = DropoutAttention.apply(q, k, v, bias, P)
    theirs = (weights * factors) @ v
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    outer = torch.randn(ours.shape)
    for mine, expected in zip(
        torch.autograd.grad(ours, inputs, outer), torch.autograd.grad(theirs, inputs, outer), strict=True
    ):
        torch.testing.assert_close(mine, expected, atol=1e-5, rtol=0)


def test_attention_without_dropout_is_that_of_pytorch(inputs: list[torch.Tensor], mask: torch.Tensor) -> None:
    ours = DropoutAttention.apply(*inputs, mask, 0.0)
    theirs = nn.functional.scaled_dot_product_attention(*inputs, attn_mask=mask)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_one_query_for_all_images() -> None:
    """Its gradient is the sum over the images."""
    torch.manual_seed(0)
    module = Attention(16, 4, dropout=P).train()
    query, tokens = torch.randn(1, N, 16, requires_grad=True), torch.randn(B, N, 16)
    torch.manual_seed(1)
    module(query, tokens, tokens, None).square().sum().backward()
    many = query.detach().expand(B, N, 16).clone().requires_grad_()
    torch.manual_seed(1)
    module(many, tokens, tokens, None).square().sum().backward()
    torch.testing.assert_close(query.grad, many.grad.sum(dim=0, keepdim=True), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 0.999999])
def test_draws(probability: float) -> None:
    torch.manual_seed(0)
    draws, factor = draw(torch.Size((1001, 401)), probability)
    share, deviation = (draws < 0).float().mean().item(), (probability * (1 - probability) / draws.numel()) ** 0.5
    assert abs(share - probability) <= 5 * deviation + 2**-16
    assert abs(factor * (1 - probability) - 1) < 1e-4 or probability > 0.99
    expected = draws[:, 1:] < 0  # neighbours, which come from one number, know nothing of each other
    both = (expected & (draws[:, :-1] < 0)).float().mean().item()
    assert abs(both - probability**2) <= 5 * probability / draws.numel() ** 0.5 + 2**-15


def test_dropout_has_the_distribution_of_pytorch() -> None:
    torch.manual_seed(0)
    values = torch.linspace(1, 2, 200_000).requires_grad_()
    results = {kind: kind(0.1).train()(values) for kind in (Dropout, nn.Dropout)}
    for result in results.values():
        kept = result != 0
        assert abs(kept.float().mean().item() - 0.9) < 0.004  # 6 standard deviations
        torch.testing.assert_close(result[kept], values[kept] / 0.9, atol=1e-4, rtol=0)
        [gradient] = torch.autograd.grad(result.sum(), values)
        torch.testing.assert_close(gradient, kept / 0.9, atol=1e-4, rtol=0)
    assert not torch.equal(results[Dropout] != 0, results[nn.Dropout] != 0)


def test_dropout_does_nothing_in_eval_mode_and_without_probability() -> None:
    values = torch.rand(5, 3)
    assert Dropout(0.5).eval()(values) is values
    torch.testing.assert_close(Dropout(0.0).train()(values), values, atol=0, rtol=0)


def test_same_seed_same_draws() -> None:
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(Dropout(0.5).train()(torch.ones(100)))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_under_autocast_pytorch_drops() -> None:
    module = Attention(16, 4, dropout=0.5).train()
    tokens = torch.randn(B, N, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(tokens, tokens, tokens, None).isfinite().all()
