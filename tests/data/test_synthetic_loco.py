"""SyntheticLoco renders MVTec LOCO's folder format: complete, reproducible, with masks that show the defects."""

import json
import signal
import subprocess
import sys

import anomalib.data
import numpy as np
import pytest
from anomalib.engine import Engine
from anomalib.models import Padim
from PIL import Image
from waiting import wait_until

from anomalib_pack.data import MVTecLoco, SyntheticLoco
from anomalib_pack.rendering import tray
from anomalib_pack.rendering.canvas import Canvas
from anomalib_pack.rendering.defects import DAMAGES
from anomalib_pack.rendering.writing import SCENES

GROUPS = ("logical_anomalies", "structural_anomalies")
TINY = {"image_size": 64, "num_train": 2, "num_val": 1, "num_test": 1}


def read_files(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def render(root, **arguments):
    datamodule = SyntheticLoco(root=root, **{**TINY, **arguments})
    datamodule.prepare_data()
    return datamodule


@pytest.mark.parametrize("category", ["tray", "board"])
def test_folder_format(rendered, category):
    folder = rendered / category
    images = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png") if "ground_truth" not in path.parts)
    assert images == sorted(
        [f"train/good/{index:03}.png" for index in range(4)]
        + [f"validation/good/{index:03}.png" for index in range(2)]
        + [f"test/{group}/{index:03}.png" for group in ("good", *GROUPS) for index in range(4)]
    )
    for image in images:
        assert Image.open(folder / image).size == (64, 64)
    masked = {str(path.parent.relative_to(folder / "ground_truth")) for path in folder.glob("ground_truth/*/*/000.png")}
    assert masked == {f"{group}/{index:03}" for group in GROUPS for index in range(4)}


@pytest.mark.parametrize("category", ["tray", "board"])
def test_masks_have_one_value_of_a_defect_of_their_group(rendered, category):
    folder = rendered / category
    config = json.loads((folder / "defects_config.json").read_text())
    assert all(
        set(entry) == {"defect_name", "pixel_value", "saturation_threshold", "relative_saturation"} for entry in config
    )
    names = {entry["pixel_value"]: entry["defect_name"] for entry in config}
    assert len(names) == len(config)
    scene = SCENES[category]
    defects = dict(zip(GROUPS, (scene.LOGICAL_DEFECTS, scene.STRUCTURAL_DEFECTS), strict=True))
    for path in folder.glob("ground_truth/*/*/*.png"):
        values = np.unique(np.asarray(Image.open(path)))
        assert len(values) == 2
        assert values[0] == 0
        assert names[values[1]] in {defect.name for defect in defects[path.parts[-3]]}


@pytest.mark.parametrize("category", ["tray", "board"])
def test_every_defect_has_a_mask_that_can_be_found_in_full(category):
    scene = SCENES[category]
    for defect in (*scene.LOGICAL_DEFECTS, *scene.STRUCTURAL_DEFECTS):
        _, (mask,) = scene.render(128, [defect.name], np.random.default_rng(3))
        assert 0 < mask.mean() < 0.5, defect.name
        if not defect.relative:
            # Otherwise no detector could reach a full score.
            assert mask.mean() > defect.saturation, defect.name


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_damage_is_where_its_mask_is(damage):
    for seed in range(6):
        canvas = Canvas(128, (0.4, 0.4, 0.4))
        mask = damage(canvas, np.random.default_rng(seed))
        changed = (np.abs(canvas.height) > 0.001) | (np.abs(canvas.color - 0.4).max(axis=-1) > 0.05)
        assert (mask & changed).sum() > 0.6 * (mask | changed).sum()


def count_parts(pieces):
    return [sorted(piece.part.name for piece in pieces if piece.cell == cell) for cell in range(len(tray.KIT))]


def test_logical_defects_change_the_contents_as_named():
    normal = count_parts(tray.make_kit())
    for defect in tray.LOGICAL_DEFECTS:
        pieces = tray.make_kit()
        cells = tray.repack(pieces, defect.name, np.random.default_rng(2))
        changed = [cell for cell, parts in enumerate(count_parts(pieces)) if parts != normal[cell]]
        action = defect.name.split("_")[0]
        assert len(changed) == {"swapped": 2}.get(action, 1)
        assert len(pieces) - len(tray.make_kit()) == {"missing": -1, "extra": 1}.get(action, 0)
        # The mask shows floors, or the one piece that is the defect.
        marked = [piece.cell for piece in pieces if piece.defect == defect.name]
        assert sorted(cells) + marked == changed


def test_drawn_defects_belong_to_their_group():
    rng = np.random.default_rng(0)
    for scene in SCENES.values():
        for group, defects in zip(GROUPS, (scene.LOGICAL_DEFECTS, scene.STRUCTURAL_DEFECTS), strict=True):
            drawn = [scene.draw_defects(group, rng) for _ in range(300)]
            assert {name for names in drawn for name in names} == {defect.name for defect in defects}
            assert {len(names) for names in drawn} == ({1} if group == "logical_anomalies" else {1, 2})


@pytest.mark.parametrize("category", ["tray", "board"])
def test_same_parameters_give_the_same_bytes_and_another_seed_gives_others(tmp_path, category):
    render(tmp_path / "first", category=category)
    np.random.seed(1)  # noqa: NPY002 - the global state must not have a say
    render(tmp_path / "second", category=category)
    render(tmp_path / "third", category=category, render_seed=1)
    first, second, third = (read_files(tmp_path / name) for name in ("first", "second", "third"))
    assert first == second
    shared = [name for name in first if name in third and "ground_truth" not in name and name.endswith(".png")]
    assert len(shared) == 6
    assert all(first[name] != third[name] for name in shared)


def test_all_pictures_of_a_set_differ(rendered):
    pictures = [path.read_bytes() for path in (rendered / "tray").rglob("*.png") if "ground_truth" not in path.parts]
    assert len(set(pictures)) == len(pictures) == 18


def test_renders_once(tmp_path):
    render(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    render(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == times


def test_other_parameters_are_refused_and_nothing_is_touched(tmp_path):
    render(tmp_path)
    before = read_files(tmp_path)
    with pytest.raises(ValueError, match=r"tray was rendered with .*'num_train': 2.*'num_train': 3.* another `root`"):
        render(tmp_path, num_train=3)
    assert read_files(tmp_path) == before


def test_foreign_folder_is_refused_and_nothing_is_touched(tmp_path):
    (tmp_path / "tray").mkdir()
    (tmp_path / "tray" / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match=r"tray was not rendered by SyntheticLoco"):
        render(tmp_path)
    assert read_files(tmp_path) == {"tray/mine.txt": b"keep"}


def test_killed_rendering_is_done_anew(tmp_path):
    code = f"from anomalib_pack.data import SyntheticLoco; SyntheticLoco(root={str(tmp_path)!r}).prepare_data()"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    wait_until(lambda: any(tmp_path.glob("*/tray/train/good/*.png")), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "tray").exists()
    render(tmp_path)
    MVTecLoco(root=tmp_path, category="tray").setup()
    assert len(list((tmp_path / "tray").glob("train/good/*.png"))) == TINY["num_train"]


def test_failed_rendering_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_arguments):
        raise OSError("no space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="no space left"):
        render(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argument", "value"),
    [("category", "trey"), ("image_size", 32), ("num_train", 0), ("num_val", 0), ("num_test", 0), ("render_seed", -1)],
)
def test_impossible_argument_is_named(tmp_path, argument, value):
    with pytest.raises(ValueError, match=f"{argument} must be .* got {value!r}"):
        SyntheticLoco(root=tmp_path, **{argument: value})


def test_anomalib_trains_tests_and_predicts(tmp_path, rendered, sizes):
    """The groups arrive at the end of Anomalib's whole chain, and its pictures are written."""
    datamodule = SyntheticLoco(root=rendered, **sizes, train_batch_size=4, eval_batch_size=5)
    model = Padim(backbone="resnet18", layers=["layer1"], pre_trained=False, n_features=10)
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)
    engine.fit(model, datamodule=datamodule)
    engine.test(model, datamodule=datamodule)
    batches = engine.predict(model, datamodule=datamodule)
    groups = [group for batch in batches for group in batch.group]
    assert {group: groups.count(group) for group in groups} == {"": 4, **dict.fromkeys(GROUPS, 4)}
    assert all(len(batch.pred_score) == len(batch.group) == len(list(batch)) for batch in batches)
    pictures = {path.parent.name for path in tmp_path.rglob("images/**/*.png")}
    assert pictures == {"good", *GROUPS}


def test_image_size_from_get_datamodule(tmp_path):
    """Anomalib makes a pair of every image_size before it builds a datamodule, e.g. in a benchmark."""
    config = {"class_path": "SyntheticLoco", "init_args": TINY | {"root": str(tmp_path)}}
    assert anomalib.data.get_datamodule(config).image_size == 64
    config["init_args"]["image_size"] = [64, 96]
    with pytest.raises(ValueError, match="image_size"):
        anomalib.data.get_datamodule(config)
