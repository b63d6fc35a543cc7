"""Contract point 5: each network runs in half precision, as `anomalib efficiency` measures it.

Each is as its paper has it: the class's defaults. On a CPU float16 takes minutes where bfloat16 takes seconds.
"""

import torch
from anomalib.models import AnomalibModule
from cases import Case

TOLERANCE = 0.03  # of the map's range; bfloat16 has 8 bits, and each rounding adds up to 0.4 %


@torch.no_grad()
def test_agrees_with_float32(model_class: type[AnomalibModule], case: Case) -> None:
    torch.manual_seed(0)
    model = model_class(**case.published)
    case.complete(model)
    network, images = model.model.eval(), torch.rand(1, 3, *model.input_size)
    exact = network(images)
    rounded = network.bfloat16()(images.bfloat16())
    spread = exact.anomaly_map.max() - exact.anomaly_map.min()
    assert spread > 0
    assert rounded.anomaly_map.dtype == rounded.pred_score.dtype == torch.float32  # half precision would merge scores
    assert (rounded.anomaly_map - exact.anomaly_map).abs().max() < TOLERANCE * spread
    torch.testing.assert_close(rounded.pred_score, exact.pred_score, atol=0, rtol=TOLERANCE)
