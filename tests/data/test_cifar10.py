"""CIFAR10Unified: right classes and pixels, no training on test labels, and clear words for whatever is wrong.

The tests write a small data set in CIFAR-10's format and tell torchvision its checksums, so that torchvision's own
check, download (from this machine) and reading run as they do on the real files.
"""

import hashlib
import pickle
import shutil
import tarfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from threading import Thread

import numpy as np
import pytest
import torch
from anomalib.data import AnomalibDataModule, ImageBatch, get_datamodule
from anomalib.engine import Engine
from anomalib.models import Padim, Patchcore
from PIL import Image
from torch.nn.functional import interpolate
from torchvision.datasets import CIFAR10
from torchvision.transforms.v2 import RandomHorizontalFlip

from anomalib_pack.data import CIFAR10Unified, CIFAR10UnifiedDataset

# As CIFAR-10's batches.meta lists them.
NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

COMBINATIONS = {
    "01234": {"airplane", "automobile", "bird", "cat", "deer"},
    "56789": {"dog", "frog", "horse", "ship", "truck"},
    "02468": {"airplane", "bird", "deer", "frog", "ship"},
    "13579": {"automobile", "cat", "dog", "horse", "truck"},
}

# Images of each class, in the five training batches together and in the test batch.
NUM_TRAIN, NUM_TEST = 10, 3


def write_pickle(path, content):
    path.write_bytes(pickle.dumps(content))
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_batch(path, labels, rng):
    """Write a batch; return its row in torchvision's list of checksums, its pixels (n, 3, 32, 32) and its labels."""
    pixels = rng.integers(0, 256, (len(labels), 3 * 32 * 32), dtype=np.uint8)
    md5 = write_pickle(path, {"data": pixels, "labels": labels})
    return [path.name, md5], pixels.reshape(-1, 3, 32, 32), labels


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Folder with the archive and the extracted files; the content of each split as (pixels, labels)."""
    folder = tmp_path_factory.mktemp("published")
    files = folder / CIFAR10.base_folder
    files.mkdir()
    rng = np.random.default_rng(0)
    labels = [rng.permutation(np.arange(10).repeat(NUM_TRAIN // 5)).tolist() for _ in range(5)]
    train = [write_batch(files / f"data_batch_{number + 1}", labels[number], rng) for number in range(5)]
    test = write_batch(files / "test_batch", rng.permutation(np.arange(10).repeat(NUM_TEST)).tolist(), rng)
    meta_md5 = write_pickle(files / "batches.meta", {"label_names": NAMES})
    archive = folder / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(files, CIFAR10.base_folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CIFAR10, "train_list", [row for row, _, _ in train])
        patch.setattr(CIFAR10, "test_list", [test[0]])
        patch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": meta_md5})
        patch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
        train_pixels = np.concatenate([pixels for _, pixels, _ in train])
        yield folder, {"train": (train_pixels, list(chain(*labels))), "test": test[1:]}


@pytest.fixture
def server(published, monkeypatch):
    """Web server that torchvision downloads the archive from; yields its address."""
    handler = partial(SimpleHTTPRequestHandler, directory=published[0])
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(CIFAR10, "url", f"{address}/{CIFAR10.filename}")
        yield address
        server.shutdown()


@pytest.fixture(scope="module")
def root(published, tmp_path_factory):
    """Root with all images written, for tests that only read it."""
    root = tmp_path_factory.mktemp("root")
    shutil.copytree(published[0] / CIFAR10.base_folder, root / CIFAR10.base_folder)
    CIFAR10Unified(root=root).prepare_data()
    return root


@pytest.fixture
def copy(published, tmp_path):
    """Root with CIFAR-10's files only, which the test may damage."""
    shutil.copytree(published[0] / CIFAR10.base_folder, tmp_path / "root" / CIFAR10.base_folder)
    return tmp_path / "root"


def make_datamodule(root, **arguments):
    arguments = {"val_split_ratio": 0.2, "train_batch_size": 8, "eval_batch_size": 8, "num_workers": 0, **arguments}
    datamodule = CIFAR10Unified(root=root, image_size=32, **arguments)
    datamodule.setup()
    return datamodule


