"""Images are read alike in training, test and prediction, or refused; what is wrong with files and masks is said."""

import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.cli.cli import AnomalibCLI
from anomalib.data import MVTecAD
from anomalib.data.utils import read_image as read_as_anomalib
from anomalib.engine import Engine
from image_folders import folder, turned, write, write_folder, write_goods
from lightning.pytorch import Callback
from PIL import Image
from tiny_model import RawScores, TinyModel
from torchvision.transforms.v2 import Resize

from anomalib_pack.checks import check_readable, check_training_images
from anomalib_pack.data import GoodsADDataset, MultiCategory, MVTecLoco, PredictImages
from anomalib_pack.data.image_files import left_out, read_header, read_image
from anomalib_pack.data_check.command import check
from anomalib_pack.defaults import OneClassDefaults

GRAY = np.array([[0, 1, 255, 256], [1000, 2048, 4000, 4095]], np.uint16)  # 12 bits in 16
COLOURS = np.stack([GRAY, GRAY // 2, GRAY // 3], axis=-1)


class Scores(Callback):
    """Scores of each image, in test and prediction, as the model gave them."""

    def __init__(self):
        self.test, self.predict = {}, {}

    def on_test_batch_end(self, _trainer, _pl_module, outputs, *_):
        self.test.update(zip(outputs.image_path, outputs.pred_score.tolist(), strict=True))

    def on_predict_batch_end(self, _trainer, _pl_module, outputs, *_):
        self.predict.update(zip(outputs.image_path, outputs.pred_score.tolist(), strict=True))


class OwnModel(OneClassDefaults, TinyModel):
    """A model of the pack."""


# --- Reading ---


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_images_of_8_bits_are_read_as_by_anomalib(tmp_path, mode):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.fromarray(pixels).convert(mode).save(path)
    assert torch.equal(read_image(path, white_level=7), read_as_anomalib(path, as_tensor=True))


@pytest.mark.parametrize(("name", "white"), [("a.png", None), ("a.png", 4095), ("a.tif", None), ("a.pgm", 4095)])
def test_gray_images_of_16_bits_are_scaled_by_what_is_white(tmp_path, name, white):
    path = write(tmp_path / name, GRAY)
    assert read_header(path).bits == 16
    expected = np.broadcast_to(GRAY / (white or 65535), (3, 2, 4))
    np.testing.assert_allclose(read_image(path, white), expected, rtol=1e-6)
    assert (read_as_anomalib(path, as_tensor=True) == 1).float().mean() > 0.5  # Anomalib: white


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_colours_of_16_bits(tmp_path, name):
    """As by Anomalib, which cuts them to 8 bits, or all bits by what is white."""
    path = write(tmp_path / name, COLOURS)
    assert (read_header(path).bits, read_header(path).clipped) == (16, False)
    assert torch.equal(read_image(path), read_as_anomalib(path, as_tensor=True))
    np.testing.assert_allclose(read_image(path, 4095), COLOURS.transpose(2, 0, 1) / 4095, rtol=1e-6)


@pytest.mark.parametrize(("pixels", "white"), [(GRAY.astype(np.int32), 4095), (np.float32(GRAY / 4095), None)])
def test_numbers_of_32_bits(tmp_path, pixels, white):
    path = write(tmp_path / "a.tif", pixels)
    np.testing.assert_allclose(read_image(path, white)[1], GRAY / 4095, rtol=1e-6)


@pytest.mark.parametrize(
    ("pixels", "white", "message"),
    [
        (GRAY, 4000, "its values are 0 to 4095, not 0 to 4000: give what is white as white_level"),
        (GRAY.astype(np.int32), None, "32-bit numbers is not known: give it as white_level"),
        (np.float32(GRAY), None, "its values are 0 to 4095, not 0 to 1: give"),
        (np.float32([[0, np.nan]]), None, "its values are nan to nan"),
        (np.float32([[-0.1, 1]]), None, r"its values are -0\.1 to 1"),
    ],
)
def test_values_beyond_what_is_white_are_refused(tmp_path, pixels, white, message):
    path = write(tmp_path / "a.tif", pixels)
    with pytest.raises(OSError, match=f"Cannot read {path}: .*{message}.* Replace"):
        read_image(path, white)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif"])
def test_images_with_an_orientation_are_refused(tmp_path, name):
    """Anomalib's predictions, inferencers and pictures would not turn them."""
    pixels = np.zeros((4, 6, 3), np.uint8)
    assert read_image(turned(tmp_path / name, pixels, 1)).shape == (3, 4, 6)
    for orientation in range(2, 9):
        path = turned(tmp_path / name, pixels, orientation)
        with pytest.raises(OSError, match=f"Cannot read {path}: its EXIF orientation is {orientation}, .*transpose"):
            read_image(path)


def test_empty_file_is_named(tmp_path):
    path = tmp_path / "a.png"
    path.touch()
    for act in (read_image, read_header, lambda path: check_readable([str(path)])):
        with pytest.raises((OSError, ValueError), match=f"Cannot read {path}: the file has 0 bytes"):
            act(path)


def test_images_of_one_colour_are_named(tmp_path):
    one = write(tmp_path / "one.png", np.full((4, 4, 3), (1, 2, 3), np.uint8))
    deep = write(tmp_path / "deep.png", np.full((4, 4), 300, np.uint16))
    other = write(tmp_path / "other.png", np.eye(4, dtype=np.uint8))
    with pytest.warns(UserWarning, match=f"one colour everywhere, 2 in all: {one}, {deep}. Check"):
        check_readable([str(one), str(deep), str(other)])


def test_other_kinds_of_images_beside_those_that_are_read(tmp_path):
    read = write(tmp_path / "a.png", GRAY)
    gif = write(tmp_path / "b.gif", np.eye(4, dtype=np.uint8))
    (tmp_path / "readme.txt").touch()
    mask = write(tmp_path / "a.bmp", np.eye(4, dtype=np.uint8))
    assert left_out([read], [mask]) == [gif]


# --- The same in training, test and prediction ---


def make_datamodule(root, *, name="part", **arguments):
    sizes = {"train_batch_size": 4, "eval_batch_size": 4, "num_workers": 0, "val_split_mode": "from_train"}
    return MultiCategory([folder(root, name)], **(sizes | arguments))


def make_engine(results, *callbacks):
    quiet = {"logger": False, "enable_progress_bar": False}
    return Engine(callbacks=list(callbacks), default_root_dir=results, accelerator="cpu", max_epochs=1, **quiet)


def test_images_of_16_bits_score_alike_in_test_and_prediction(tmp_path):
    root = write_folder(tmp_path / "photos")
    datamodule, scores, model = make_datamodule(root, white_level=4095), Scores(), OwnModel()
    engine = make_engine(tmp_path / "results", scores)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine.train(model, datamodule=datamodule)
    said = [str(each.message) for each in caught if "more than 8 bits" in str(each.message)]
    assert len(said) == 1
    assert f"e.g. {datamodule.train_data.samples.image_path[0]} with 16." in said[0]
    assert "inferencers" in said[0]
    for item in (datamodule.train_data[0], datamodule.test_data[0]):
        pixels = np.asarray(Image.open(item.image_path))
        np.testing.assert_allclose(item.image[0], pixels / 4095, rtol=1e-6)
    for kind in ("bad", "fine"):
        engine.predict(model, dataset=PredictImages(root / kind, white_level=4095))
    assert len(set(scores.test.values())) == 6
    assert scores.predict == pytest.approx(scores.test, rel=1e-5)


def test_predict_command(tmp_path, monkeypatch):
    """A folder goes through Anomalib's reader, `PredictImages` through the pack's."""
    root = write_folder(tmp_path / "photos") / "fine"
    monkeypatch.chdir(tmp_path)
    model = ["--model", "Uniad", "--model.weights", "null", "--model.backbone", "tf_efficientnet_lite0"]
    command = ["predict", *model, "--model.visualizer", "false", "--trainer.accelerator", "cpu"]
    AnomalibCLI(args=[*command, "--data", "PredictImages", "--data.path", str(root), "--data.white_level", "4095"])
    with pytest.raises(OSError, match=f"Cannot read {root}/0.png: it has 16 bits .*PredictImages"):
        AnomalibCLI(args=[*command, "--data", str(root)])


@pytest.mark.parametrize("fault", ["bits", "orientation"])
def test_what_anomalib_would_misread_is_refused(tmp_path, fault):
    root = write_folder(tmp_path / "photos", scale=1, dtype=np.uint8)
    path = root / "good" / "3.png"
    message = "it has 16 bits per channel, which Anomalib's reader clips"
    if fault == "bits":
        write(path, np.full((32, 32), 4095, np.uint16))
        message += ".*PredictImages"
    else:
        turned(path, np.asarray(Image.open(path)), 6)
        message = "its EXIF orientation is 6, "
    message = f"Cannot read {path}: {message}"
    for act in (Engine.fit, Engine.validate, Engine.test):
        datamodule = folder(root, val_split_mode="same_as_test", normal_test_dir="good")
        with pytest.raises(OSError, match=message):
            act(make_engine(tmp_path / "results"), OwnModel(), datamodule=datamodule)
    with pytest.raises(OSError, match=message):
        make_engine(tmp_path / "results").predict(OwnModel(), data_path=root / "good")


def test_synthetic_validation_of_16_bits_is_refused(tmp_path):
    """Anomalib would make the anomalies of white images."""
    root = write_folder(tmp_path / "photos")
    datamodule = make_datamodule(root, val_split_mode="synthetic")
    with pytest.raises(OSError, match=f"Cannot read {root}/good/.*another val_split_mode than synthetic"):
        datamodule.setup()


# --- Masks ---


@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("when", ["setup", "reading"])
def test_empty_mask_is_named(tmp_path, monkeypatch, alpha, when):
    root = write_folder(tmp_path / "photos", scale=1, dtype=np.uint8)
    path = root / "masks" / "1.png"
    pixels = np.zeros((32, 32, 4), np.uint8)
    if alpha:
        pixels[4:14, 6:14, 3] = 255
    write(path, pixels)
    monkeypatch.setattr(MultiCategory, "looks_at_files", when == "setup")
    datamodule = make_datamodule(root)
    but = " but for its alpha channel" if alpha else r"\."
    with pytest.raises(ValueError, match=f"The mask {path} of .*{root}/bad/1.png is empty: zero everywhere{but}"):
        datamodule.setup() or list(datamodule.test_data)


def test_models_look_at_files_that_anomalib_reads(tmp_path):
    root = write_folder(tmp_path / "photos", scale=1, dtype=np.uint8)
    datamodule = folder(root)
    datamodule.setup()
    check_training_images(datamodule)
    write(root / "masks" / "1.png", np.zeros((32, 32), np.uint8))
    with pytest.raises(ValueError, match=f"The mask {root}/masks/1.png of .* is empty"):
        check_training_images(datamodule)
    write(root / "good" / "1.png", np.full((32, 32), 4095, np.uint16))
    with pytest.raises(OSError, match=f"Cannot read {root}/good/1.png: it has 16 bits"):
        check_training_images(datamodule)


@pytest.mark.parametrize("when", ["setup", "reading"])
def test_mask_of_another_size_is_named(tmp_path, monkeypatch, when):
    """Where turning helps, the message says so."""
    root = write_folder(tmp_path / "photos", scale=1, dtype=np.uint8)
    write(root / "bad" / "1.png", np.zeros((32, 48), np.uint8))
    monkeypatch.setattr(MultiCategory, "looks_at_files", when == "setup")
    for size, turns in (((48, 32), True), ((16, 24), False)):
        write(root / "masks" / "1.png", np.full(size, 255, np.uint8))
        datamodule = make_datamodule(root)
        with pytest.raises(ValueError, match=rf"masks/1.png has size \({size[0]}, {size[1]}\) .* \(32, 48\)") as error:
            datamodule.setup() or list(datamodule.test_data)
        assert ("turned by 90 degrees" in str(error.value)) == turns


def test_masks_are_taken_as_they_are(tmp_path):
    root = write_folder(tmp_path / "photos", scale=1, dtype=np.uint8)
    mask = np.asarray(Image.open(root / "masks" / "0.png"))
    turned(root / "masks" / "0.png", mask, 6)
    datamodule = make_datamodule(root)
    datamodule.setup()
    item = next(item for item in datamodule.test_data if item.image_path.endswith("bad/0.png"))
    np.testing.assert_array_equal(item.gt_mask, mask > 0)


def test_masks_with_many_values_are_warned_of(tmp_path, rendered, sizes):
    soft = np.add.outer(np.arange(32), np.arange(32)).astype(np.uint8)
    with pytest.warns(UserWarning, match=r"more than 8 different values.*opened/0.png, .*opened/2.png. Store masks"):
        write_goods(tmp_path / "soft", soft).setup()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_goods(tmp_path / "hard", np.where(soft > 40, 236, 1).astype(np.uint8)).setup()
        MVTecLoco(rendered, "tray", num_workers=0).setup()


def test_masks_that_vanish_by_resizing_are_named(tmp_path):
    """One pixel of 32 x 32 is lost at 8 x 8."""
    mask = np.zeros((32, 32), np.uint8)
    mask[1, 1] = 255
    datamodule = write_goods(tmp_path / "goods", mask)
    model = TinyModel()
    model.pre_processor.transform = Resize((8, 8))
    with pytest.warns(UserWarning, match=r"crop leave nothing, 3 in all, count as anomalous: can/test/opened/0.png"):
        make_engine(tmp_path / "results").test(model, datamodule=datamodule)
    assert len(GoodsADDataset(tmp_path / "goods", "can", split="test")) == 6


# --- Names and links ---


def test_folders_with_names_beyond_ascii(tmp_path):
    root = write_folder(tmp_path / "Schräubchen 螺丝", scale=1, dtype=np.uint8)
    with pytest.raises(ValueError, match="non-printable"):  # the reason for the work-around
        folder(root).setup()
    datamodule, raw = make_datamodule(root, name="Schräubchen"), RawScores()
    make_engine(tmp_path / "results", raw).train(TinyModel(visualizer=True), datamodule=datamodule)
    assert set(raw.paths) == {str(path) for kind in ("bad", "fine") for path in (root / kind).iterdir()}
    assert torch.cat(raw.masks).flatten(1).any(dim=1).sum() == 3
    pictures = {path.relative_to(path.parents[1]) for path in (tmp_path / "results").rglob("images/*/*.png")}
    assert pictures == {Path(path).relative_to(root) for path in raw.paths}


def test_data_sets_below_a_name_beyond_ascii(tmp_path):
    """Anomalib's other datamodules refuse it, whatever the folder of the data set is called."""
    root = tmp_path / "Müller" / "MVTecAD"
    for part in ("train/good", "test/good"):
        (root / "bottle" / part).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(root / "bottle" / part / "0.png")
    message = f"Anomalib reads no folder with other characters than those of ASCII .*{root}/bottle. Rename the folder"
    with pytest.raises(ValueError, match=message):
        MultiCategory("MVTecAD", root, num_workers=0).setup()
    report, errors = check(MVTecAD(root, category="bottle", num_workers=0))
    assert errors == 1
    assert re.search(message, report)


def no_links(*_arguments, **_keywords):
    msg = "a required privilege is not held by the client"
    raise OSError(msg)


def test_folders_with_names_beyond_ascii_without_the_right_to_links(tmp_path, monkeypatch):
    root = write_folder(tmp_path / "Schräubchen", scale=1, dtype=np.uint8)
    monkeypatch.setattr(Path, "symlink_to", no_links)
    with pytest.raises(ValueError, match=rf"no link around them can be made \(a required .*: {root}/good, .* Rename"):
        make_datamodule(root).setup()


def test_synthetic_anomalies_without_the_right_to_links(tmp_path, monkeypatch):
    """They are copied."""
    root = write_folder(tmp_path / "photos", scale=1, dtype=np.uint8)
    monkeypatch.setattr(Path, "symlink_to", no_links)
    datamodule = make_datamodule(root, val_split_mode="synthetic")
    datamodule.setup()
    anomalous = datamodule.val_data.samples.query("label_index == 1").image_path.tolist()
    assert len(anomalous) > 0
    assert all(f"/{datamodule.name}/part/abnormal/" in path and Path(path).is_file() for path in anomalous)
    assert len(list(datamodule.val_data)) == len(datamodule.val_data)
