"""A model with a region: what lies outside changes nothing, to the last bit, and what lies inside does.

Networks are at their small sizes; the region is a rectangle in the middle.
"""

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import openvino
import pytest
import torch
from anomalib.data import ImageBatch
from anomalib.models import AnomalibModule
from cases import Case
from lightning import Trainer, seed_everything
from PIL import Image
from runs import SEED, quiet_engine

from anomalib_pack.data import MVTecLoco, SyntheticLoco

MIDDLE = [[[0.25, 0.3], [0.75, 0.3], [0.75, 0.8], [0.25, 0.8]]]
WHOLE = [[[0, 0], [1, 0], [1, 1], [0, 1]]]
PIXELS = (slice(14, 58), slice(11, 54))  # of images of 64 x 64, with what resizing may mix with the region


def build(model_class: type[AnomalibModule], case: Case, region: list | None, **components: Any) -> AnomalibModule:
    torch.manual_seed(SEED)
    model = model_class(**case.arguments, region=region, **components)
    torch.manual_seed(SEED)
    case.complete(model)
    return model


def images(model: AnomalibModule) -> torch.Tensor:
    return torch.rand(2, 3, *model.input_size, generator=torch.Generator().manual_seed(0))


def with_anomaly_outside(images: torch.Tensor) -> torch.Tensor:
    """Stripes everywhere but in the region and a pixel around it."""
    height, width = images.shape[-2:]
    changed = torch.zeros_like(images)
    changed[..., ::7] = 1
    rows, columns = slice(int(0.3 * height) - 1, int(0.8 * height) + 2), slice(width // 4 - 1, 3 * width // 4 + 1)
    changed[..., rows, columns] = images[..., rows, columns]
    return changed


@torch.no_grad()
def test_what_is_outside_changes_no_score(model_class: type[AnomalibModule], case: Case) -> None:
    model = build(model_class, case, MIDDLE)
    network, batch = model.model.eval(), images(model)
    expected, found = network(batch), network(with_anomaly_outside(batch))
    assert torch.equal(found.pred_score, expected.pred_score)
    assert torch.equal(found.anomaly_map, expected.anomaly_map)
    outside = ~network.region.inside(model.input_size, batch.device)
    [value] = expected.anomaly_map[..., outside].unique()
    assert value < expected.anomaly_map[..., ~outside].min()

    changed = batch.clone()
    height, width = model.input_size
    changed[..., height // 2 : height // 2 + 16, width // 2 : width // 2 + 16] = torch.tensor([1.0, 0.0, 0.0])[
        :, None, None
    ]
    assert (network(changed).pred_score != expected.pred_score).all()


@torch.no_grad()
def test_a_region_that_is_all_changes_nothing(model_class: type[AnomalibModule], case: Case) -> None:
    models = [build(model_class, case, region) for region in (None, WHOLE)]
    models[0].load_state_dict(models[1].state_dict())
    expected, found = (model.model.eval()(images(model)) for model in models)
    assert torch.equal(found.pred_score, expected.pred_score)
    assert torch.equal(found.anomaly_map, expected.anomaly_map)


def test_what_is_outside_changes_no_gradient(model_class: type[AnomalibModule], case: Case) -> None:
    """After one training step."""

    def gradients(batch: torch.Tensor) -> dict[str, torch.Tensor]:
        model = build(model_class, case, MIDDLE).train()
        torch.manual_seed(SEED)
        random.seed(SEED)
        model.training_step(ImageBatch(image=batch, image_path=["a.png", "b.png"]), 0)["loss"].backward()
        return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}

    batch = images(build(model_class, case, None))
    expected, found = gradients(batch), gradients(with_anomaly_outside(batch))
    assert expected
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


# --- Training, checkpoints and exports, on images of the rendered data set that also differ outside ---


