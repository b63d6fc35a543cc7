"""What the models of the pack choose alike where Anomalib lets a model choose."""

from __future__ import annotations

import inspect
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from anomalib import LearningType
from anomalib.data import AnomalibDataModule, InferenceBatch
from anomalib.deploy import CompressionType
from anomalib.metrics import Evaluator
from anomalib.post_processing import PostProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback
from torch import Tensor

from .callbacks import OneFolder, WriteRecords
from .exporting import (
    OPSET,
    AntialiasingByProducts,
    check_any_size,
    check_installed,
    giving_extra_outputs,
    images_of_size,
    keep_antialiasing,
    unasked,
    with_extra_outputs,
)
from .feature_cache import FeatureCache
from .loggers import warnings_alone
from .metadata import write_metadata
from .metrics import GroupEvaluator, default_test_metrics
from .pictures import SparesMetrics
from .post_processing import RankPreservingPostProcessor
from .progress import ProgressLines
from .quantizing import quantize_file
from .reading import RefusesMisreadImages
from .region import check_one_size, region_of
from .resuming import KeepTraining
from .tiling import check_tiler

if TYPE_CHECKING:
    from typing_extensions import Self  # in Python 3.10 too


class OneClassDefaults:
    """Mixin for models that learn from normal images; stands before ``AnomalibModule``.

    It brings the post-processor that keeps the ranking of scores, metrics for each group, records of each test and
    prediction, trainings that can be interrupted, refusal of images that would be misread, and exported files that see
    images as the engine does and say what they are in ``metadata.json``.

    Attributes:
        feature_cache: Of a model that is trained on features of a frozen network.
        explanation_classes: Branches whose scores are the explanation of a prediction, in its order.
        extra_outputs: Whether :meth:`forward`, which exports record, gives raw score and branch scores too.
    """

    feature_cache: FeatureCache | None = None
    explanation_classes: tuple[str, ...] = ()
    extra_outputs: bool = False

    def __new__(cls, *_arguments: Any, **keywords: Any) -> Self:
        """Say what stands in the place of an argument that most of Anomalib's models have.

        Raises:
            TypeError: If ``pre_trained`` is given and the model takes ``weights``.
        """
        names = [name for name in inspect.signature(cls).parameters if name in {"weights", "vit_weights"}]
        if "pre_trained" in keywords and names:
            msg = (
                f"{cls.__name__} has no argument pre_trained, but {' and '.join(names)}: 'hub' for trained ones "
                "from timm, the path of a file, or None for random ones."
            )
            raise TypeError(msg)
        return super().__new__(cls)

    @property
    def learning_type(self) -> LearningType:
        """Learns from normal images."""
        return LearningType.ONE_CLASS

    def configure_callbacks(self) -> list[Callback]:
        """Anomalib's callbacks, and the pack's, of which those of the trainer take the place.

        Raises:
            ValueError: If the trainer has a tiler without a stride.
        """
        check_tiler(self.trainer.callbacks)
        ours = (KeepTraining, ProgressLines, WriteRecords)
        cache = [] if self.feature_cache is None else [self.feature_cache]
        missing = [each() for each in ours if not any(isinstance(one, each) for one in self.trainer.callbacks)]
        components = [
            SparesMetrics(each) if isinstance(each, Visualizer) else each for each in super().configure_callbacks()
        ]
        return [*components, OneFolder(), RefusesMisreadImages(), *missing, *cache]

    def configure_post_processor(self) -> PostProcessor:
        """Normalise scores without changing their ranking; threshold from normal images alone where need be."""
        return RankPreservingPostProcessor()

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """The pack's metrics, overall and for each category or anomaly group."""
        return GroupEvaluator(test_metrics=default_test_metrics())

    def __setattr__(self, name: str, value: Any) -> None:
        """Take a component; a pre-processor keeps the antialiasing of its resize when it is exported."""
        super().__setattr__(name, value)
        if name == "pre_processor":
            keep_antialiasing(value)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the components; a pre-processor builds its exported transform anew."""
        super().on_load_checkpoint(checkpoint)
        keep_antialiasing(self.pre_processor)

    def forward(self, batch: Tensor, *args: Any, **kwargs: Any) -> InferenceBatch | NamedTuple:
        """Predict as exported files do, from images of any size (B, 3, H, W), RGB in [0, 1]."""
        return with_extra_outputs(self, batch) if self.extra_outputs else super().forward(batch, *args, **kwargs)

    def to_torch(self, export_root: Path | str, model_file_name: str = "model", extra_outputs: bool = False) -> Path:
        """Export the model itself, with ``metadata.json`` beside it.

        Args:
            export_root: Folder of the exported model.
            model_file_name: Its name.
            extra_outputs: Whether the model gives raw score and branch scores too, which Anomalib's inferencers do not
                take.
        """
        with giving_extra_outputs(self, extra_outputs):
            file = super().to_torch(export_root, model_file_name)
        write_metadata(self, file, None)
        return file

    def to_onnx(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        extra_outputs: bool = False,
        **kwargs: Any,
    ) -> Path:
        """Export to ONNX, also on the way to OpenVINO, with resizes that all runtimes compute alike.

        ``metadata.json`` is beside the file.

        Args:
            export_root: Folder of the exported model.
            model_file_name: Its name.
            input_size: Height and width of all images, ``None`` for images of any size.
            extra_outputs: Add outputs to the graph: ``raw_score``, and the score of each branch that the model has.
                Anomalib's inferencers take no more than the usual four.
            **kwargs: As in all Anomalib models.

        Raises:
            ValueError: If images may have any size, and the pre-processor does not resize them to a fixed one.
        """
        if input_size is None:
            check_any_size(self.pre_processor)
            check_one_size(self)
        options = {"opset_version": OPSET, **kwargs}
        with AntialiasingByProducts(), giving_extra_outputs(self, extra_outputs), warnings_alone(*unasked()):
            file = super().to_onnx(export_root, model_file_name, input_size, **options)
        write_metadata(self, file, input_size)
        return file

    def to_openvino(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        compression_type: CompressionType | None = None,
        datamodule: AnomalibDataModule | None = None,
        extra_outputs: bool = False,
        **kwargs: Any,
    ) -> Path:
        """Export to OpenVINO, after a look at what it takes, with ``metadata.json`` beside the file.

        Args:
            export_root: Folder of the exported model.
            model_file_name: Its name.
            input_size: Height and width of all images, ``None`` for images of any size.
            compression_type: As in all Anomalib models. ``INT8_PTQ`` keeps layers in float as the maps of normal
                validation images need it, see :mod:`anomalib_pack.quantizing`.
            datamodule: For INT8 by quantisation: its validation images, and with accuracy control its test images.
            extra_outputs: As in :meth:`to_onnx`.
            **kwargs: As in all Anomalib models.

        Raises:
            ModuleNotFoundError: If OpenVINO is not installed, or NNCF, which all INT8 types need.
            ValueError: If ``INT8_PTQ`` has no datamodule with normal validation images.
        """
        needed = ["openvino"] if compression_type in {None, CompressionType.FP16} else ["openvino", "nncf"]
        check_installed(needed, "This export")
        with giving_extra_outputs(self, extra_outputs), images_of_size(datamodule, input_size):
            if compression_type == CompressionType.INT8_PTQ:
                with TemporaryDirectory() as folder:
                    in_float = super().to_openvino(folder, model_file_name, input_size, **kwargs)
                    quantized = Path(export_root, in_float.relative_to(folder))
                    file = quantize_file(in_float, quantized, datamodule, region_of(self))
            else:
                file = super().to_openvino(
                    export_root, model_file_name, input_size, compression_type, datamodule, **kwargs
                )
        write_metadata(self, file, input_size)
        return file
