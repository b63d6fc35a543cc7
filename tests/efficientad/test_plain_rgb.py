"""Networks that take plain RGB: the same as Anomalib's, never out of date, in any precision, exported."""

import copy
from pathlib import Path

import numpy as np
import onnxruntime
import openvino
import pytest
import torch
from anomalib.models.image.efficient_ad.torch_model import EfficientAdModel, EfficientAdModelSize

from anomalib_efficientad.torch_model import DistilledEfficientAdModel
from anomalib_pack.packing import packs, unpacked

IMAGES = torch.rand(2, 3, 256, 272, generator=torch.Generator().manual_seed(0))
IMAGES[:, :, 100:140, 60:120] = 1  # what makes a difference that no precision rounds away
SIZES = pytest.mark.parametrize("size", list(EfficientAdModelSize))
PADDING = pytest.mark.parametrize("padding", [False, True])
HALF = pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16], ids=str)
FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}  # some CPUs would take bfloat16
PARTS = ("teacher", "student", "ae")


def stock(size: EfficientAdModelSize, padding: bool = False) -> EfficientAdModel:
    """Anomalib's thin model, with statistics and quantiles."""
    torch.manual_seed(0)
    model = EfficientAdModel(8, size, padding).eval()
    with torch.no_grad():
        for name, value in (("qa_st", 0.03), ("qb_st", 0.07), ("qa_ae", 0.02), ("qb_ae", 0.05)):
            model.quantiles[name].fill_(value)
        # Colours count: a bias in the place of a weighted mean would be seen.
        for part in (model.teacher.conv1, model.student.conv1, model.ae.encoder.enconv1):
            part.weight.add_(0.1)
        features = model.teacher(IMAGES)
        model.mean_std["mean"].copy_(features.mean(dim=(0, 2, 3), keepdim=True))
        model.mean_std["std"].copy_(features.std(dim=(0, 2, 3), keepdim=True))
    return model


def plain(theirs: EfficientAdModel, size: EfficientAdModelSize, padding: bool = False) -> DistilledEfficientAdModel:
    """Ours with the same weights."""
    ours = DistilledEfficientAdModel(8, size, padding).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours


def outputs(model: EfficientAdModel, images: torch.Tensor) -> list[torch.Tensor]:
    """What each network makes of the images, and the map."""
    autoencoder = model.ae(images, images.shape[-2:])
    return [model.teacher(images), model.student(images), autoencoder, model(images).anomaly_map]


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    return ((result - expected).abs().max() / expected.abs().max()).item()


@SIZES
@PADDING
@torch.no_grad()
def test_the_same_as_anomalib(thin, size: EfficientAdModelSize, padding: bool) -> None:
    """Also at the border, where padding with zeros would be another colour."""
    theirs = stock(size, padding)
    ours = plain(theirs, size, padding)
    for result, expected in zip(outputs(ours, IMAGES), outputs(theirs, IMAGES), strict=True):
        assert result.shape == expected.shape
        assert relative_error(result, expected) < 1e-5


@SIZES
@torch.no_grad()
def test_at_full_width(size: EfficientAdModelSize) -> None:
    """As the paper has them, teacher and student on a patch, also in the precision that a CPU is fast in."""
    theirs, ours = EfficientAdModel(384, size).eval(), DistilledEfficientAdModel(384, size).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    expected = theirs.ae(IMAGES[:1], IMAGES.shape[-2:])
    assert relative_error(ours.ae(IMAGES[:1], IMAGES.shape[-2:]), expected) < 1e-5
    patches = IMAGES[:1, :, 90:130, 50:90]
    for part in ("teacher", "student"):
        expected = theirs.get_submodule(part)(patches)
        assert relative_error(ours.get_submodule(part)(patches), expected) < 1e-5
        half = copy.deepcopy(ours.get_submodule(part)).bfloat16()
        assert relative_error(half(patches.bfloat16()), expected) < 0.05


