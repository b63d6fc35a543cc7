import pytest
import torch
from anomalib.cli.cli import AnomalibCLI

from anomalib_pack.callbacks import SeedEverything

SEEDED = """
trainer:
  callbacks:
    - class_path: anomalib_pack.callbacks.SeedEverything
      init_args:
        seed: 7
"""
# What the command offers itself, for comparison.
UNSEEDED = "seed_everything: 7\n"


def train(images, results, config):
    """Weights after ``anomalib train`` with two epochs of shuffled batches."""
    results.mkdir()
    (results / "run.yaml").write_text(config)
    arguments = {
        "config": results / "run.yaml",
        "model": "tiny_model.TinyModel",
        "data": "MVTecAD",
        "data.root": images,
        "data.category": "cloth",
        "data.train_batch_size": 4,
        "data.num_workers": 0,
        "trainer.max_epochs": 2,
        "trainer.accelerator": "cpu",
        "default_root_dir": results,
    }
    command = AnomalibCLI(["train", *(f"--{name}={value}" for name, value in arguments.items())])
    return torch.cat([parameter.detach().flatten() for parameter in command.model.parameters()])


def test_anomalib_train_repeats_only_with_the_callback(images, tmp_path):
    first = train(images, tmp_path / "first", SEEDED)
    second = train(images, tmp_path / "second", SEEDED)
    assert torch.equal(first, second)
    unseeded = [train(images, tmp_path / name, UNSEEDED) for name in ("third", "fourth")]
    assert not torch.equal(*unseeded)


def test_construction_seeds():
    SeedEverything(3)
    first = torch.rand(2)
    SeedEverything(3)
    assert torch.equal(torch.rand(2), first)
    SeedEverything(4)
    assert not torch.equal(torch.rand(2), first)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seed_out_of_range(seed):
    with pytest.raises(ValueError, match=rf"seed must be in \[0, 4294967295\], got {seed}\."):
        SeedEverything(seed)
