"""Pictures of the maps of both branches (Figures 6 and 9), drawn with the parts of Anomalib's visualizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from anomalib.data import ImageBatch, ImageItem, InferenceBatch
from anomalib.utils.path import convert_to_title_case, generate_output_filename
from anomalib.visualization import ImageVisualizer, visualize_anomaly_map, visualize_image_item
from anomalib.visualization.image.functional import add_text_to_image, create_image_grid
from lightning import Trainer
from PIL import Image

from .lightning_model import Ulsad

FIELDS = ("image", "gt_mask", "structural_map", "logical_map", "anomaly_map")
OVERLAY_FIELDS = (("image", ["pred_mask"]),)


class BranchVisualizer(ImageVisualizer):
    """Anomalib's ``ImageVisualizer`` with two fields more: ``structural_map`` and ``logical_map`` of :class:`Ulsad`.

    All maps of an image have one scale, that of the model's post-processor: ``anomaly_map`` is the mean of the two
    others before it, and where a map passes the pixel threshold it is 0.5 (green). Without a global branch there is no
    ``logical_map``. Both are there while a test or prediction runs: ``visualize`` on stored predictions lacks them.

    Args:
        fields: What is drawn side by side. Default: image, ground truth, both branches and their combination.
        overlay_fields: What is drawn on top of what, behind the fields; the fields of ``ImageVisualizer`` only.
            Default: the predicted mask on the image.
        **kwargs: Arguments of ``ImageVisualizer``. The branches' maps take ``fields_config["anomaly_map"]``.

    Example:
        >>> BranchVisualizer(field_size=(128, 128)).fields
        ['image', 'gt_mask', 'structural_map', 'logical_map', 'anomaly_map']
    """

    def __init__(
        self,
        fields: list[str] | None = None,
        overlay_fields: list[tuple[str, list[str]]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(fields or list(FIELDS), overlay_fields or list(OVERLAY_FIELDS), **kwargs)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: Ulsad,
        outputs: ImageBatch,  # noqa: ARG002
        batch: ImageBatch,
        batch_idx: int,  # noqa: ARG002
        dataloader_idx: int = 0,  # noqa: ARG002
    ) -> None:
        """Draw the images of a batch, and save them where ``ImageVisualizer`` does. Predictions come here too."""
        if self.output_dir is None:
            self.output_dir = Path(trainer.default_root_dir) / "images"
        maps = branch_maps(pl_module)
        for index, item in enumerate(batch):
            file = generate_output_filename(
                input_path=item.image_path or "",
                output_path=self.output_dir,
                dataset_name=getattr(trainer.datamodule, "name", None),
                category=getattr(trainer.datamodule, "category", None),
            )
            self.draw(item, {field: values[index] for field, values in maps.items()}).save(file)

    def draw(self, item: ImageItem, maps: dict[str, torch.Tensor]) -> Image.Image:
        """Draw all fields of an image side by side.

        Args:
            item: The image with its predictions.
            maps: The branches' maps, (1, H, W) each, by the name of the field.
        """
        panels = [self._map(field, maps[field]) if field in maps else self._part(item, field) for field in self.fields]
        panels += [self._part(item, overlay=overlay) for overlay in self.overlay_fields]
        panels = [panel for panel in panels if panel is not None]  # e.g. an image without ground truth
        return create_image_grid(panels, nrow=len(panels))

    def _part(
        self, item: ImageItem, field: str | None = None, overlay: tuple[str, list[str]] | None = None
    ) -> Image.Image | None:
        return visualize_image_item(
            item,
            fields=[field] if field else None,
            overlay_fields=[overlay] if overlay else None,
            field_size=self.field_size,
            fields_config=self.fields_config,
            overlay_fields_config=self.overlay_fields_config,
            text_config=self.text_config,
        )

    def _map(self, field: str, values: torch.Tensor) -> Image.Image:
        panel = visualize_anomaly_map(values, **self.fields_config["anomaly_map"]).resize(self.field_size)
        text = dict(self.text_config)
        return add_text_to_image(panel, convert_to_title_case(field), **text) if text.pop("enable") else panel


def branch_maps(model: Ulsad) -> dict[str, torch.Tensor]:
    """Maps of the model's last batch by the name of the field, (B, 1, H, W), on the scale of its post-processor."""
    maps = {"structural_map": model.branch_maps.structural, "logical_map": model.branch_maps.logical}
    maps = {field: values for field, values in maps.items() if values is not None}
    if model.post_processor is None:
        return maps
    return {
        field: model.post_processor(InferenceBatch(anomaly_map=values)).anomaly_map for field, values in maps.items()
    }
