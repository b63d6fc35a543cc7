"""What is Unislad's own: defaults, memory banks under a real engine, search back-ends, switches, checks."""

import copy
import inspect
import logging
import pickle
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import openvino
import pytest
import torch
from anomalib.data import Folder
from anomalib.data.utils import read_image
from anomalib.deploy import ExportType
from anomalib.engine import Engine
from anomalib.models import Patchcore
from lightning.pytorch import Callback

from anomalib_pack import neighbors
from anomalib_pack.coreset import k_center_greedy
from anomalib_pack.data import MVTecLoco
from anomalib_pack.neighbors import NearestNeighbors
from anomalib_unislad import Unislad
from anomalib_unislad.components import Whitening
from anomalib_unislad.torch_model import BLOCKS, Features, UnisladModel

SMALL = {
    "backbone": "resnet18",
    "blocks": ["layer1.0", "layer2.1", "layer3.0"],
    "weights": None,
    "local_dim": 16,
    "vit": "test_vit",
    "vit_layer": 2,
    "vit_weights": None,
    "index": "flat",
}
SIZE = (64, 64)
TRAINING_IMAGES = 13  # of the rendered data set


class RawOutputs(Callback):
    """Keeps what validation gives before post-processing: the trainer's callbacks run before the model's."""

    def __init__(self) -> None:
        self.scores: list[torch.Tensor] = []

    def on_validation_batch_end(self, _trainer, _pl_module, outputs, *_) -> None:
        self.scores.append(outputs.pred_score.float().clone())


def engine(root: Path, **trainer) -> Engine:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return Engine(default_root_dir=root, accelerator="cpu", **(quiet | trainer))


def build(**arguments) -> Unislad:
    torch.manual_seed(0)
    return Unislad(**(SMALL | {"pre_processor": Unislad.configure_pre_processor(SIZE)} | arguments))


def train(datamodule, root: Path, trainer: dict | None = None, **arguments) -> tuple[Unislad, str]:
    """A trained model and its checkpoint."""
    model, runner = build(**arguments), engine(root, **(trainer or {}))
    runner.fit(model, datamodule=datamodule)
    return model.eval(), runner.best_model_path


def datamodule_of(root: Path, train_batch_size: int = 4, eval_batch_size: int = 4) -> MVTecLoco:
    sizes = {"train_batch_size": train_batch_size, "eval_batch_size": eval_batch_size}
    return MVTecLoco(root=root, category="tray", num_workers=0, **sizes)