@torch.no_grad()
def test_never_out_of_date(thin) -> None:
    """After a change of the weights, by any way there is."""
    size = EfficientAdModelSize.S
    theirs = stock(size)
    ours = plain(theirs, size)

    def agree() -> None:
        for result, expected in zip(outputs(ours, IMAGES), outputs(theirs, IMAGES), strict=True):
            assert relative_error(result, expected) < 1e-5

    agree()
    for model in (theirs, ours):  # in place
        for part in PARTS:
            next(model.get_submodule(part).parameters()).mul_(1.5)
    agree()
    for model in (theirs, ours):  # past PyTorch's counting of changes
        for part in PARTS:
            next(model.get_submodule(part).parameters()).data.add_(0.3)
    agree()
    for model in (theirs, ours):  # a step of an optimiser between two evaluations
        model.choose_random_aug_image = lambda image: 0.9 * image  # the same for both
        torch.manual_seed(1)  # of the dropout
        model.train()
        optimizer = torch.optim.SGD([*model.student.parameters(), *model.ae.parameters()], lr=1e-3)
        with torch.enable_grad():
            sum(model(IMAGES[:1], IMAGES[1:])).backward()
        optimizer.step()
        model.eval()
    agree()
    theirs = stock(size, padding=False)
    ours.load_state_dict({name: value.clone() for name, value in theirs.state_dict().items()}, assign=True)
    agree()
    copied = copy.deepcopy(ours)
    assert torch.equal(copied(IMAGES).anomaly_map, ours(IMAGES).anomaly_map)


@SIZES
def test_what_runs_where(thin, size: EfficientAdModelSize) -> None:
    """Packed copies in eval mode without gradients, of the teacher in training too; the channels are last."""
    model = plain(stock(size), size)

    def run(mode: bool, gradients: bool) -> list[bool]:
        model.train(mode)
        with torch.set_grad_enabled(gradients):
            model(IMAGES[:1], IMAGES[1:])
            for part in (model.teacher, model.student):
                assert part(IMAGES).is_contiguous(memory_format=torch.channels_last)
                assert not part(IMAGES).is_contiguous()
        with torch.no_grad():
            teacher = model.teacher(IMAGES)
            with unpacked():
                assert relative_error(teacher, model.teacher(IMAGES)) < 1e-5
            model.teacher(IMAGES)
        return [model.get_submodule(part)._folding._copy is not None for part in PARTS]

    packed = packs(IMAGES)
    assert run(mode=False, gradients=False) == 3 * [packed]
    assert run(mode=True, gradients=True) == [packed, False, False]
    assert run(mode=False, gradients=True) == [packed, False, packed]  # no gradient is asked of the autoencoder
    assert not any(module.training for module in model.train().teacher.modules())


def test_gradients_in_eval_mode(thin) -> None:
    """To images and parameters, also after a pass without gradients."""
    theirs = stock(EfficientAdModelSize.S)
    ours = plain(theirs, EfficientAdModelSize.S)
    with torch.no_grad():
        ours(IMAGES)
    gradients = []
    for model in (ours, theirs):
        images = IMAGES.clone().requires_grad_()
        _, distances = model.compute_student_teacher_distance(images)
        gradients.append(torch.autograd.grad(distances.square().sum(), [images, *model.student.parameters()]))
    for result, expected in zip(*gradients, strict=True):
        assert relative_error(result, expected) < 1e-4


@torch.no_grad()
def test_hooks(thin) -> None:
    """They see what a layer gives, which nothing overwrites."""
    theirs = stock(EfficientAdModelSize.S)
    ours = plain(theirs, EfficientAdModelSize.S)
    ours(IMAGES)
    seen = []
    for model in (ours, theirs):
        for layer in (model.student.conv2, model.ae.encoder.enconv2):
            layer.register_forward_hook(lambda *arguments: seen.append(arguments[2]))
        model(IMAGES)
    assert len(seen) == 4
    for result, expected in zip(seen[:2], seen[2:], strict=True):
        assert relative_error(result, expected) < 1e-5
        assert result.min() < 0