def check_exports(model: AnomalibModule, folder: Path) -> None:
    """ONNX and OpenVINO files of any image size give the numbers that the model gives."""
    model = model.eval()
    model.post_processor._image_threshold.fill_(1.0)
    image = torch.rand(1, 3, 300, 400, generator=torch.Generator().manual_seed(0))
    expected = {name: value.detach().numpy() for name, value in model(image)._asdict().items()}
    session = onnxruntime.InferenceSession(model.to_onnx(folder))
    names = [output.name for output in session.get_outputs()]
    of_onnx = dict(zip(names, session.run(None, {"input": image.numpy()}), strict=True))
    compiled = openvino.compile_model(model.to_openvino(folder), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    of_openvino = {name: compiled(image.numpy())[name] for name in names}
    outside = ~model.model.region.inside(model.input_size, image.device).numpy()
    for found in (of_onnx, of_openvino):
        for name in ("anomaly_map", "pred_score"):
            spread = np.ptp(expected["anomaly_map"])
            assert np.abs(found[name].reshape(expected[name].shape) - expected[name]).max() < 1e-4 * spread, name
        assert len(np.unique(found["anomaly_map"][..., outside])) == 1


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A rendered data set, and the same with noise outside the region in all images, stronger from image to image."""
    root = tmp_path_factory.mktemp("data")
    SyntheticLoco(root=root / "clean", image_size=64, num_train=6, num_val=3, num_test=2).prepare_data()
    shutil.copytree(root / "clean", root / "spoiled")
    for index, path in enumerate(sorted((root / "spoiled").glob("tray/*/*/*.png"))):
        pixels = np.asarray(Image.open(path)).copy()
        outside = np.ones(pixels.shape[:2], dtype=bool)
        outside[PIXELS] = False
        noise = np.random.default_rng(index).integers(0, 256, pixels.shape) * min(1, index / 10)
        pixels[outside] = noise[outside]
        Image.fromarray(pixels).save(path)
    return root / "clean", root / "spoiled"


def test_what_is_outside_changes_no_training(
    model_class: type[AnomalibModule],
    case: Case,
    roots: tuple[Path, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Networks, banks, statistics, thresholds and metrics are the same, also with the checkpoint's region alone."""
    states, metrics = [], []
    for root in roots:
        data = MVTecLoco(root=root, category="tray", train_batch_size=4, eval_batch_size=4, num_workers=0)
        size = model_class.configure_pre_processor(case.other_size)
        model = build(model_class, case, MIDDLE, pre_processor=size)
        seed_everything(SEED)
        engine = quiet_engine(tmp_path, max_epochs=1, logger=False)
        engine.fit(model, datamodule=data)
        states.append(model.state_dict())
        metrics += engine.test(model, datamodule=data, verbose=False)
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(states[1][name], tensor), name
    assert metrics[0] == metrics[1]

    checkpoint = tmp_path / "checkpoint.ckpt"
    engine.trainer.save_checkpoint(checkpoint)
    caplog.clear()
    restored = model_class.load_from_checkpoint(checkpoint)
    batch = images(restored)
    assert torch.equal(restored.model.region.fill(batch), model.model.region.fill(batch))
    assert "region=" not in caplog.text
    other = build(model_class, case, WHOLE)
    metrics += quiet_engine(tmp_path, logger=False).test(other, datamodule=data, ckpt_path=checkpoint, verbose=False)
    assert metrics[2] == metrics[0]
    [said] = [record.message for record in caplog.records if "region=" in record.message]
    assert "region=[[[0.25, 0.3], [0.75, 0.3], [0.75, 0.8], [0.25, 0.8]]] instead of [[[0.0, 0.0], [1.0, 0.0]," in said


def test_a_checkpoint_without_a_region_wins_too(model_class: type[AnomalibModule], case: Case, tmp_path: Path) -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    trainer.strategy.connect(build(model_class, case, None))
    trainer.save_checkpoint(tmp_path / "checkpoint.ckpt")
    restored = model_class.load_from_checkpoint(tmp_path / "checkpoint.ckpt", region=MIDDLE)
    assert not restored.model.region.is_part


@pytest.mark.slow
def test_exports(model_class: type[AnomalibModule], case: Case, tmp_path: Path) -> None:
    check_exports(build(model_class, case, MIDDLE), tmp_path)
