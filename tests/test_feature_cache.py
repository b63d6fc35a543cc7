"""Frozen features are computed once: nothing else changes, in whatever way a training runs."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import anomalib.models
import pytest
import torch
from anomalib.data import ImageBatch
from anomalib.engine import Engine
from cached_model import Cached
from lightning import seed_everything
from lightning.pytorch import Callback
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import CenterCrop, Compose, RandomHorizontalFlip, Resize
from waiting import TIMEOUT

from anomalib_pack import feature_store
from anomalib_pack.data import GroupedImageBatch, MultiCategory, MVTecLoco
from anomalib_pack.feature_store import GB, FeatureStore, choose_place

sys.path.insert(0, str(Path(__file__).parent / "contract"))
from cases import CASES

HERE = Path(__file__).parent
EPOCHS = 3


class HideImages(Callback):
    """Takes the training images away after the first epoch, and counts what the frozen network computes."""

    def __init__(self, *folders: Path) -> None:
        self.folders, self.calls = folders, []

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        self.calls.append(pl_module.model.calls)
        if trainer.current_epoch == 1:
            for folder in self.folders:
                folder.rename(folder.with_name("hidden"))

    def on_train_end(self, trainer, pl_module) -> None:
        self.calls.append(pl_module.model.calls)
        for folder in self.folders:
            folder.with_name("hidden").rename(folder)


def train(model, data, results: Path, *callbacks: Callback, ckpt_path: Path | None = None, **arguments: Any) -> Any:
    """Train, and give what a training comes to: the weights, and the random numbers that would come next."""
    engine = Engine(
        callbacks=list(callbacks),
        accelerator="cpu",
        default_root_dir=results,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        **{"max_epochs": EPOCHS, "limit_val_batches": 0, **arguments},
    )
    engine.fit(model, datamodule=data, ckpt_path=ckpt_path)
    return {**model.state_dict(), "drawn": torch.get_rng_state()}


def seeded(**arguments: Any) -> Cached:
    seed_everything(0, workers=True)
    return Cached(**arguments)


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], atol=0, rtol=0, equal_nan=True, msg=name)


def loco(root: Path, **arguments: Any) -> MVTecLoco:
    return MVTecLoco(root=root, category="tray", **{"train_batch_size": 4, "num_workers": 0, **arguments})


class OwnLoader(MVTecLoco):
    """A datamodule whose loader is the user's."""

    options: dict[str, Any]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_data, batch_size=4, collate_fn=self.train_data.collate_fn, **self.options)


def own_loader(root: Path, **options: Any) -> OwnLoader:
    data = OwnLoader(root=root, category="tray")
    data.options = options
    return data


