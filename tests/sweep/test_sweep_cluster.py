"""Jobs of a sweep on a cluster."""

import os
import pickle
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from types import SimpleNamespace

import pytest
from light_job import write_and_sum
from sweep_runs import TINY, adjustable, sweep
from waiting import TIMEOUT, wait_until

from anomalib_pack import on_node
from anomalib_pack.on_node import Parcel, run_parcel
from anomalib_pack.sweep.cluster import RayRunner, prepared, resources_of
from anomalib_pack.sweep.results import read_rows
from anomalib_pack.sweep.settings import read_plan


def is_alive(process: int) -> bool:
    try:
        return bool(Path(f"/proc/{process}/cmdline").read_bytes())  # empty where it has ended and nobody has asked how
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
def test_a_node_dies(tmp_path: Path, tray, monkeypatch, capfd) -> None:
    """Its job runs anew on another node; every job is in the results once, with its log, whether it succeeds or not."""
    cluster_utils = pytest.importorskip("ray.cluster_utils", reason="Ray is not installed")
    marks = tmp_path / "marks"
    marks.mkdir()
    model = {"class_path": "sweep_models.Waiting", "init_args": {"folder": str(marks)}, "seeds": [0, 1]}
    config = {
        "models": [model, adjustable("Unbuilt", fail="build")],
        "data": [tray],
        "trainer": {"max_epochs": 1, "enable_progress_bar": False},
    }
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))  # of Ray's token
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    killed = []
    with TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:  # a path of a socket has to be short
        monkeypatch.setenv("RAY_TMPDIR", folder)
        node = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 80 * 2**20}
        cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=node)
        second = cluster.add_node(**node)

        def kill_in_the_middle() -> None:
            try:
                wait_until(lambda: len(list(marks.iterdir())) == 2)  # each node has a job
                first = [int(mark.name) for mark in marks.iterdir()]
                cluster.remove_node(second, allow_graceful=False)
                wait_until(lambda: sum(map(is_alive, first)) == 1)
                killed.extend(process for process in first if not is_alive(process))
            finally:
                (marks / "go").touch()  # else the jobs would wait forever

        thread = Thread(target=kill_in_the_middle)
        thread.start()
        try:
            status, results, rows = sweep(tmp_path, config, "--runner", "ray", "--ray.address", cluster.address)
        finally:
            (marks / "go").touch()
            thread.join()
            cluster.shutdown()
    assert status == 1  # of the job that fails
    assert len(killed) == 1
    assert len(list(marks.iterdir())) == 4  # go, and the two jobs, one of which began twice
    assert len(read_rows(results / "results.csv")) == 3
    assert rows["Unbuilt", "", 0]["error"] == "ValueError: cannot be built"
    for seed in (0, 1):
        row = rows["Waiting", "", seed]
        assert row["error"] == ""
        assert float(row["image_AUROC"]) >= 0
        assert (results / "predictions" / row["job"] / "test_predictions.csv").is_file()
        assert (row["host"], row["threads"], row["torch"]) == (os.uname().nodename, "1", version("torch"))
    for row in rows.values():
        log = (results / "logs" / f"{row['job']}.log").read_text()
        assert ("Traceback" in log) == bool(row["error"])
    assert "[3/3] Waiting, MVTecLoco, seed 1: done on" in capfd.readouterr().out


@pytest.fixture
def experiment(tray):
    config = {"models": [TINY | {"resources": {"num_cpus": 3, "num_gpus": 0.25}}], "data": [tray]}
    return read_plan(config).experiments[0]


def test_a_job_runs_where_the_sweep_was_started(tmp_path: Path, monkeypatch) -> None:
    """In its folder, with its modules and threads, in a process whose crash is an error of this job."""
    monkeypatch.chdir("/")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setattr(sys, "path", sys.path.copy())
    here = str(tmp_path)
    parcel = Parcel(pickle.dumps((write_and_sum, [1, 2])), "logs/a.log", here, [here], ["."], threads=2)
    files = {"logs/a.log": b"started\n", "where": f"{here} 2".encode()}
    assert run_parcel(parcel) == ({"sum": 3}, files)
    assert sys.path[-1] == here
    results, written = run_parcel(replace(parcel, job=pickle.dumps((write_and_sum, [None]))))
    assert "crashed" in results["error"]
    assert written == files
    monkeypatch.setattr(on_node.socket, "gethostname", lambda: "gpu7")
    for lacking in (replace(parcel, files=["data/mvtec"]), replace(parcel, folder=f"{here}/data/mvtec")):
        results, written = run_parcel(lacking)
        assert results["host"] == "gpu7"
        assert f"{here}/data/mvtec cannot be read on the node gpu7" in results["error"]
        assert list(written) == ["logs/a.log"]


