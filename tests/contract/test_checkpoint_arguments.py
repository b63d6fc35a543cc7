"""Contract point 4: what a checkpoint gives to a model that was built with other arguments."""

import logging
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from anomalib.data import PredictDataset
from anomalib.models import AnomalibModule
from cases import Case
from runs import SEED, quiet_engine
from tiny_model import RawScores

from anomalib_pack.data import MVTecLoco


class Reference(NamedTuple):
    """A model that was trained for an epoch at another size than its default, and tested."""

    checkpoint: Path
    metrics: list[dict[str, float]]
    maps: torch.Tensor


@pytest.fixture(scope="module")
def tested(
    model_class: type[AnomalibModule], case: Case, loco_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Reference:
    torch.manual_seed(SEED)
    scores = RawScores()
    engine = quiet_engine(tmp_path_factory.mktemp("tested"), max_epochs=1, callbacks=[scores])
    datamodule = MVTecLoco(root=loco_root, category="tray", train_batch_size=4, eval_batch_size=4, num_workers=0)
    model = model_class(**case.arguments, pre_processor=model_class.configure_pre_processor(case.other_size))
    engine.fit(model, datamodule=datamodule)
    metrics = engine.test(model, datamodule=datamodule)
    return Reference(Path(engine.best_model_path), metrics, torch.cat(scores.maps))


@pytest.mark.parametrize("given", [True, False, (288, 320)], ids=str)
def test_the_size_of_a_checkpoint(
    tested: Reference,
    model_class: type[AnomalibModule],
    case: Case,
    loco: MVTecLoco,
    loco_root: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    given: bool | tuple[int, int],
) -> None:
    """Datamodule and network have the size of the training, whatever pre-processor the model was built with."""
    pre_processor = given if isinstance(given, bool) else model_class.configure_pre_processor(given)
    model, scores = model_class(**case.arguments, pre_processor=pre_processor), RawScores()
    engine = quiet_engine(tmp_path, callbacks=[scores])
    with caplog.at_level(logging.WARNING, "anomalib_pack.checkpoints"):
        metrics = engine.test(model, datamodule=loco, ckpt_path=tested.checkpoint)
    assert metrics == tested.metrics
    torch.testing.assert_close(torch.cat(scores.maps), tested.maps, atol=0, rtol=0)
    assert loco.test_data[0].image.shape[-2:] == case.other_size
    [line] = [record.message for record in caplog.records if record.name == "anomalib_pack.checkpoints"]
    assert f"checkpoint's, Resize(size={list(case.other_size)}" in line

    folder = PredictDataset(loco_root / "tray" / "test" / "good")
    model = model_class(**case.arguments, pre_processor=pre_processor)
    [first, *_] = engine.predict(model, dataset=folder, ckpt_path=tested.checkpoint)
    assert first.anomaly_map.shape[-2:] == case.other_size


def test_thresholds_belong_to_the_scores(
    tested: Reference, model_class: type[AnomalibModule], case: Case, loco: MVTecLoco, tmp_path: Path
) -> None:
    """Where scores are computed with other values than in the checkpoint, thresholds are measured anew."""
    if not case.scoring:
        return
    arguments = case.arguments | case.scoring
    model = model_class(**arguments)
    quiet_engine(tmp_path / "tested", limit_test_batches=1).test(model, datamodule=loco, ckpt_path=tested.checkpoint)
    expected = model_class.load_from_checkpoint(tested.checkpoint, **arguments)
    before = expected.post_processor.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    quiet_engine(tmp_path / "validated").validate(expected, datamodule=loco)
    after = expected.post_processor.state_dict()
    assert any(not torch.equal(value, after[name]) for name, value in before.items())  # the values matter
    for name, value in model.post_processor.state_dict().items():
        torch.testing.assert_close(value, after[name], atol=0, rtol=0, equal_nan=True)


def test_weights_come_from_the_checkpoint_of_this_run(
    tested: Reference, model_class: type[AnomalibModule], case: Case, loco: MVTecLoco, tmp_path: Path
) -> None:
    """A training that goes on needs no file of weights; one that begins does, whatever the engine did before."""
    missing = {name: str(tmp_path / "nowhere.pth") for name in ("weights", "teacher_weights") if name in case.arguments}
    model = model_class(**(case.arguments | missing))
    engine = quiet_engine(tmp_path, max_epochs=1)
    engine.fit(model, datamodule=loco, ckpt_path=tested.checkpoint)
    engine.test(model, datamodule=loco, ckpt_path=tested.checkpoint)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        engine.fit(model, datamodule=loco)