DATA = {
    "shuffled": loco,
    "workers": lambda root: loco(root, num_workers=2),
    "workers that stay": lambda root: own_loader(root, shuffle=True, num_workers=1, persistent_workers=True),
    "a generator of its own": lambda root: own_loader(
        root, shuffle=True, generator=torch.Generator().manual_seed(3)
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DATA)
def test_neither_files_nor_network_from_the_second_epoch_on(loco_root: Path, tmp_path: Path, kind: str) -> None:
    root = tmp_path / "data"
    shutil.copytree(loco_root, root)  # other processes of the tests may read the original
    expected = train(seeded(cache=None), DATA[kind](root), tmp_path)
    hide = HideImages(root / "tray" / "train" / "good")
    model = seeded(cache="auto")
    assert_same(train(model, DATA[kind](root), tmp_path, hide), expected)
    assert hide.calls == [0, 4, 4, 4]
    assert "on_train_batch_start" not in vars(model.pre_processor)  # which has its hook again


def test_validation_goes_on_as_before(loco_root: Path, tmp_path: Path) -> None:
    """It has the pre-processor and the network."""
    arguments = {"limit_val_batches": 1.0, "check_val_every_n_epoch": 1}
    expected = train(seeded(cache=None), loco(loco_root), tmp_path, **arguments)
    model = seeded(cache="disk")
    assert_same(train(model, loco(loco_root), tmp_path, **arguments), expected)
    assert "post_processor._image_threshold" in expected
    assert expected["post_processor._image_threshold"].isfinite()


def test_batches_say_what_they_say_without(loco_root: Path, tmp_path: Path) -> None:
    class Keep(Callback):
        def __init__(self) -> None:
            self.batches = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if trainer.current_epoch == 2:
                self.batches.append((type(batch), len(batch), batch.image_path, batch.gt_label.tolist(), batch.group))

    kept = [Keep(), Keep()]
    for cache, keep in zip((None, "ram"), kept, strict=True):
        train(seeded(cache=cache), loco(loco_root), tmp_path, keep)
    assert kept[0].batches == kept[1].batches
    assert len(kept[0].batches) == 4


def test_multi_category(tmp_path: Path, loco_root: Path) -> None:
    """Equal file names in two categories; the images of one are shuffled among those of the other."""
    for category in ("a", "b"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / category).symlink_to(loco_root / "tray")

    def data() -> MultiCategory:
        return MultiCategory(
            "MVTecLoco", tmp_path / "data", ["a", "b"], train_batch_size=4, eval_batch_size=4, num_workers=0
        )

    expected = train(seeded(cache=None), data(), tmp_path)
    model = seeded(cache="auto")
    assert_same(train(model, data(), tmp_path), expected)
    assert model.model.calls == 7


def test_waits_until_all_images_were_seen(loco_root: Path, tmp_path: Path) -> None:
    """Where each epoch leaves some out, others each time."""
    arguments = {"max_epochs": 8, "limit_train_batches": 3}
    expected = train(seeded(cache=None), loco(loco_root), tmp_path, **arguments)
    model = seeded(cache="auto")
    assert_same(train(model, loco(loco_root), tmp_path, **arguments), expected)
    assert 3 < model.model.calls < 24


class Interrupt(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.current_epoch == 1 and batch_idx == 1:
            raise RuntimeError("out of memory")


def test_resuming(loco_root: Path, tmp_path: Path) -> None:
    """From within the second epoch, after which each image has been seen again in the third."""
    ends = []
    for cache in (None, "auto"):
        results = tmp_path / str(cache)
        model = seeded(cache=cache)
        with pytest.raises(RuntimeError, match="out of memory"):
            train(model, loco(loco_root), results, Interrupt())
        assert model.feature_cache._store is None
        resume = next(results.rglob("resume.ckpt"))
        ends.append(train(seeded(cache=cache), loco(loco_root), results, ckpt_path=resume, max_epochs=5))
    assert_same(*ends)


def open_files(folder: Path) -> list[str]:
    """Those of this process, with names or without."""
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            found.append(str(descriptor.readlink()))
    return [file for file in found if file.startswith(str(folder))]


class ListFiles(Callback):
    """Lists a folder while features are kept."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.listed, self.mapped = folder, [], False

    def on_train_batch_end(self, trainer, pl_module, *_: Any) -> None:
        assert pl_module.feature_cache._store is not None
        self.listed += list(self.folder.iterdir())
        self.mapped = str(self.folder) in Path("/proc/self/maps").read_text()


def test_files_have_no_names(loco_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that neither Ctrl+C nor `kill -9` leaves any; nor do open files stay."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    watch = ListFiles(folder)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(seeded(cache="disk"), loco(loco_root), tmp_path, watch, Interrupt())
    assert watch.listed == []
    assert watch.mapped
    assert not open_files(folder)
    assert str(folder) not in Path("/proc/self/maps").read_text()


FLIP = Compose([RandomHorizontalFlip(), Resize((32, 32))])


class DrawsNumbers(MVTecLoco):
    """Its images are augmented where nobody sees it."""

    def _setup(self, stage: str | None = None) -> None:
        super()._setup(stage)
        dataset = self.train_data

        class Noisy(type(dataset)):
            def __getitem__(self, index: int) -> Any:
                item = super().__getitem__(index)
                item.image = item.image * torch.rand(())
                return item

        dataset.__class__ = Noisy


class OnDevice(MVTecLoco):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        batch.image = batch.image.flip(-1)
        return batch


def collate(items: list[Any]) -> ImageBatch:
    return GroupedImageBatch.collate(items)


def collated(root: Path) -> MVTecLoco:
    data = loco(root)
    data.external_collate_fn = collate
    return data


ASIDE: dict[str, tuple[Callable[[Path], Any], dict[str, Any], dict[str, Any]]] = {
    "the images are augmented": (lambda root: loco(root, train_augmentations=FLIP), {}, {}),
    "random numbers are drawn": (
        lambda root: DrawsNumbers(root=root, category="tray", train_batch_size=4, num_workers=0),
        {},
        {},
    ),
    "on_after_batch_transfer": (
        lambda root: OnDevice(root=root, category="tray", train_batch_size=4, num_workers=0),
        {},
        {},
    ),
    "collate_fn of its own": (collated, {}, {}),
    "not resized to one size": (loco, {"pre_processor": False}, {}),
    "it is trained": (loco, {"trained": True}, {}),
    "they take 0.00 GB, and cache_budget leaves 0.00 GB (ram) and 0.00 GB (disk)": (loco, {"cache_budget": 1e-6}, {}),
    "data loaders are reloaded": (loco, {}, {"reload_dataloaders_every_n_epochs": 1}),
}


@pytest.mark.parametrize("reason", ASIDE)
def test_steps_aside(loco_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, reason: str) -> None:
    """With one line, and the results of a training without."""
    data, model, trainer = ASIDE[reason]
    expected = train(seeded(cache=None, **model), data(loco_root), tmp_path, **trainer)
    assert "frozen" not in caplog.text
    caplog.set_level("INFO")
    cached = seeded(cache="auto", **model)
    assert_same(train(cached, data(loco_root), tmp_path, **trainer), expected)
    lines = [record.message for record in caplog.records if record.name == "anomalib_pack.feature_cache"]
    assert len(lines) == 1
    assert reason in lines[0]
    assert cached.model.calls == 12


def test_images_that_do_not_change_are_no_augmentation(loco_root: Path, tmp_path: Path) -> None:
    model = seeded()
    train(model, loco(loco_root, train_augmentations=CenterCrop(40)), tmp_path)
    assert model.model.calls == 4


def test_one_epoch_keeps_nothing(loco_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    train(seeded(), loco(loco_root), tmp_path, max_epochs=1)
    assert "features" not in caplog.text


@pytest.mark.parametrize(("argument", "value"), [("cache", "memory"), ("cache_budget", 0)])
def test_impossible_values(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{argument} must be .*got {value!r}"):
        Cached(**{argument: value})


def test_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of what is free, or the budget, in each place."""
    monkeypatch.setattr(feature_store, "free_memory", lambda: 4 * GB)
    monkeypatch.setattr(feature_store.shutil, "disk_usage", lambda _: type("", (), {"free": 20 * GB}))
    both = ("ram", "disk")
    assert choose_place(both, 2 * GB, None) == "ram"
    assert choose_place(both, 2 * GB + 1, None) == "disk"
    assert choose_place(both, 10 * GB + 1, None) is None
    assert choose_place(("disk",), 1, None) == "disk"
    assert choose_place(both, 3 * GB, 3.0) == "ram"
    assert choose_place(both, 3 * GB + 1, 3.0) is None


@pytest.mark.parametrize(("limit", "free"), [("max", 3_000_320), ("5000000", 1_500_000), ("9000000", 3_000_320)])
def test_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, free: int) -> None:
    """What the machine has available, or what a container's limit leaves: files in its cache can be dropped."""
    for name, text in {"max": limit, "current": "4000000", "stat": "anon 7\ninactive_file 500000\nfile 9"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   2930 kB\n")
    monkeypatch.setattr(feature_store, "CGROUP", tmp_path)
    monkeypatch.setattr(feature_store, "MEMINFO", tmp_path / "meminfo")
    assert feature_store.free_memory() == free


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layout_is_kept(dtype: torch.dtype) -> None:
    """Also that of channels-last tensors, for which other kernels run."""
    tensors = [
        torch.randn(5, 3, 4, 6).to(dtype),
        torch.randn(5, 3, 4, 6).to(dtype, memory_format=torch.channels_last),
        torch.randn(5, 7, 2).to(dtype).transpose(1, 2),
        torch.randn(5).to(dtype),
    ]
    sizes = FeatureStore.sizes(5, tensors)
    store = FeatureStore("abcde", tensors, [torch.zeros(size, dtype=torch.uint8) for size in sizes])
    store.write("ca", [tensor[[2, 0]] for tensor in tensors])
    assert not store.complete
    store.write("bed", [tensor[[1, 4, 3]] for tensor in tensors])
    assert store.complete
    for tensor, read in zip(tensors, store.read("abcde", torch.device("cpu")), strict=True):
        assert torch.equal(read, tensor)
        assert read.stride() == tensor.stride()


def test_two_processes_share_one_store(loco_root: Path, tmp_path: Path) -> None:
    """Each computes half of the features, and later needs those of the other."""
    command = [sys.executable, str(HERE / "feature_cache_ddp_run.py"), str(loco_root), str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    results = {path.stem: torch.load(path) for path in tmp_path.glob("*.pt")}
    for rank in range(2):
        assert results[f"None_{rank}"].pop("calls") == 12
        for cache in ("ram", "disk"):
            assert results[f"{cache}_{rank}"].pop("calls") == 4
            assert_same(results[f"{cache}_{rank}"], results[f"None_{rank}"])


@pytest.mark.parametrize("name", ["MiniMaxAd", "Ulsad", "Uniad"])
def test_models(name: str, small_root: Path, tmp_path: Path) -> None:
    """Equal to the last bit; Uniad draws numbers for its jitter and its dropout."""
    states = []
    for cache in (None, "auto"):
        seed_everything(0, workers=True)
        model = getattr(anomalib.models, name)(**CASES[name].arguments, cache=cache)
        network = model.model.encoder if name == "MiniMaxAd" else model.model.backbone
        calls = Count()
        network.register_forward_hook(calls)
        data = loco(small_root, train_batch_size=3)
        states.append(train(model, data, tmp_path, calls, max_epochs=2, limit_val_batches=1))
        assert calls.in_training[-1] == (2 if cache is None else 0)
    assert_same(*states)


class Count(Callback):
    """Counts the calls of a network in the training steps of each epoch."""

    def __init__(self) -> None:
        self.in_training: list[int] = []
        self._training = False

    def __call__(self, *_: Any) -> None:
        if self._training:
            self.in_training[-1] += 1

    def on_train_epoch_start(self, *_: Any) -> None:
        self.in_training.append(0)

    def on_train_batch_start(self, *_: Any) -> None:
        self._training = True

    def on_train_batch_end(self, *_: Any) -> None:
        self._training = False


@pytest.fixture(scope="module")
def small_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from anomalib_pack.data import SyntheticLoco

    root = tmp_path_factory.mktemp("small")
    SyntheticLoco(root=root, image_size=64, num_train=6, num_val=1, num_test=1).prepare_data()
    return root
