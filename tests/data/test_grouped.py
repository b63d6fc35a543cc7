"""Groups survive everything that Anomalib does with items and batches."""

import torch
from anomalib.data import ImageBatch
from lightning.fabric.utilities import move_data_to_device
from torchvision.tv_tensors import Image, Mask

from anomalib_pack.data import GroupedImageBatch, GroupedImageItem


def make_items(*groups):
    return [
        GroupedImageItem(
            image=Image(torch.rand(3, 8, 8)),
            gt_mask=Mask(torch.zeros(8, 8, dtype=torch.bool)),
            gt_label=torch.tensor(int(bool(group))),
            image_path=f"{index}.png",
            mask_path=f"masks/{index}" if group else "",
            group=group,
        )
        for index, group in enumerate(groups)
    ]


def test_collate_keeps_groups_and_mask_paths_whichever_image_is_first():
    for groups in (["", "logical_anomalies"], ["logical_anomalies", ""], ["", ""]):
        batch = GroupedImageBatch.collate(make_items(*groups))
        assert batch.group == groups
        assert batch.mask_path == [f"masks/{index}" if group else "" for index, group in enumerate(groups)]


def test_collate_resizes_images_of_different_size():
    items = make_items("a", "b")
    items[1].update(image=Image(torch.rand(3, 16, 16)), gt_mask=Mask(torch.zeros(16, 16, dtype=torch.bool)))
    batch = GroupedImageBatch.collate(items)
    assert batch.image.shape == (2, 3, 16, 16)
    assert batch.group == ["a", "b"]


def test_predictions_and_groups_reach_the_items():
    batch = GroupedImageBatch.collate(make_items("", "a", "b"))
    batch.update(pred_score=torch.tensor([0.1, 0.2, 0.3]), anomaly_map=torch.rand(3, 8, 8))
    items = list(batch)
    assert [item.group for item in items] == ["", "a", "b"]
    assert all(isinstance(item, GroupedImageItem) for item in items)
    assert [round(item.pred_score.item(), 1) for item in items] == [0.1, 0.2, 0.3]
    assert batch.update(in_place=False, group=["x", "y", "z"]).group == ["x", "y", "z"]
    assert batch.group == ["", "a", "b"]


def test_batch_without_groups_or_ground_truth():
    batch = GroupedImageBatch(image=torch.rand(2, 3, 8, 8))
    assert batch.group is None
    assert [item.group for item in batch] == [None, None]
    assert isinstance(batch, ImageBatch)


def test_to_numpy_keeps_groups():
    batch = GroupedImageBatch.collate(make_items("", "a")).to_numpy()
    assert batch.group == ["", "a"]
    assert [item.group for item in batch] == ["", "a"]
    assert make_items("a")[0].to_numpy().group == "a"


def test_device_transfer_keeps_groups():
    batch = move_data_to_device(GroupedImageBatch.collate(make_items("", "a")), torch.device("meta"))
    assert batch.image.device.type == "meta"
    assert batch.group == ["", "a"]
