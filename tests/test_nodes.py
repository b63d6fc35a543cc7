"""Training on several nodes: processes that are started one by one, as somebody does it on each of their machines."""

import csv
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from waiting import TIMEOUT, wait_until

MODEL = "Unislad"  # keeps memory banks
ARGUMENTS = {
    "backbone": "tf_efficientnet_lite0",
    "weights": "wheel",
    "blocks": ["blocks.1.1", "blocks.2.1", "blocks.4.2"],
    "local_dim": 32,
    "use_vit": False,
}


def column(folder: Path, name: str) -> dict[str, str]:
    """What the records have of each image."""
    with (folder / "test_predictions.csv").open(newline="") as file:
        return {row["image_path"]: row[name] for row in csv.DictReader(file)}


def scores(folder: Path) -> dict[str, float]:
    return {path: float(score) for path, score in column(folder, "raw_score").items()}


def banks(folder: Path) -> dict[str, torch.Tensor]:
    state = torch.load(folder / "weights/lightning/model.ckpt", weights_only=False)["state_dict"]
    return {name: value for name, value in state.items() if "bank" in name}


@pytest.mark.slow
def test_two_nodes(tmp_path: Path, loco_root: Path) -> None:
    """Results are those of one, in one folder, which ``latest`` leads to. Banks hold all images."""
    seeding = {"class_path": "anomalib_pack.callbacks.SeedEverything", "init_args": {"seed": 7}}
    data = {"root": str(loco_root), "category": "tray", "train_batch_size": 4, "eval_batch_size": 3, "num_workers": 0}
    config = {
        "model": {"class_path": MODEL, "init_args": ARGUMENTS},
        "data": {"class_path": "MVTecLoco", "init_args": data},
        "trainer": {"accelerator": "cpu", "devices": 1, "callbacks": [seeding], "enable_progress_bar": False},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def start(results: str, *options: str, **variables: str) -> subprocess.Popen:
        command = [Path(sys.executable).with_name("anomalib"), "train", "--config", "run.yaml"]
        command += ["--default_root_dir", results, *options]
        with (tmp_path / f"{results}{variables.get('NODE_RANK', '')}.log").open("w") as log:
            output = {"stdout": log, "stderr": subprocess.STDOUT}
            return subprocess.Popen(command, cwd=tmp_path, env=os.environ | variables, **output)

    def start_node(rank: int) -> subprocess.Popen:
        variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": str(rank)}
        return start("two", "--trainer.num_nodes", "2", **variables)

    processes = [start("one"), start_node(0)]
    try:
        wait_until(lambda: any((tmp_path / "two").glob(f"{MODEL}/*/tray/v0")), processes[1])
        processes.append(start_node(1))
        assert [process.wait(TIMEOUT) for process in processes] == [0, 0, 0]
    finally:
        for process in processes:
            process.kill()
    (one,) = (tmp_path / "one").glob(f"{MODEL}/*/tray/v0")
    (first,) = (tmp_path / "two").glob(f"{MODEL}/*/tray/v0")
    assert {path.name for path in first.parent.iterdir()} == {"v0", "latest"}
    assert first.with_name("latest").resolve() == first
    assert {path.name for path in one.iterdir()} == {path.name for path in first.iterdir()}
    assert scores(first) == pytest.approx(scores(one), abs=1e-4)
    pictures = [{path.relative_to(folder).as_posix() for path in folder.rglob("*.png")} for folder in (one, first)]
    assert pictures[0] == pictures[1] == set(column(first, "picture").values())
    expected = banks(one)
    assert expected
    for name, bank in banks(first).items():
        assert bank.shape == expected[name].shape, name
