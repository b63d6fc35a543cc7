import numpy as np
import pytest
import torch

from anomalib_pack.quantiles import MAX_VALUES, quantiles


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 1, 5, 4)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_quantiles_equal_numpy(shape, dtype):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    q = [0.0, 0.1, 0.5, 0.995, 1.0]
    result = quantiles(values, q)
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result, np.quantile(values.double().numpy(), q), rtol=1e-5, atol=1e-6)


def test_more_values_than_torch_takes():
    values = torch.arange(MAX_VALUES + 1000, dtype=torch.float32).flip(0)
    random_state = torch.get_rng_state()
    result = quantiles(values, [0.1, 0.5, 0.99])
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(quantiles(values, [0.1, 0.5, 0.99]), result)
    np.testing.assert_allclose(result / values.numel(), [0.1, 0.5, 0.99], atol=6e-4)


def test_exactly_at_the_limit_is_not_sampled():
    values = torch.arange(MAX_VALUES, dtype=torch.float32)
    assert quantiles(values, [1.0]).item() == MAX_VALUES - 1
    assert quantiles(values, [0.0]).item() == 0


def test_no_values():
    with pytest.raises(ValueError, match="values is empty"):
        quantiles(torch.empty(0, 3), [0.5])


def test_nan():
    with pytest.raises(ValueError, match="1 of 3 values are NaN"):
        quantiles(torch.tensor([0.0, float("nan"), 1.0]), [0.5])