def test_a_node_imports_little() -> None:
    """The worker of Ray waits for the job, and need not hold a second copy of PyTorch."""
    code = "import sys, anomalib_pack.on_node; sys.exit('torch' in sys.modules or 'anomalib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=TIMEOUT, check=False).returncode == 0


def test_resources(experiment) -> None:
    """Those of the model; a job on a CPU needs no GPU. They are no part of what is computed."""
    assert resources_of(experiment) == {"num_cpus": 3, "num_gpus": 0}
    on_gpu = replace(experiment, accelerator="cuda")
    assert resources_of(on_gpu) == {"num_cpus": 3, "num_gpus": 0.25}
    assert resources_of(replace(on_gpu, resources={})) == {"num_cpus": 1, "num_gpus": 1}
    assert replace(experiment, resources={}).key == experiment.key


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        ({"gpus": 1}, "resources has the unknown key gpus; allowed are num_cpus, num_gpus, memory"),
        ({"num_gpus": 2}, r"resources.num_gpus must be in \(0, 1\], got 2"),
        ({"num_cpus": 0.5}, "resources.num_cpus must be a whole number of at least 1, got 0.5"),
        ({"memory": "8e9"}, "resources.memory must be a number of bytes above 0, got '8e9'"),
    ],
)
def test_wrong_resources(tray, resources, message) -> None:
    with pytest.raises(ValueError, match=message):
        read_plan({"models": [TINY | {"resources": resources}], "data": [tray]})


def test_nodes_that_are_too_small(experiment) -> None:
    """A job that would wait forever is named before anything runs."""

    def runner(*nodes: dict) -> RayRunner:
        found = [{"Alive": True, "NodeManagerHostname": "a", "Resources": node} for node in nodes]
        dead = {"Alive": False, "NodeManagerHostname": "b", "Resources": {"CPU": 99, "GPU": 99}}
        made = object.__new__(RayRunner)
        made.ray = SimpleNamespace(nodes=lambda: [*found, dead])
        return made

    runner({"CPU": 2.0}, {"CPU": 4.0}).check([experiment])
    assert runner({"CPU": 4.0}).accelerator == "cpu"
    assert runner({"CPU": 4.0}, {"GPU": 1.0}).accelerator == "cuda"
    message = "model TinyModel needs CPU 3, GPU 0.25, which no node has: a CPU 4, GPU 0, memory 8; a CPU 2, GPU 1"
    with pytest.raises(ValueError, match=message):
        runner({"CPU": 4.0, "memory": 8}, {"CPU": 2.0, "GPU": 1.0}).check([replace(experiment, accelerator="cuda")])


def test_data_are_made_once_where_the_sweep_was_started(tmp_path: Path) -> None:
    """The nodes find them there; what cannot be made is an error of its jobs."""
    data = {"class_path": "SyntheticLoco", "init_args": {"image_size": 64, "num_train": 1, "num_val": 1, "num_test": 1}}
    data["init_args"]["root"] = str(tmp_path / "made")
    (weights := tmp_path / "weights.pt").touch()
    model = adjustable(fail=str(weights), trainer={"max_epochs": 1})
    (experiment,) = read_plan({"models": [model], "data": [data]}).experiments
    known = {}
    files = prepared(experiment, known)
    assert set(files) == {str(tmp_path / "made"), str(weights)}
    assert (tmp_path / "made" / "tray").is_dir()
    assert list(known.values()) == [[str(tmp_path / "made")] * 2]
    data["init_args"]["num_train"] = 2  # the folder holds another rendering
    (experiment,) = read_plan({"models": [model], "data": [data]}).experiments
    assert "ValueError" in prepared(experiment, known)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--runner", "ray"], "runner ray needs Ray: pip install 'anomalib-pack[ray]'"),
        (["--ray.address", "auto"], "ray.address needs --runner ray"),
        (["--keep", "pictures,maps"], "keep must be pictures, checkpoints, or both with a comma between them"),
    ],
)
def test_wrong_options(here: Path, tray, capsys, monkeypatch, options, message) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it was not installed
    (here / "runs" / "sweep" / "none").mkdir(parents=True)
    status, _, rows = sweep(here, {"models": [TINY], "data": [tray]}, *options)
    assert status == 2
    assert message in capsys.readouterr().err
    assert not rows