@SIZES
@PADDING
@HALF
@torch.no_grad()
def test_half_precision(thin, size: EfficientAdModelSize, padding: bool, precision: torch.dtype) -> None:
    """Cast, and under autocast; Anomalib's own networks cannot run cast."""
    theirs = stock(size, padding)
    ours, expected = plain(theirs, size, padding), theirs(IMAGES)
    with torch.autocast("cpu", precision):
        automatic = ours(IMAGES)
    cast = ours.to(precision)(IMAGES.to(precision))
    spread = expected.anomaly_map.max() - expected.anomaly_map.min()
    tolerance = {torch.float16: 0.01, torch.bfloat16: 0.1}[precision] * spread
    for result in (automatic, cast):
        assert result.anomaly_map.dtype == result.pred_score.dtype == torch.float32
        assert (result.anomaly_map - expected.anomaly_map).abs().max() < tolerance
        assert (result.pred_score - expected.pred_score.flatten()).abs().max() < tolerance
    with pytest.raises(RuntimeError):
        theirs.to(precision)(IMAGES.to(precision))


@HALF
def test_training_in_half_precision(thin, precision: torch.dtype) -> None:
    model = DistilledEfficientAdModel(8).to(precision).train()
    losses = model(IMAGES[:1].to(precision), IMAGES[1:].to(precision))
    sum(losses).backward()
    assert all(torch.isfinite(loss) for loss in losses)
    assert all(parameter.grad.isfinite().all() for parameter in model.student.parameters())


@torch.no_grad()
def test_nothing_overflows_in_float16(thin) -> None:
    """Differences whose squares are beyond float16, quantiles that are one in it, a deviation that is 0."""
    theirs = stock(EfficientAdModelSize.S)
    for name, value in (("qa_st", 500.0), ("qb_st", 500.01), ("qa_ae", 700.0), ("qb_ae", 700.01)):
        theirs.quantiles[name].fill_(value)
    theirs.mean_std["std"].fill_(1e-9)
    theirs.ae.decoder.deconv8.bias.fill_(400)  # squared: 160 000
    expected = theirs(IMAGES)
    result = plain(theirs, EfficientAdModelSize.S).half()(IMAGES.half())
    assert result.anomaly_map.isfinite().all()
    assert (result.anomaly_map / expected.anomaly_map - 1).abs().max() < 0.05


def test_statistics_keep_their_precision(thin) -> None:
    """Through any cast, whereas networks are cast; other devices take both."""
    model = DistilledEfficientAdModel(8)
    with torch.no_grad():
        for value in [*model.quantiles.values(), *model.mean_std.values()]:
            value.add_(1 / 3)
    for cast in ("half", "bfloat16", "double", "float"):
        getattr(model, cast)()
        for value in [*model.quantiles.values(), *model.mean_std.values()]:
            assert value.dtype == torch.float32
            assert (value == torch.tensor(1 / 3)).all()
    model.half()
    assert model.student.conv1.weight.dtype == torch.float16
    model.to("meta")
    assert model.quantiles["qa_st"].device.type == "meta"
    assert model.to_empty(device="cpu").quantiles["qa_st"].device.type == "cpu"


@pytest.mark.parametrize(("size", "padding"), [(EfficientAdModelSize.S, True), (EfficientAdModelSize.M, False)])
def test_exports(thin, size: EfficientAdModelSize, padding: bool, tmp_path: Path) -> None:
    """ONNX and OpenVINO."""
    model = plain(stock(size, padding), size, padding)
    with torch.no_grad():
        expected = model(IMAGES).anomaly_map.numpy()
    file = tmp_path / "model.onnx"
    torch.onnx.export(
        model, (IMAGES,), file, input_names=["images"], output_names=["score", "map"], dynamo=True, verbose=False
    )
    for result in (
        onnxruntime.InferenceSession(file).run(["map"], {"images": IMAGES.numpy()})[0],
        openvino.compile_model(file, "CPU", FLOAT32)(IMAGES.numpy())["map"],
    ):
        assert np.abs(result - expected).max() < 1e-4 * np.ptp(expected)
