"""What DistilledEfficientAd does unlike Anomalib's EfficientAd, and that all else is the same."""

import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.engine import Engine
from anomalib.models import EfficientAd
from anomalib.models.image.efficient_ad import torch_model
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms import functional
from torchvision.transforms.v2 import CenterCrop, Compose, Resize, ToTensor
from watch import Watch

from anomalib_efficientad import DistilledEfficientAd, lightning_model
from anomalib_efficientad.torch_model import DistilledEfficientAdModel
from anomalib_pack.data import MVTecLoco
from anomalib_pack.passes import one_pass

IMAGES = torch.rand(2, 3, 256, 272, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(teacher_file: Path, photos: Path) -> DistilledEfficientAd:
    torch.manual_seed(1)
    return DistilledEfficientAd(teacher_file, photos, teacher_out_channels=8)


def train(model: DistilledEfficientAd, loco: MVTecLoco, root: Path, **trainer) -> Watch:
    watch = Watch()
    arguments = {"max_steps": 2, "max_epochs": -1} | trainer
    engine = Engine(
        default_root_dir=root, accelerator="cpu", callbacks=[watch], enable_progress_bar=False, logger=False,
        limit_val_batches=1, enable_model_summary=False, **arguments,
    )  # fmt: skip
    engine.fit(model, datamodule=loco)
    watch.checkpoint = engine.best_model_path
    return watch


def test_training(model: DistilledEfficientAd, loco: MVTecLoco, teacher_file: Path, tmp_path: Path) -> None:
    """Statistics, quantiles, schedule and checkpoint of a training of two steps."""
    assert loco.train_batch_size == 4
    watch = train(model, loco, tmp_path)
    assert loco.train_batch_size == 1
    assert watch.validated == [0]  # the last weights, although the epoch was not over
    torch.testing.assert_close(watch.rates, [1e-4, 1e-5])

    # Statistics and quantiles of pre-processed images, here of 256 x 256 instead of 64 x 64 pixels.
    teacher = torch_model.SmallPatchDescriptionNetwork(8)
    teacher.load_state_dict(torch.load(teacher_file, weights_only=True))
    transform, network = model.pre_processor.transform, model.model.eval()
    with torch.no_grad():
        features = torch.cat([teacher(transform(loco.train_data[index].image[None])) for index in range(13)])
        maps = [network.get_maps(transform(loco.val_data[index].image[None])) for index in range(5)]
    mean_std = network.mean_std
    torch.testing.assert_close(mean_std["mean"].flatten(), features.mean(dim=(0, 2, 3)))
    std = features.double().std(dim=(0, 2, 3), correction=0).float()
    torch.testing.assert_close(mean_std["std"].flatten(), std)
    for name, parts in zip(("st", "ae"), zip(*maps, strict=True), strict=True):
        values = torch.cat(parts).double().numpy()
        for quantile, q in (("qa", 0.9), ("qb", 0.995)):
            expected = np.quantile(values, q)
            assert network.quantiles[f"{quantile}_{name}"].item() == pytest.approx(expected, rel=1e-4)

    checkpoint = torch.load(watch.checkpoint, weights_only=True)
    assert checkpoint["hyper_parameters"]["teacher_weights"] == str(teacher_file)
    teacher_file.unlink()  # a checkpoint carries the teacher
    restored = DistilledEfficientAd.load_from_checkpoint(watch.checkpoint, weights_only=True).eval()
    with torch.no_grad():
        assert torch.equal(restored.model(IMAGES).anomaly_map, network(IMAGES).anomaly_map)
    assert str(loco.root) not in str(vars(pickle.loads(pickle.dumps(model))).get("penalty_paths"))


def test_the_same_as_anomalib(model: DistilledEfficientAd) -> None:
    """Maps, scores, losses and gradients; without statistics, and with some."""
    theirs = torch_model.EfficientAdModel(8)
    theirs.choose_random_aug_image = model.model.choose_random_aug_image  # of other random numbers: see the next test
    for set_statistics in (False, True):
        ours = model.model
        if set_statistics:
            with torch.no_grad():
                for index, value in enumerate([*ours.mean_std.values(), *ours.quantiles.values()], start=1):
                    value.fill_(index)
        theirs.load_state_dict(ours.state_dict())
        with torch.no_grad():
            result, expected = ours.eval()(IMAGES), theirs.eval()(IMAGES)
            close = {"atol": 1e-5 * expected.anomaly_map.abs().max().item(), "rtol": 0}  # normalised by a convolution
            torch.testing.assert_close(result.anomaly_map, expected.anomaly_map, **close)
            torch.testing.assert_close(result.pred_score, expected.pred_score.flatten(), **close)
        losses, gradients = [], []
        for network in (ours.train(), theirs.train()):
            torch.manual_seed(0)
            random.seed(0)
            losses.append(torch.stack(network(IMAGES[:1], IMAGES[1:])))
            learning = [*network.student.parameters(), *network.ae.parameters()]
            gradients.append(torch.autograd.grad(losses[-1].sum(), learning))
        torch.testing.assert_close(*losses, atol=0, rtol=1e-5)
        for result, wanted in zip(*gradients, strict=True):
            torch.testing.assert_close(result, wanted, atol=1e-5 * wanted.abs().max().item(), rtol=0)
    arguments = {"teacher_out_channels": 8, "pre_processor": False}
    stock = EfficientAd(**arguments)
    assert (stock.lr, stock.weight_decay, stock.batch_size) == (model.lr, model.weight_decay, model.batch_size)
    assert stock.trainer_arguments == model.trainer_arguments


def test_augmentations(model: DistilledEfficientAd, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the three of Alg. 1, lines 25 to 27, with a coefficient from U(0.8, 1.2)."""
    drawn = []
    monkeypatch.setattr(random, "uniform", lambda *limits: drawn.append(limits) or 0.9)
    changes = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)
    expected = [change(IMAGES, 0.9) for change in changes]
    found = set()
    for seed in range(20):
        random.seed(seed)
        image = model.model.choose_random_aug_image(IMAGES)
        found.add([torch.equal(image, one) for one in expected].index(True))
    assert found == {0, 1, 2}
    assert set(drawn) == {(0.8, 1.2)}


def test_gradients(model: DistilledEfficientAd) -> None:
    """Student and autoencoder learn, nothing else does."""
    network = model.model.train()
    sum(network(IMAGES[:1], IMAGES[1:])).backward()
    for name, parameter in network.named_parameters():
        learns = name.startswith(("student.", "ae."))
        assert parameter.requires_grad == learns, name
        assert (parameter.grad is not None) == learns, name


def test_penalty_images(model: DistilledEfficientAd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Anomalib's Imagenette apart from the draw: twice the size, centre crop, some gray; a new order each time."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "a.png")
    model.penalty_paths = 300 * [tmp_path / "a.png"]
    model.pre_processor = None  # then the data set's size counts
    torch.manual_seed(0)
    model.prepare_imagenette_data((16, 24))
    drawn = [batch[0] for batch in model.imagenet_loader]
    assert drawn[0].shape == (1, 3, 16, 24)
    expected = Compose([Resize((32, 48)), CenterCrop((16, 24)), ToTensor()])(image)
    gray = [bool((batch[0, 0] == batch[0, 1]).all()) for batch in drawn]
    assert 0.2 < np.mean(gray) < 0.4
    torch.testing.assert_close(drawn[gray.index(False)][0], expected, atol=1e-6, rtol=0)
    orders = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        orders.append(list(iter(model.imagenet_loader._index_sampler)))
    assert orders[0] == orders[1] != orders[2]


def test_size_of_penalty_images(model: DistilledEfficientAd, photos: Path) -> None:
    """What the networks see, not what the data set has."""
    model.penalty_paths = sorted(photos.rglob("*.png"))
    model.prepare_imagenette_data((64, 64))
    assert next(model.imagenet_iterator)[0].shape == (1, 3, 256, 256)


def test_length_of_training(
    model: DistilledEfficientAd, loco: MVTecLoco, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The paper's 70 000 steps where the user sets none; here 2 of them."""
    monkeypatch.setattr(lightning_model, "PAPER_STEPS", 2)
    watch = train(model, loco, tmp_path, max_steps=-1, max_epochs=None)
    assert model.trainer.global_step == 2
    torch.testing.assert_close(watch.rates, [1e-4, 1e-5])
    assert watch.validated == [0]


def test_a_new_training_measures_anew(
    model: DistilledEfficientAd, loco: MVTecLoco, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anomalib would keep the statistics of another teacher."""
    with torch.no_grad():
        model.model.mean_std["mean"].fill_(5)
    monkeypatch.setattr(lightning_model, "one_pass", lambda *arguments: list(one_pass(*arguments))[:1])
    train(model, loco, tmp_path)
    assert model.model.mean_std["mean"].abs().max() < 1


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_teacher_files(model: DistilledEfficientAd, tmp_path: Path, suffix: str) -> None:
    torch.manual_seed(5)
    state = torch_model.SmallPatchDescriptionNetwork(8).state_dict()
    file = tmp_path / f"teacher{suffix}"
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    model.teacher_weights = file
    model._load_teacher()
    for name, value in model.model.teacher.state_dict().items():
        assert torch.equal(value, state[name])


def test_missing_teacher(model: DistilledEfficientAd, loco: MVTecLoco, tmp_path: Path) -> None:
    model.teacher_weights = tmp_path / "nowhere.pth"
    with pytest.raises(FileNotFoundError, match=str(model.teacher_weights)):
        train(model, loco, tmp_path)


def test_teacher_of_another_size(teacher_file: Path, photos: Path, loco: MVTecLoco, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pretrained_teacher_small\.pth does not fit a teacher .*8 .*conv5"):
        train(DistilledEfficientAd(teacher_file, photos, 8, model_size="medium"), loco, tmp_path)
    with pytest.raises(ValueError, match=r"teacher of size 'small' with 9 channels.*conv4\.weight"):
        train(DistilledEfficientAd(teacher_file, photos, 9), loco, tmp_path)


@pytest.mark.parametrize("broken", [False, True])
def test_bad_penalty_images(model: DistilledEfficientAd, loco: MVTecLoco, tmp_path: Path, broken: bool) -> None:
    folder = tmp_path / "penalty"
    folder.mkdir()
    if broken:
        (folder / "a.jpg").write_bytes(b"no image")
    model.imagenet_dir = folder
    with pytest.raises(ValueError, match=str(folder / "a.jpg") if broken else f"penalty_images .*{folder}"):
        train(model, loco, tmp_path)


def test_constant_maps(model: DistilledEfficientAd, monkeypatch: pytest.MonkeyPatch) -> None:
    """Normal maps without any variation are shifted, not divided by 0."""
    monkeypatch.setattr(lightning_model, "measures_of_normal_images", lambda *arguments: arguments[-1](IMAGES))
    flat = torch.ones(2, 1, 8, 8)
    monkeypatch.setattr(DistilledEfficientAdModel, "get_maps", lambda *_: (flat, 3 * flat))
    measured = {name: value.item() for name, value in model.map_norm_quantiles(None).items()}
    assert measured == pytest.approx({"qa_st": 1, "qb_st": 1.1, "qa_ae": 3, "qb_ae": 3.1})


def test_normalisation_is_the_networks() -> None:
    """Images with normalised colours would be normalised twice."""
    from anomalib.models import Patchcore

    with pytest.raises(ValueError, match="Normalize"):
        DistilledEfficientAd(pre_processor=Patchcore.configure_pre_processor((256, 256)))
