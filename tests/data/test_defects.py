"""The defects of an image: one for each mask, with how much of it has to be found."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from anomalib_pack.data import MultiCategory, MVTecLocoDataset
from anomalib_pack.metrics.samples import belongs, names_group

CONFIG = "defects_config.json"
SIZE = (40, 60)


def entry(value, threshold, relative, name=None):
    return {
        "defect_name": name or f"kind {value}",
        "pixel_value": value,
        "saturation_threshold": threshold,
        "relative_saturation": relative,
    }


ENTRIES = [entry(255, 30, False), entry(250, 0.35, True), entry(249, 1.0, True), entry(248, 100, False)]


@pytest.fixture
def root(tmp_path):
    """A category with an image of four defects that overlap, and a normal image."""
    for group in ("good", "logical_anomalies"):
        path = tmp_path / "part" / "test" / group / "000.png"
        path.parent.mkdir(parents=True)
        Image.new("RGB", SIZE[::-1], (9, 9, 9)).save(path)
    for index, value in enumerate((255, 250, 249, 248)):
        write_mask(tmp_path, index, rectangle(value, index))
    write_config(tmp_path, ENTRIES)
    return tmp_path


def rectangle(value, index=0):
    mask = np.zeros(SIZE, np.uint8)
    mask[4 : 9 + index, 5:18] = value  # (5 + index) x 13 pixels
    return mask


def write_mask(root, index, pixels):
    path = root / "part" / "ground_truth" / "logical_anomalies" / "000" / f"{index:03}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_config(root, entries):
    (root / "part" / CONFIG).write_text(entries if isinstance(entries, str) else json.dumps(entries))


def defects(root, group="logical_anomalies"):
    return MVTecLocoDataset(root, "part", split="test").defects(str(root / "part" / "test" / group / "000.png"))


def test_one_defect_for_each_mask(root):
    found = defects(root)
    assert [defect.name for defect in found] == ["kind 255", "kind 250", "kind 249", "kind 248"]
    # 30 of 65 pixels; int(0.35 * 78 = 27.3); all of 91; 100 of 104
    assert [defect.saturation_area for defect in found] == [30, 27, 91, 100]
    for index, defect in enumerate(found):
        assert defect.mask.dtype == torch.bool
        assert torch.equal(defect.mask, torch.from_numpy(rectangle(1, index) > 0))


def test_absolute_saturation_ends_at_the_area(root):
    write_config(root, [*ENTRIES[:3], entry(248, 10_000, False)])
    assert defects(root)[3].saturation_area == 104


def test_normal_image_has_none_and_needs_no_configuration(root):
    (root / "part" / CONFIG).unlink()
    assert defects(root, "good") == []


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (None, r"no file .*part/defects_config.json"),
        ("[{", r"Cannot read .*part/defects_config.json"),
        ({"255": 30}, "config.json must be a list .* got a dict"),
        ([{"pixel_value": 255}], "config.json must have defect_name, .* got {'pixel_value': 255}"),
        ([*ENTRIES, entry(250, 0.5, True)], "config.json contradicts itself on pixel value 250"),
        ([*ENTRIES, entry(250, 0.35, True, "other")], "config.json contradicts itself on pixel value 250"),
        ([entry(0, 0.5, True)], "config.json .* pixel_value, got 0"),
        ([entry(255, 30, True)], r"config.json .* pixel value 255 a share in \(0, 1\] .* got 30 and True"),
        ([entry(255, 0.5, False)], "config.json .* pixel value 255 .* got 0.5 and False"),
        ([entry(255, "30", False)], "config.json .* pixel value 255 .* got '30' and False"),
        ([entry(255, 30, 0)], "config.json .* pixel value 255 .* got 30 and 0"),
        (ENTRIES[:1] + ENTRIES[2:], r"000/001.png has pixel value 250, but .*config.json explains 248, 249, 255 only"),
        (
            [ENTRIES[0], entry(250, 0.01, True), *ENTRIES[2:]],
            r"001.png has 78 pixels of value 250, .* share 0.01 is less",
        ),
    ],
)
def test_wrong_configuration_is_named(root, entries, message):
    (root / "part" / CONFIG).unlink() if entries is None else write_config(root, entries)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        defects(root)


def test_an_entry_that_is_there_twice_is_no_contradiction(root):
    write_config(root, ENTRIES + ENTRIES)
    assert len(defects(root)) == 4


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.maximum(rectangle(255), rectangle(250, 4)), "001.png must have one value beside 0, .* got 250, 255"),
        (rectangle(0), r"001.png of the anomalous image .*logical_anomalies/000.png is empty"),
        (rectangle(250).T, r"001.png has size \(60, 40\)"),
    ],
)
def test_wrong_mask_is_named(root, mask, message):
    write_mask(root, 1, mask)
    with pytest.raises(ValueError, match=message):
        defects(root)


def test_image_of_another_data_set_is_named(root):
    with pytest.raises(ValueError, match=r"elsewhere\.png is no image of the data set"):
        MVTecLocoDataset(root, "part", split="test").defects("elsewhere.png")


@pytest.mark.parametrize("category", ["tray", "board"])
def test_rendered_defects_are_those_of_the_masks(rendered, category):
    dataset = MVTecLocoDataset(rendered, category, split="test")
    for item in dataset:
        found = dataset.defects(item.image_path)
        assert bool(found) == bool(item.gt_label)
        if found:
            assert torch.equal(torch.stack([defect.mask for defect in found]).any(0), item.gt_mask)
            assert all(1 <= defect.saturation_area <= defect.mask.sum() for defect in found)


def joined(root, **arguments):
    datamodule = MultiCategory("MVTecLoco", root, num_workers=0, **arguments)
    datamodule.setup()
    return datamodule.test_data


@pytest.mark.parametrize("linked", [False, True])
def test_joined_categories_keep_their_defects(rendered, tmp_path, linked):
    if linked:  # the images then have other paths than in the datasets of the categories
        for category in ("tray", "board"):
            (tmp_path / category).symlink_to(rendered / category, target_is_directory=True)
    dataset = joined(tmp_path if linked else rendered)
    for category in ("tray", "board"):
        alone = MVTecLocoDataset(rendered, category, split="test")
        paths = dataset.samples.image_path[dataset.samples.category == category]
        for path, own in zip(paths, alone.samples.image_path, strict=True):
            for ours, theirs in zip(dataset.defects(path), alone.defects(own), strict=True):
                assert (ours.name, ours.saturation_area) == (theirs.name, theirs.saturation_area)
                assert torch.equal(ours.mask, theirs.mask)


def test_joined_categories_by_category_or_by_group(rendered):
    by_category, by_group = joined(rendered), joined(rendered, group_by="group")
    assert set(by_category.samples.group) == {"board", "tray"}
    names = {f"{category}/{group}" for category in ("board", "tray") for group in ("logical", "structural")}
    assert {name.removesuffix("_anomalies") for name in by_group.samples.group} == {*names, "board/", "tray/"}
    assert [item.group for item in by_group] == by_group.samples.group.tolist()
    with pytest.raises(ValueError, match="group_by must be 'category' or 'group', got 'label'"):
        MultiCategory("MVTecLoco", rendered, group_by="label")


def test_which_images_belong_to_a_group():
    names = ["", "a", "a/", "a/b", "a/c", "ab/", "ab/b"]
    groups = [name for name in names if names_group(name)]
    members = {group: [name for name in names if belongs(name, group)] for group in groups}
    assert members == {"a": ["", "a"], "a/b": ["", "a/", "a/b"], "a/c": ["", "a/", "a/c"], "ab/b": ["", "ab/", "ab/b"]}
    assert all(belongs(name, "") for name in names)