def make_engine(folder):
    return Engine(default_root_dir=folder, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)


@pytest.mark.parametrize("normal_classes", COMBINATIONS)
def test_classes_of_each_combination(root, normal_classes):
    datamodule = make_datamodule(root, normal_classes=normal_classes, val_split_mode="none")
    train, test = datamodule.train_data.samples, datamodule.test_data.samples
    assert dict(train.label.value_counts()) == dict.fromkeys(COMBINATIONS[normal_classes], NUM_TRAIN)
    assert dict(test.label.value_counts()) == dict.fromkeys(NAMES, NUM_TEST)
    assert set(test.label[test.label_index == 0]) == COMBINATIONS[normal_classes]
    assert set(train.label_index) == {0}
    assert set(test.label_index) == {0, 1}
    assert datamodule.category == datamodule.train_data.category == normal_classes
    assert datamodule.task == "classification"


@pytest.mark.parametrize("split", ["train", "test"])
def test_pixels_and_labels_are_those_of_the_files(root, published, split):
    pixels, labels = published[1][split]
    found = {}
    for normal_classes in ("01234", "56789"):
        for item in CIFAR10UnifiedDataset(root, normal_classes, split, image_size=32):
            _, name, file = item.image_path.rsplit("/", 2)
            index = int(file.removesuffix(".png"))
            assert NAMES[labels[index]] == name
            assert item.gt_label == (name not in COMBINATIONS[normal_classes])
            assert np.array_equal((item.image * 255).round().numpy(), pixels[index])
            found[index] = name
    assert sorted(found) == list(range(len(pixels)))


@pytest.mark.parametrize(("image_size", "shape"), [(128, (128, 128)), ((64, 48), (64, 48)), (32, (32, 32))])
def test_images_are_resized_bilinearly(root, image_size, shape):
    small = CIFAR10UnifiedDataset(root, split="test", image_size=32)[5].image
    large = CIFAR10UnifiedDataset(root, split="test", image_size=image_size)[5].image
    expected = interpolate(small[None], shape, mode="bilinear", align_corners=False)[0]
    assert large.dtype == torch.float32
    assert large.shape == (3, *shape)
    torch.testing.assert_close(large.as_subclass(torch.Tensor), expected.as_subclass(torch.Tensor))


def test_default_size_is_the_papers(root):
    assert CIFAR10UnifiedDataset(root)[0].image.shape == (3, 128, 128)
    datamodule = CIFAR10Unified(root=root)
    datamodule.setup()
    assert datamodule.test_data[0].image.shape == (3, 128, 128)
    assert datamodule.train_batch_size == 128


def test_augmentations_see_resized_images(root):
    plain = CIFAR10UnifiedDataset(root, split="test")
    flipped = CIFAR10UnifiedDataset(root, split="test", augmentations=RandomHorizontalFlip(1.0))
    assert torch.equal(plain[3].image.flip(-1), flipped[3].image)


def test_batches_have_labels_and_no_masks(root):
    batch = next(iter(make_datamodule(root).test_dataloader()))
    assert isinstance(batch, ImageBatch)
    assert batch.image.shape == (8, 3, 32, 32)
    assert batch.gt_label.dtype == torch.bool
    assert batch.gt_mask is None
    assert len(set(batch.image_path)) == 8


@pytest.mark.parametrize(
    ("mode", "sizes"),
    [("from_train", (40, 10, 30)), ("from_test", (50, 6, 24)), ("same_as_test", (50, 30, 30)), ("none", (50, 0, 30))],
)
def test_validation_split_modes(root, mode, sizes):
    datamodule = make_datamodule(root, val_split_mode=mode, seed=1)
    train, val, test = (
        [path for batch in loader for path in batch.image_path]
        for loader in (datamodule.train_dataloader(), datamodule.val_dataloader(), datamodule.test_dataloader())
    )
    assert (len(set(train)), len(set(val)), len(set(test))) == sizes
    assert not set(train) & set(val)
    assert not set(train) & set(test)
    assert mode == "same_as_test" or not set(val) & set(test)


