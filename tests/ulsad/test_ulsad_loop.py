"""Anomalib's engine adds nothing to ULSAD's training: a plain loop over the same batches gives the same weights."""

from copy import deepcopy

import torch
from anomalib.engine import Engine
from lightning.pytorch import Callback
from torchvision.transforms.v2.functional import resize

from anomalib_pack.data import MVTecLoco
from anomalib_ulsad import Ulsad

LAYERS = ("blocks.2", "blocks.4")  # a cheap network


class Record(Callback):
    """Keeps the first weights, and the images and the loss of each step."""

    def __init__(self) -> None:
        self.network, self.paths, self.losses = None, [], []

    def on_train_batch_start(self, _trainer, pl_module, batch, _index) -> None:
        self.network = self.network or deepcopy(pl_module.model)
        self.paths.append(batch.image_path)

    def on_train_batch_end(self, _trainer, _module, outputs, *_batch) -> None:
        self.losses.append(outputs["loss"].item() if outputs else None)


def test_the_engine_trains_as_a_plain_loop_does(loco: MVTecLoco, tmp_path) -> None:
    """In float64, so that rounding does not hide a difference; with validations between the epochs."""
    torch.manual_seed(0)
    model = Ulsad(backbone="tf_efficientnet_lite0", layers=LAYERS, weights=None, feature_dim=8, lr=1e-3)
    record = Record()
    engine = Engine(
        callbacks=[record],
        precision="64-true",
        max_epochs=2,
        accelerator="cpu",
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    engine.fit(model, datamodule=loco)
    assert len(record.losses) == 2 * 4
    assert record.paths[:4] != record.paths[4:]  # a new order in each epoch
    assert record.losses.count(None) == 2  # 13 images in batches of 4: the last image is left out

    items = [loco.train_data[index] for index in range(len(loco.train_data))]
    images = {item.image_path: resize(item.image, [256, 256], antialias=True).double() for item in items}
    network = record.network
    optimizer = torch.optim.Adam([*network.reconstruction.parameters(), *network.autoencoder.parameters()], 1e-3)
    optimizer.param_groups[0]["weight_decay"] = 2e-5
    losses = []
    for paths in record.paths:
        if len(paths) == 1:
            losses.append(None)
            continue
        network.train()
        terms = model.loss(network(torch.stack([images[path] for path in paths])))
        loss = terms["local"] + terms["global"] + terms["local_global"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    torch.testing.assert_close([x for x in losses if x], [x for x in record.losses if x], rtol=1e-6, atol=0)
    trained = model.model.state_dict()
    for name, expected in network.state_dict().items():
        if "quantiles" not in name:  # measured by the validation
            torch.testing.assert_close(trained[name], expected, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
