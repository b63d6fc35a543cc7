"""The watch over a fake GPU, and what of the shared parts runs under it."""

from collections.abc import Callable

import pytest
import torch
from anomalib.data import InferenceBatch
from fake_gpu import DEVICE, WaitError, Watch, is_there, to_fake_gpu
from torch._subclasses.fake_tensor import FakeTensorMode

from anomalib_pack.post_processing import RankPreservingPostProcessor

TRAPS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.any()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "assignment": lambda x: x.index_put((x > 0,), x),
    "left behind": lambda x: x * torch.ones(()),
    "constant": lambda x: x + torch.tensor([1.0, 2.0]).to(x.device),
}


@pytest.mark.parametrize("trap", TRAPS.values(), ids=TRAPS.keys())
def test_watch_sees(trap: Callable[[torch.Tensor], object]) -> None:
    with FakeTensorMode(), Watch(), pytest.raises(WaitError):
        trap(torch.rand(2, device=DEVICE))


@pytest.mark.parametrize("sensitivity", [0.0, 0.3, 0.5, 1.0])
def test_post_processing_waits_for_nothing(sensitivity: float) -> None:
    post_processor = RankPreservingPostProcessor(image_sensitivity=sensitivity, pixel_sensitivity=sensitivity)
    mode = FakeTensorMode()
    to_fake_gpu(post_processor, mode)
    with mode, Watch():
        result = post_processor(InferenceBatch(anomaly_map=torch.rand(2, 1, 8, 8, device=DEVICE)))
    is_there(result.pred_mask, (2, 1, 8, 8), torch.bool)