def test_validation_is_normal_by_default(root):
    datamodule = CIFAR10Unified(root=root)
    datamodule.setup()
    assert datamodule.val_data.has_normal
    assert not datamodule.val_data.has_anomalous
    assert len(datamodule.test_data) == 10 * NUM_TEST


def test_seed_decides_the_split(root):
    first, same, other = (make_datamodule(root, seed=seed).val_data.samples.image_path.tolist() for seed in (1, 1, 2))
    assert first == same != other


@pytest.mark.parametrize(("mode", "reason"), [("from_dir", "no validation images"), ("synthetic", "32x32")])
def test_split_modes_without_sense_are_refused(mode, reason):
    with pytest.raises(ValueError, match=f"none, same_as_test, from_train, from_test, got {mode}: .*{reason}"):
        CIFAR10Unified(val_split_mode=mode)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"normal_classes must be one of 01234, 56789, 02468, 13579, got '00000'\.$"):
        CIFAR10Unified(normal_classes="00000")
    for image_size in (0, (64, 0)):
        with pytest.raises(ValueError, match="image_size must be at least 1"):
            CIFAR10Unified(image_size=image_size)


@pytest.mark.parametrize("normal_classes", COMBINATIONS)
def test_data_section_of_a_configuration(root, tmp_path, normal_classes):
    path = tmp_path / "data.yaml"
    path.write_text(
        f"class_path: anomalib_pack.data.CIFAR10Unified\n"
        f"init_args:\n  root: {root}\n  normal_classes: '{normal_classes}'\n  image_size: 64\n"
    )
    datamodule = AnomalibDataModule.from_config(path)
    assert (datamodule.category, datamodule.image_size) == (normal_classes, (64, 64))


def test_configuration_without_quotes_is_refused(tmp_path, capsys):
    path = tmp_path / "data.yaml"
    path.write_text("class_path: anomalib_pack.data.CIFAR10Unified\ninit_args:\n  normal_classes: 01234\n")
    with pytest.raises(SystemExit):
        AnomalibDataModule.from_config(path)
    assert "['01234', '56789', '02468', '13579']" in capsys.readouterr().err


def test_get_datamodule_finds_it(root):
    arguments = {"root": str(root), "normal_classes": "13579", "image_size": 64, "num_workers": 0}
    datamodule = get_datamodule({"data": {"class_path": "CIFAR10Unified", "init_args": arguments}})
    datamodule.setup()
    assert datamodule.category == "13579"
    assert datamodule.test_data[0].image.shape == (3, 64, 64)
    for number in (668, 56789):  # what YAML makes of 01234 and 56789 without quotes
        arguments["normal_classes"] = number
        with pytest.raises(ValueError, match=f"got {number}. In YAML, put it in quotes"):
            get_datamodule({"data": {"class_path": "CIFAR10Unified", "init_args": arguments}})


def test_images_are_written_once_and_suffice(copy):
    CIFAR10Unified(root=copy).prepare_data()
    assert {path.name for path in copy.iterdir()} == {CIFAR10.base_folder, "cifar-10-png"}
    shutil.rmtree(copy / CIFAR10.base_folder)
    times = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    CIFAR10Unified(root=copy).prepare_data()
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == times
    assert len(make_datamodule(copy).test_data) == 10 * NUM_TEST