@pytest.fixture(scope="module")
def trained(loco_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Unislad, str]:
    return train(datamodule_of(loco_root), tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def images(loco_root: Path) -> dict[str, torch.Tensor]:
    """All images of a split, in its order and at the model's size."""
    data = datamodule_of(loco_root)
    data.setup()
    resize = Unislad.configure_pre_processor(SIZE).transform
    sets = {"train": data.train_data, "val": data.val_data, "test": data.test_data}
    return {name: resize(torch.stack([part[i].image for i in range(len(part))])) for name, part in sets.items()}


def restored(checkpoint: str, **arguments) -> Unislad:
    return Unislad.load_from_checkpoint(checkpoint, weights_only=True, **arguments).eval()


# Defaults


@torch.no_grad()
def test_defaults() -> None:
    """Sec. IV-C and the authors' table: channels, grids and settings."""
    defaults = {name: one.default for name, one in inspect.signature(Unislad).parameters.items()}
    paper = {
        "backbone": "wide_resnet50_2",
        "vit": "vit_base_patch16_224",
        "vit_layer": 12,
        "weights": "hub",
        "local_dim": 1024,
        "patch_size": 3,
        "trim": 0.05,
        "power": 3,
        "pooling": "lum+pmp",
        "w_i": 0.5,
        "w_ig": 0.5,
        "w": 0.5,
        "local_ratio": 0.05,
        "global_ratio": 0.4,
        "shrinkage": 1e-2,
        "use_cnn": True,
        "use_vit": True,
        "whitening": True,
        "unit_length": False,
        "aggregation": "patchcore",
        "patch_bank": True,
        "image_distribution": True,
        "normalize_scores": True,
        "search": "auto",
        "index": "auto",
        "vit_weights": "hub",
    }
    assert {name: defaults[name] for name in paper} == paper
    in_network = {name: one.default for name, one in inspect.signature(UnisladModel).parameters.items()}
    assert {name: defaults[name] for name in in_network} == in_network
    numbers = {1: (0, 1, 2), 2: (0, 1, 2, 3), 3: (1, 2, 3, 4, 5), 4: (0,)}
    assert tuple(f"layer{stage}.{block}" for stage, blocks in numbers.items() for block in blocks) == BLOCKS

    model = UnisladModel(weights=None, vit_weights=None).eval()
    assert len(model.backbone.channels) == 13
    assert sum(model.backbone.channels) == 9984
    assert model.backbone.channels == 3 * [256] + 4 * [512] + 5 * [1024] + [2048]
    assert model.backbone.strides == 3 * [4] + 4 * [8] + 5 * [16] + [32]
    features = model.extract(torch.rand(1, 3, *Unislad.configure_pre_processor().transform.size))
    assert [tuple(part.shape) for part in features] == [(1, 1024, 56, 56), (1, 768, 14, 14), (1, 768)]
    assert model.local_distribution.mean.shape == (2048,)


def test_zero_keeps_all_patches() -> None:
    """The table's 0 is read as no sampling."""
    assert (build(local_ratio=0).local_ratio, build(global_ratio=0).global_ratio) == (1, 1)


# Training


@torch.no_grad()
def test_banks_hold_coresets_of_all_training_images(trained: tuple, images: dict) -> None:
    """Steps 3 and 4 from features that are extracted here, all images at a time."""
    model = trained[0].model
    features = model.extract(images["train"])
    for bank, patches, ratio in (
        (model.local_bank, features.local_patches, 0.05),
        (model.global_bank, features.global_patches, 0.4),
    ):
        points = patches.permute(0, 2, 3, 1).flatten(0, 2)
        chosen, _ = k_center_greedy(points, int(ratio * len(points)))
        whitening = Whitening(points.shape[1], 1e-2, enabled=True, unit_length=False)
        whitening.fit(points[chosen])
        torch.testing.assert_close(bank.neighbors.bank, whitening(points[chosen]), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(model.class_bank.neighbors.bank, features.class_token, atol=1e-4, rtol=1e-4)
    assert len(features.class_token) == TRAINING_IMAGES
    means = [part.mean(dim=0) for part in model.vectors(features)]
    for distribution, mean in zip(
        (model.local_distribution, model.global_distribution, model.class_distribution), means, strict=True
    ):
        torch.testing.assert_close(distribution.mean, mean, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_scales_are_those_of_normal_validation_images(trained: tuple, images: dict) -> None:
    """Each of the four scores has mean 0 and standard deviation 1 on them, so the image's score has mean 0."""
    model = trained[0].model
    features = model.extract(images["val"])
    raw = torch.stack(model.raw_scores(features, model.patch_map(features)), dim=1)
    torch.testing.assert_close(model.score_mean, raw.mean(dim=0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.score_std, raw.std(dim=0, correction=0), atol=1e-4, rtol=1e-3)
    assert model(images["val"]).pred_score.mean().item() == pytest.approx(0, abs=1e-2)


def test_anomalies_in_the_validation_set_do_not_count(loco_root: Path, tmp_path: Path, images: dict) -> None:
    folders = {"normal_dir": "train/good", "abnormal_dir": "test/structural_anomalies"}
    data = Folder("tray", root=loco_root / "tray", **folders, num_workers=0, val_split_mode="same_as_test", seed=0)
    model, _ = train(data, tmp_path)
    normal = [sample.image for sample in data.val_data if not sample.gt_label]
    assert 0 < len(normal) < len(data.val_data)
    with torch.no_grad():
        features = model.model.extract(model.pre_processor.transform(torch.stack(normal)))
        raw = torch.stack(model.model.raw_scores(features, model.model.patch_map(features)), dim=1)
    torch.testing.assert_close(model.model.score_mean, raw.mean(dim=0), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("train_batch_size", "eval_batch_size", "seed"), [(1, 2, 0), (13, 5, 0), (4, 4, 1)])
def test_nothing_depends_on_batches_or_seeds(
    trained: tuple, loco_root: Path, tmp_path: Path, train_batch_size: int, eval_batch_size: int, seed: int
) -> None:
    model = build()
    torch.manual_seed(seed)
    engine(tmp_path).fit(model, datamodule=datamodule_of(loco_root, train_batch_size, eval_batch_size))
    expected = {key: value for key, value in trained[0].state_dict().items() if key.startswith("model.")}
    ours = model.state_dict()
    for key, value in expected.items():
        if not key.endswith("directions"):  # eigenvectors have no sign
            torch.testing.assert_close(ours[key], value, atol=1e-3, rtol=1e-3, msg=key)


@pytest.mark.parametrize(("every", "precision"), [(5, "32-true"), (1, "bf16-mixed")])
def test_scales_belong_to_what_validation_sees(loco: MVTecLoco, tmp_path: Path, every: int, precision: str) -> None:
    """Whatever the precision, and with an interval of validations that is longer than the training."""
    outputs = RawOutputs()
    trainer = {"callbacks": [outputs], "precision": precision, "check_val_every_n_epoch": every}
    train(loco, tmp_path, trainer)
    assert torch.cat(outputs.scores).mean().item() == pytest.approx(0, abs=1e-2)


def test_scores_as_the_paper_has_them(loco: MVTecLoco, images: dict, tmp_path: Path) -> None:
    """Without normalisation nothing is asked of the validation set, and Eqs. 20 and 21 have distances as they are."""
    model, _ = train(loco, tmp_path, {"limit_val_batches": 0}, normalize_scores=False)
    assert torch.equal(model.model.score_mean, torch.zeros(4))
    assert torch.equal(model.model.score_std, torch.ones(4))
    with torch.no_grad():
        features = model.model.extract(images["test"])
        raw = model.model.raw_scores(features, model.model.patch_map(features))
        expected = 0.5 * (0.5 * raw[0] + 0.25 * raw[1] + 0.25 * raw[2]) + 0.5 * raw[3]
        torch.testing.assert_close(model.model(images["test"]).pred_score, expected, atol=1e-3, rtol=1e-4)


def test_training_without_validation(loco: MVTecLoco, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"needs validation .*normalize_scores=False"):
        train(loco, tmp_path, {"limit_val_batches": 0})


def test_validation_without_normal_images(loco_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Said before the pass over the training images."""
    folders = {"normal_dir": "train/good", "abnormal_dir": "test/logical_anomalies"}
    data = Folder("tray", root=loco_root / "tray", **folders, num_workers=0, val_split_mode="none")
    with pytest.raises(ValueError, match="no normal images"):
        train(data, tmp_path, {"enable_progress_bar": True})
    assert "Features" not in capsys.readouterr().err


def test_a_checkpoint_is_not_trained_again(trained: tuple, loco: MVTecLoco, tmp_path: Path) -> None:
    """``fit`` with one keeps its banks."""
    model = build()
    engine(tmp_path).fit(model, datamodule=loco, ckpt_path=trained[1])
    expected = trained[0].model.state_dict()
    for key, value in model.model.state_dict().items():
        if not key.startswith("score_"):
            assert torch.equal(value, expected[key]), key


# Inference


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (48, 96), (224, 224)])
def test_sizes(trained: tuple, size: tuple[int, int]) -> None:
    result = trained[0].model(torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)))
    assert result.anomaly_map.shape == (2, 1, *size)
    assert result.pred_score.shape == (2,)
    assert result.anomaly_map.isfinite().all()
    assert result.pred_score.isfinite().all()


@torch.no_grad()
def test_exports_at_another_size_than_the_transformers(trained: tuple, loco_root: Path, tmp_path: Path) -> None:
    """OpenVINO has no antialiasing, with which the position embedding comes from 10 x 10 tokens to 4 x 4."""
    model = restored(trained[1])
    assert model.model.vit.network.patch_embed.grid_size == (10, 10)
    file = loco_root / "tray" / "test" / "logical_anomalies" / "000.png"
    image = torch.nn.functional.interpolate(read_image(file, as_tensor=True)[None], size=(150, 203), mode="bilinear")
    expected = model(image)
    onnx_file = model.to_onnx(tmp_path)
    session = onnxruntime.InferenceSession(onnx_file)
    by_onnx = dict(
        zip([output.name for output in session.get_outputs()], session.run(None, {"input": image.numpy()}), strict=True)
    )
    by_openvino = openvino.compile_model(onnx_file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(image.numpy())
    spread = (expected.anomaly_map.max() - expected.anomaly_map.min()).item()
    for result in (by_onnx, by_openvino):
        for key in ("anomaly_map", "pred_score"):
            wanted = getattr(expected, key).numpy()
            np.testing.assert_allclose(result[key].reshape(wanted.shape), wanted, atol=1e-4 * spread, rtol=0)


@torch.no_grad()
def test_an_image_scores_the_same_in_any_batch(trained: tuple, images: dict) -> None:
    network = trained[0].model
    together = network(images["test"])
    alone = torch.cat([network(image[None]).pred_score for image in images["test"]])
    reverse = network(images["test"].flip(0))
    torch.testing.assert_close(together.pred_score, alone, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(together.anomaly_map, reverse.anomaly_map.flip(0), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_half_precision_does_not_merge_scores(trained: tuple, images: dict) -> None:
    """The networks run in half precision, the distances do not."""
    network = trained[0].model
    features = network.extract(images["test"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = network(images["test"])
        network.extract, extract = lambda _images: features, network.extract
        same = network(images["test"])
    network.extract = extract
    assert result.anomaly_map.dtype == result.pred_score.dtype == torch.float32
    torch.testing.assert_close(same, network(images["test"]), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_without_a_memory_bank() -> None:
    with pytest.raises(ValueError, match=r"no memory banks yet.*load a checkpoint"):
        build().model.eval()(torch.rand(1, 3, *SIZE))


@torch.no_grad()
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("search", ["auto", "torch"])
def test_cuda_agrees_with_the_cpu(trained: tuple, images: dict, search: str) -> None:
    network = restored(trained[1], search=search).model
    on_cpu = network(images["test"])
    on_gpu = network.cuda()(images["test"].cuda())
    torch.testing.assert_close(on_gpu.anomaly_map.cpu(), on_cpu.anomaly_map, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(on_gpu.pred_score.cpu(), on_cpu.pred_score, atol=5e-2, rtol=5e-2)


# Readings

READINGS = {
    "default": {},
    "literal": {"unit_length": True},
    "raw": {"whitening": False},
    "unit": {"whitening": False, "unit_length": True},
}


@torch.no_grad()
@pytest.mark.parametrize("reading", READINGS)
def test_readings_of_the_transform(loco: MVTecLoco, images: dict, tmp_path: Path, reading: str) -> None:
    """Each in a real run: what is in the banks, the range of distances, checkpoints, and all kinds of search."""
    model, checkpoint = train(loco, tmp_path, **READINGS[reading])
    for kind in ("local", "global"):
        bank = getattr(model.model, f"{kind}_bank").neighbors.bank
        assert (bank.mean(dim=0).abs().max() < 1e-3) == (reading == "default")  # centred, and nothing after that
        assert torch.allclose(bank.norm(dim=1), torch.ones(len(bank))) == (reading in ("literal", "unit"))
    result = model.model(images["test"])
    assert result.anomaly_map.min() >= 0
    assert result.anomaly_map.max() <= 2 or reading in ("default", "raw")
    similarity = model.model.local_share(model.model.extract(images["test"]).class_token)
    assert (similarity.max() < 0.9) == (reading == "literal")  # plain tokens of one category resemble each other

    torch.testing.assert_close(restored(checkpoint).model(images["test"]), result, atol=1e-5, rtol=1e-5)
    for index in ("pq", "ivf", "hnsw"):
        loaded = restored(checkpoint, index=index).model
        assert (
            loaded(images["test"]).anomaly_map >= result.anomaly_map - 1e-4
        ).all()  # what an index misses is farther
        assert loaded.local_bank.neighbors._built is not None


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("reading", READINGS)
def test_exports_of_readings(loco: MVTecLoco, images: dict, tmp_path: Path, reading: str) -> None:
    model, _ = train(loco, tmp_path, **READINGS[reading])
    eager = model(images["test"])
    session = onnxruntime.InferenceSession(engine(tmp_path).export(model, ExportType.ONNX, export_root=tmp_path))
    file = engine(tmp_path).export(model, ExportType.OPENVINO, export_root=tmp_path)
    compiled = openvino.compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    names = [output.name for output in session.get_outputs()]
    for position, image in enumerate(images["test"][:3]):
        array = image[None].numpy()
        by_onnx = dict(zip(names, session.run(None, {session.get_inputs()[0].name: array}), strict=True))
        for outputs in (by_onnx, compiled(array)):
            for key in ("anomaly_map", "pred_score"):
                expected = getattr(eager, key)[position].flatten().numpy()
                np.testing.assert_allclose(outputs[key].flatten(), expected, atol=1e-4)


# Search


@torch.no_grad()
def test_search_back_ends_agree(trained: tuple, images: dict) -> None:
    by_faiss, by_torch = (restored(trained[1], search=search) for search in ("faiss", "torch"))
    assert by_faiss.model.local_bank.neighbors.search == "faiss"
    assert by_torch.model.local_bank.neighbors.search == "torch"
    torch.testing.assert_close(by_faiss.model(images["test"]), by_torch.model(images["test"]), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("index", ["pq", "ivf", "hnsw"])
def test_approximate_indices(
    trained: tuple,
    images: dict,
    loco: MVTecLoco,
    tmp_path: Path,
    index: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Trained for real; the recall is logged for both banks; no file and no copy holds an index."""
    monkeypatch.setattr(neighbors, "CANDIDATES", 20)  # fewer than the entries, so that codes are needed
    with caplog.at_level(logging.INFO, logger="anomalib_unislad"):
        model, checkpoint = train(loco, tmp_path, index=index)
    recalls = [record for record in caplog.records if record.message.startswith(f"Recall of the {index} index")]
    assert [record.args[1] for record in recalls] == ["local", "global"]
    assert all(0.5 < record.args[2] <= 1 for record in recalls)

    expected = model.model(images["test"])
    banks = (model.model.local_bank.neighbors, model.model.global_bank.neighbors)
    assert all(bank._built is not None for bank in banks)
    assert len(pickle.dumps(banks)) < sum(bank.bank.nbytes for bank in banks) + 10_000
    copied, loaded = copy.deepcopy(banks), restored(checkpoint)
    assert all(bank._built is None for bank in (*copied, loaded.model.local_bank.neighbors))
    torch.testing.assert_close(loaded.model(images["test"]), expected, atol=1e-5, rtol=1e-5)
    assert_holds_tensors_only(checkpoint, loaded)
    exact = trained[0].model(images["test"])
    assert (expected.anomaly_map >= exact.anomaly_map - 1e-4).all()  # what an index misses is farther

    # Other weights and banks, of another size, in a model whose index has been built.
    other, other_checkpoint = train(loco, tmp_path, index=index, local_ratio=0.02)
    model.load_state_dict(torch.load(other_checkpoint, weights_only=True)["state_dict"])
    torch.testing.assert_close(model.model(images["test"]), other.model(images["test"]), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_exports_of_auto_are_exact(trained: tuple, images: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """What docs/search.md says of the difference: nowhere below, and by less than a hundredth of the map's range."""
    monkeypatch.setattr(neighbors, "LARGE", 50)
    monkeypatch.setattr(neighbors, "CANDIDATES", 40)
    network = restored(trained[1], index="auto").model
    assert [bank.neighbors.kind for bank in (network.local_bank, network.global_bank)] == ["pq", "pq"]
    here = network(images["test"]).anomaly_map
    exported = torch.export.export(network, (images["test"],)).module()(images["test"]).anomaly_map
    torch.testing.assert_close(exported, restored(trained[1]).model(images["test"]).anomaly_map, atol=1e-4, rtol=1e-4)
    excess = here - exported
    assert excess.max() > 1e-3  # with so few candidates something is missed
    assert excess.min() > -1e-4
    assert excess.mean() < 0.01 * (exported.max() - exported.min())


@torch.no_grad()
def test_auto_changes_nothing_for_small_banks(trained: tuple, images: dict) -> None:
    """So that of a checkpoint with exact search, the former default, is the same with today's."""
    assert torch.load(trained[1], weights_only=True)["hyper_parameters"]["index"] == "flat"
    exact, auto = restored(trained[1]).model, restored(trained[1], index="auto").model
    assert exact.local_bank.neighbors.kind == auto.local_bank.neighbors.kind == "flat"
    torch.testing.assert_close(auto(images["test"]), exact(images["test"]), atol=0, rtol=0)


def test_recall_of_auto_is_logged(
    trained: tuple, images: dict, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of banks that are large enough for it to be approximate."""
    model = restored(trained[1], index="auto")
    sizes = [len(bank.neighbors.bank) for bank in (model.model.local_bank, model.model.global_bank)]
    with torch.no_grad(), caplog.at_level(logging.INFO, logger="anomalib_unislad"):
        features = model.model.extract(images["train"])
        caplog.clear()
        model._log_recall(features)
        assert not caplog.records
        monkeypatch.setattr(neighbors, "LARGE", max(sizes))
        model._log_recall(features)
    assert [record.args[:2] for record in caplog.records] == [("pq", "local" if sizes[0] == max(sizes) else "global")]


def assert_holds_tensors_only(checkpoint: str, model: Unislad) -> None:
    """The file is as large as the state, and the state holds each bank once."""
    content = torch.load(checkpoint, weights_only=True)
    tensors = sum(tensor.nbytes for tensor in content["state_dict"].values())
    assert tensors < Path(checkpoint).stat().st_size < tensors + 300_000  # names, configuration
    sizes = [tuple(one.shape) for one in content["state_dict"].values()]
    assert sizes.count(tuple(model.model.local_bank.neighbors.bank.shape)) == 1


def test_checkpoint_holds_the_banks_and_no_index(trained: tuple) -> None:
    model, checkpoint = trained
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    for name in ("local", "global", "class"):
        bank = state[f"model.{name}_bank.neighbors.bank"]
        assert torch.equal(bank, getattr(model.model, f"{name}_bank").neighbors.bank)
    assert_holds_tensors_only(checkpoint, model)


def test_without_faiss(trained: tuple, images: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)  # makes `import faiss` fail
    for arguments in ({"search": "faiss"}, {"index": "hnsw"}):
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'anomalib-pack\[cpu\]'"):
            build(**arguments)
    with torch.no_grad():
        for search in ("torch", "auto"):
            result = restored(trained[1], search=search).model(images["test"])
            assert result.pred_score.isfinite().all()


# Switches


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"use_cnn": False}, {"global_bank", "class_bank", "global_distribution", "class_distribution"}),
        ({"use_vit": False}, {"local_bank", "local_distribution"}),
        ({"image_distribution": False}, {"local_bank", "global_bank", "class_bank"}),
        ({"patch_bank": False, "use_vit": False}, {"local_distribution"}),
    ],
    ids=["no_cnn", "no_vit", "no_distributions", "cnn_distribution_alone"],  # sets have no fixed order
)
def test_what_is_switched_off_is_not_there(arguments: dict, parts: set[str]) -> None:
    """And takes no memory, neither here nor in checkpoints."""
    model = build(**arguments).model
    every = {f"{kind}_{part}" for kind in ("local", "global", "class") for part in ("bank", "distribution")}
    assert {part for part in every if getattr(model, part) is not None} == parts
    assert {key.split(".")[0] for key in model.state_dict()} & every == parts
    assert (model.backbone is None) == (not arguments.get("use_cnn", True))
    assert (model.vit is None) == (not arguments.get("use_vit", True))


@pytest.mark.parametrize("arguments", [{"use_cnn": False}, {"use_vit": False}], ids=str)
def test_one_extractor_in_a_real_run(loco: MVTecLoco, tmp_path: Path, arguments: dict) -> None:
    """Also with a size that the other one could not take."""
    size = (64, 64) if arguments == {"use_cnn": False} else (60, 76)
    model = build(**arguments, pre_processor=Unislad.configure_pre_processor(size))
    runner = engine(tmp_path)
    runner.fit(model, datamodule=loco)
    [metrics] = runner.test(model, datamodule=loco)
    assert 0 <= metrics["image_AUROC"] <= 1
    assert 0 <= metrics["pixel_AUROC"] <= 1


def test_without_patch_banks_in_a_real_run(loco: MVTecLoco, tmp_path: Path) -> None:
    """No anomaly map: scores, labels and image metrics work, pixel metrics are left out, pictures are still drawn."""
    model, runner = build(patch_bank=False), engine(tmp_path)
    runner.fit(model, datamodule=loco)
    [metrics] = runner.test(model, datamodule=loco)
    assert {"image_AUROC", "image_F1Score", "image_AUROC_logical_anomalies"} <= metrics.keys()
    assert not any(name.startswith("pixel_") for name in metrics)
    predictions = runner.predict(model, datamodule=loco)
    assert all(batch.anomaly_map is None and batch.pred_mask is None for batch in predictions)
    assert all(batch.pred_score.isfinite().all() and batch.pred_label is not None for batch in predictions)
    assert len(list(tmp_path.glob("**/images/**/*.png"))) >= 12


# Checks


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"use_cnn": False, "use_vit": False}, "use_vit"),
        ({"patch_bank": False, "image_distribution": False}, "image_distribution"),
        ({"vit": "convnext_atto"}, r"vit.*convnext_atto"),
        ({"vit": "test_vit2"}, "class token"),
        ({"vit_layer": 0}, "vit_layer .*got 0"),
        ({"vit_layer": 9}, "vit_layer=9"),
        ({"search": "torch", "index": "ivf"}, "index .*search='torch'"),
    ],
    ids=str,
)
def test_impossible_values(arguments: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        build(**arguments)


def test_normalisation_is_the_networks() -> None:
    with pytest.raises(ValueError, match="Normalize"):
        build(pre_processor=Patchcore.configure_pre_processor((64, 64)))


def test_size_that_the_transformer_cannot_take(loco: MVTecLoco, tmp_path: Path) -> None:
    model = build(pre_processor=Unislad.configure_pre_processor((64, 60)))
    with pytest.raises(ValueError, match=r"multiples of 16.*\(64, 60\)"):
        engine(tmp_path).fit(model, datamodule=loco)


def test_weights_that_are_no_numbers(loco: MVTecLoco, tmp_path: Path) -> None:
    """A coreset of NaNs would be any points at all."""
    model = build()
    model.model.backbone.network.get_parameter("conv1.weight").data.fill_(float("nan"))
    with pytest.raises(ValueError, match="finite features"):
        engine(tmp_path).fit(model, datamodule=loco)


def test_features_are_frozen(trained: tuple, images: dict) -> None:
    features = trained[0].model.extract(images["val"])
    assert isinstance(features, Features)
    assert not any(part.requires_grad for part in features)
    assert isinstance(trained[0].model.local_bank.neighbors, NearestNeighbors)
    assert [name for name, parameter in trained[0].named_parameters() if parameter.requires_grad] == ["nothing"]