def test_failed_writing_leaves_nothing(copy, monkeypatch):
    def fail(*_arguments):
        raise OSError("no space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="no space left"):
        CIFAR10Unified(root=copy).prepare_data()
    assert [path.name for path in copy.iterdir()] == [CIFAR10.base_folder]


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
@pytest.mark.parametrize("state", ["damaged", "missing"])
def test_wrong_file_is_named(copy, name, state):
    path = copy / CIFAR10.base_folder / name
    content = path.read_bytes()
    path.unlink()
    if state == "damaged":
        path.write_bytes(content[:-10])
    with pytest.raises(ValueError, match=f"{path} is {state}. Delete {path.parent}, and run again"):
        CIFAR10Unified(root=copy).prepare_data()
    assert [path.name for path in copy.iterdir()] == [CIFAR10.base_folder]


@pytest.mark.parametrize("found", [None, "nothing", "archive", "half an archive"])
def test_downloads_into_a_new_or_empty_root(published, server, tmp_path, found):
    root = tmp_path / "root"
    archive = (published[0] / CIFAR10.filename).read_bytes()
    if found:
        root.mkdir()
    if found in {"archive", "half an archive"}:
        (root / CIFAR10.filename).write_bytes(archive if found == "archive" else archive[: len(archive) // 2])
    CIFAR10Unified(root=root).prepare_data()
    assert len(make_datamodule(root, val_split_mode="none").train_data) == 5 * NUM_TRAIN


@pytest.mark.parametrize("file", ["photos/cat.png", "data_batch_1"])
def test_does_not_download_among_other_files(server, tmp_path, file):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=f"{tmp_path} holds files, but no folder cifar-10-batches-py. Correct `root`"):
        CIFAR10Unified(root=tmp_path).prepare_data()
    assert sorted(tmp_path.rglob("*")) == before


def test_failed_download_says_what_to_do(server, tmp_path, monkeypatch):
    monkeypatch.setattr(CIFAR10, "url", f"{server}/moved.tar.gz")
    with pytest.raises(OSError, match=r"into .*/root: .*404.* put cifar-10-python.tar.gz from http://.*moved.tar.gz"):
        CIFAR10Unified(root=tmp_path / "root").prepare_data()


def test_missing_images_name_the_folder(root, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no images in {tmp_path}/cifar-10-png/train/airplane. Check `root`"):
        CIFAR10Unified(root=tmp_path).setup()
    shutil.copytree(root / "cifar-10-png", tmp_path / "cifar-10-png")
    shutil.rmtree(tmp_path / "cifar-10-png" / "test" / "ship")
    with pytest.raises(FileNotFoundError, match=r"no images in .*/test/ship. .*/cifar-10-png is incomplete, delete it"):
        CIFAR10Unified(root=tmp_path).setup()


@pytest.mark.parametrize("length", [0, 100])
def test_broken_image_is_named(root, tmp_path, length):
    shutil.copytree(root / "cifar-10-png", tmp_path / "cifar-10-png")
    path = next((tmp_path / "cifar-10-png" / "test" / "frog").iterdir())
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(OSError, match=f"Cannot read {path}: .* Delete its folder cifar-10-png"):
        list(CIFAR10UnifiedDataset(tmp_path, split="test", image_size=32))


def test_anomalib_trains_and_tests(root, tmp_path):
    """Stock model, metrics and pictures: image metrics only, and one picture per test image."""
    datamodule = make_datamodule(root, normal_classes="13579")
    pre_processor = Patchcore.configure_pre_processor((32, 32))
    model = Patchcore("resnet18", ["layer2"], pre_trained=False, pre_processor=pre_processor)
    engine = make_engine(tmp_path)
    engine.fit(model, datamodule=datamodule)
    (metrics,) = engine.test(model, datamodule=datamodule)
    assert set(metrics) == {"image_AUROC", "image_F1Score"}
    pictures = list((tmp_path / "Patchcore" / "CIFAR10Unified" / "13579" / "v0" / "images").rglob("*.png"))
    assert {picture.parent.name for picture in pictures} == set(NAMES)
    assert len(pictures) == 10 * NUM_TEST


def test_anomalib_trains_without_validation_images(root, tmp_path):
    datamodule = make_datamodule(root, val_split_mode="none")
    pre_processor = Padim.configure_pre_processor((32, 32))
    model = Padim("resnet18", ["layer1"], pre_trained=False, n_features=10, pre_processor=pre_processor)
    engine = make_engine(tmp_path)
    engine.fit(model, datamodule=datamodule)
    (batch, *_) = engine.predict(model, datamodule=datamodule)
    assert batch.pred_score.isfinite().all()
