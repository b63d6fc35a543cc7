"""Nearest neighbours: exact against brute force in float64, approximate with a recall, and an index that never lies."""

import copy
import importlib.util
import io
import pickle
import sys

import faiss
import numpy as np
import pytest
import torch

from anomalib_pack import neighbors as module
from anomalib_pack.neighbors import NearestNeighbors, faiss_serves, nearest_in_groups, nearest_in_parts
from anomalib_pack.packing import linear as packed_linear
from anomalib_pack.packing import packs, unpacked

SEARCHES = ("auto", "faiss", "torch")
APPROXIMATE = ("pq", "ivf", "hnsw")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clusters(count: int, seed: int = 0) -> torch.Tensor:
    """Points around 40 centres: patch features are far from uniform."""
    centers = 5 * random(40, 16, seed=99)
    return centers[torch.arange(count) % 40] + 0.5 * random(count, 16, seed=seed)


def search_in(bank: torch.Tensor, search: str = "torch", index: str = "flat") -> NearestNeighbors:
    found = NearestNeighbors(search, index)
    found.bank = bank
    return found


def brute_force(queries: torch.Tensor, bank: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Distances and indices, one query after the other."""
    entries, rows = bank.double().numpy(), []
    for query in queries.double().numpy():
        distances = np.linalg.norm(entries - query, axis=1)
        order = distances.argsort(kind="stable")[:k]
        rows.append((distances[order], order))
    return tuple(np.array(part) for part in zip(*rows, strict=True))


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize(
    ("queries", "table", "rows"), [(1, 2**24, 4096), (101, 2**24, 4096), (101, 700, 10), (64, 1, 64)]
)
def test_exact_search(
    search: str, k: int, queries: int, table: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one part, in parts with a short last one, and one query at a time."""
    monkeypatch.setattr(module, "TABLE", table)
    monkeypatch.setattr(module, "PART", table)
    monkeypatch.setattr(module, "ROWS", rows)
    asked, bank = random(queries, 12), random(300, 12, seed=1)
    distances, indices = search_in(bank, search)(asked, k)
    expected_distances, expected_indices = brute_force(asked, bank, k)
    np.testing.assert_array_equal(indices.numpy(), expected_indices)
    np.testing.assert_allclose(distances.double().numpy(), expected_distances, rtol=1e-6)


def test_table_of_distances_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while the recall is measured."""
    monkeypatch.setattr(module, "TABLE", 1000)
    parts = []
    addmm = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *tensors, **scales: parts.append(addmm(*tensors, **scales)) or parts[-1])
    found = search_in(random(200, 4, seed=1))
    with unpacked():
        found(random(33, 4))
        found.recall(random(33, 4))
    assert [len(part) for part in parts] == 2 * [*(6 * [5]), 3] + [*(6 * [5]), 3]
    assert max(part.numel() for part in parts) <= 1000


needs_packing = pytest.mark.skipif(not packs(torch.rand(2, 3)), reason="needs oneDNN on an x86 processor")


@needs_packing
@pytest.mark.parametrize(("part", "group"), [(1, 4), (700, 4), (2**22, 4), (2**22, 64), (2**22, 100)])
@pytest.mark.parametrize("k", [1, 3, 150])
def test_packed_queries(part: int, group: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounded tables, parts that are whole groups and a shorter last one, and more neighbours than a part has."""
    sizes = []

    def linear(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        sizes.append((len(rows), len(weight)))
        return packed_linear(rows, weight)

    monkeypatch.setattr(module, "linear", linear)
    for name, value in {"PART": part, "GROUP": group, "ROWS": 40}.items():
        monkeypatch.setattr(module, name, value)
    asked, bank = random(70, 12), random(300, 12, seed=1)
    expected_distances, expected_indices = brute_force(asked, bank, k)
    for entries in (bank, bank.T.contiguous().T):  # in any layout
        distances, indices = search_in(entries)(asked, k)
        np.testing.assert_array_equal(indices.numpy(), expected_indices)
        np.testing.assert_allclose(distances.double().numpy(), expected_distances, rtol=1e-6)
    assert {columns for _, columns in sizes} == {40, 30}
    assert max(rows * columns for rows, columns in sizes) <= max(part, 40 * group)
    assert len(sizes) > 4 or part == 2**22


@pytest.mark.parametrize("entries", [1, 5, 63, 64, 65, 128, 300])
@pytest.mark.parametrize("copies", [1, 3])
def test_first_of_equally_near_entries(entries: int, copies: int) -> None:
    """Whole numbers are compared without rounding."""
    bank = (2 * random(entries, 6)).round()
    asked, bank = (2 * random(90, 6, seed=1)).round(), bank.repeat(copies, 1)
    squares = (asked[:, None] - bank).square().sum(dim=2).numpy()
    expected = squares.argmin(axis=1)[:, None]  # the first
    assert copies == 1 or (squares == squares.min(axis=1, keepdims=True)).sum() >= copies * 90
    with unpacked():
        np.testing.assert_array_equal(nearest_in_parts(asked, bank, 1).numpy(), expected)
    np.testing.assert_array_equal(nearest_in_parts(asked, bank, 1).numpy(), expected)
    np.testing.assert_array_equal(nearest_in_groups(asked, bank).numpy(), expected)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("offset", [0.0, 1e-6, 1e-4])
def test_distances_near_zero(search: str, offset: float) -> None:
    """|q|^2 - 2 q b + |b|^2 would be wrong by 1e-3 here: all entries have a length of about 10."""
    bank = random(200, 100)
    step = torch.zeros(100)
    step[:4] = offset / 2  # of length offset
    queries = bank[::7] + step
    distances, indices = search_in(bank, search)(queries)
    assert indices[:, 0].tolist() == list(range(0, 200, 7))
    expected = (queries.double() - bank[::7].double()).norm(dim=1)  # what float32 made of it
    np.testing.assert_allclose(distances[:, 0].double().numpy(), expected.numpy(), rtol=1e-5, atol=1e-12)


def test_half_precision_bank() -> None:
    bank = random(50, 8).half()
    distances, indices = search_in(bank)(random(9, 8, seed=1).half())
    expected_distances, expected_indices = brute_force(random(9, 8, seed=1).half(), bank, 1)
    np.testing.assert_array_equal(indices.numpy(), expected_indices)
    np.testing.assert_allclose(distances.double().numpy(), expected_distances, rtol=1e-5)


@pytest.mark.parametrize(
    ("search", "index"),
    [("torch", "flat"), ("auto", "flat"), ("auto", "auto"), ("auto", "pq"), ("auto", "ivf"), ("faiss", "hnsw")],
)
@pytest.mark.parametrize("k", [1, 5])
def test_export_searches_exactly_in_plain_tensors(
    search: str, index: str, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever searches here, and for any number of queries."""
    monkeypatch.setattr(module, "LARGE", 60)  # "auto" is approximate
    monkeypatch.setattr(module, "CANDIDATES", 20)

    class Fixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.neighbors = search_in(random(60, 6), search, index)

        def forward(self, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.neighbors(queries, k)

    sizes = {0: torch.export.Dim("queries", min=2)}
    program = torch.export.export(Fixed(), (random(7, 6, seed=1),), dynamic_shapes=(sizes,))
    assert all("faiss" not in str(node.target) for node in program.graph.nodes)
    asked = random(31, 6, seed=2)
    distances, indices = program.module()(asked)
    expected_distances, expected_indices = search_in(random(60, 6))(asked, k)
    torch.testing.assert_close(distances, expected_distances)
    assert torch.equal(indices, expected_indices)


@pytest.mark.parametrize("search", SEARCHES)
def test_recall_of_the_exact_search(search: str) -> None:
    assert search_in(clusters(500), search).recall(clusters(200, seed=1)) == 1


@pytest.mark.parametrize("index", APPROXIMATE)
@pytest.mark.parametrize("k", [1, 5])
def test_approximate_search(index: str, k: int) -> None:
    """Most neighbours are the nearest; what is said of each is true of it; the recall is what brute force says."""
    asked, bank = clusters(400, seed=1), clusters(3000)
    found = search_in(bank, "auto", index)
    distances, indices = found(asked, k)
    own = np.linalg.norm(asked.double().numpy()[:, None] - bank.double().numpy()[indices.numpy()], axis=2)
    np.testing.assert_allclose(distances.double().numpy(), own, rtol=1e-5)
    assert (indices.sort(dim=1).values.diff(dim=1) > 0).all()  # none twice

    expected, _ = brute_force(asked, bank, k)
    share = (distances.double().numpy() <= expected * (1 + 1e-5)).mean()
    assert share > 0.95
    if k == 1:
        assert found.recall(asked) == pytest.approx(share)


def test_recall_that_is_low(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uniform points in many dimensions and one probed cell: the recall says that this is a bad index."""
    monkeypatch.setattr(module, "PROBED", 10**6)
    found = search_in(random(3000, 64), "auto", "ivf")
    asked = random(300, 64, seed=1)
    distances, _ = found(asked)
    expected, _ = brute_force(asked, search_in(random(3000, 64)).bank, 1)
    share = (distances.double().numpy() <= expected * (1 + 1e-5)).mean()
    assert share < 0.8
    assert found.recall(asked) == pytest.approx(share)


@pytest.mark.parametrize("index", APPROXIMATE)
@pytest.mark.parametrize("entries", [1, 2, 30])
def test_small_banks(index: str, entries: int) -> None:
    """The probed cells may hold fewer entries than are asked for; FAISS then answers -1, which is no entry."""
    bank, asked = random(entries, 5), random(40, 5, seed=1)
    distances, indices = search_in(bank, "auto", index)(asked, entries)
    expected_distances, expected_indices = brute_force(asked, bank, entries)
    np.testing.assert_array_equal(indices.numpy(), expected_indices)
    np.testing.assert_allclose(distances.double().numpy(), expected_distances, rtol=1e-5)


@pytest.mark.parametrize("dimension", [3, 8, 13, 64])
@pytest.mark.parametrize("k", [1, 4])
def test_candidates_of_codes_are_compared_exactly(dimension: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all entries but one as candidates nothing is missed, however rough the codes are; any length of features."""
    monkeypatch.setattr(module, "CANDIDATES", 299)
    monkeypatch.setattr(module, "ROWS", 30)
    asked, bank = random(70, dimension), random(300, dimension, seed=1)
    found = search_in(bank, "auto", "pq")
    distances, indices = found(asked, k)
    assert found._built is not None
    expected_distances, expected_indices = brute_force(asked, bank, k)
    np.testing.assert_array_equal(indices.numpy(), expected_indices)
    np.testing.assert_allclose(distances.double().numpy(), expected_distances, rtol=1e-5)


def test_codes_need_the_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them find more: far more than codes alone, which are too rough for points without structure."""
    asked, bank = random(300, 64, seed=1), random(3000, 64)
    recalls = []
    for count in (1, 16, 512):
        monkeypatch.setattr(module, "CANDIDATES", count)
        monkeypatch.setattr(module, "CANDIDATES_EACH", 1)
        recalls.append(search_in(bank, "auto", "pq").recall(asked))
    assert recalls[0] < 0.2 < 0.4 < recalls[1] < 0.8 < 0.95 < recalls[2]


def test_codes_do_not_depend_on_threads_or_batches() -> None:
    asked, bank = clusters(200, seed=1), clusters(3000)
    expected = search_in(bank, "auto", "pq")(asked, 3)
    found, threads = search_in(bank, "auto", "pq"), faiss.omp_get_max_threads()
    try:
        faiss.omp_set_num_threads(3 - min(threads, 2))
        parts = [found(rows, 3) for rows in asked.split([1, 2, 17, 180])]
    finally:
        faiss.omp_set_num_threads(threads)
    for ours, parted in zip(expected, zip(*parts, strict=True), strict=True):
        assert torch.equal(ours, torch.cat(parted))


def test_auto_is_exact_for_small_banks_and_where_faiss_is_not_to_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fixed rule, that of docs/search.md."""
    large = clusters(module.LARGE)
    asked = clusters(50, seed=1)
    assert module.LARGE == 10_000
    for search, bank, kind in (
        ("auto", large, "pq"),
        ("faiss", large, "pq"),
        ("torch", large, "flat"),
        ("auto", large[1:], "flat"),
        ("auto", large.to("meta"), "flat"),  # any device but the CPU
    ):
        found = search_in(bank, search, "auto")
        assert found.kind == kind
        if bank.device.type == "cpu":
            torch.testing.assert_close(found(asked), search_in(bank, search, kind)(asked))
            assert (found._built is not None) == (kind == "pq")
    monkeypatch.setattr(module, "find_spec", lambda _name: None)
    assert search_in(large, "auto", "auto").kind == "flat"
    assert search_in(large, "auto", "ivf").kind == "ivf"


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the banks that an index is built of."""
    monkeypatch.setattr(module, "CANDIDATES", 20)  # fewer than the entries, so that codes are needed
    counted = []
    build = module.build_index
    monkeypatch.setattr(module, "build_index", lambda bank, kind: counted.append(len(bank)) or build(bank, kind))
    return counted


@pytest.mark.parametrize("index", APPROXIMATE)
def test_index_is_never_stale(index: str, builds: list[int]) -> None:
    """Built when it is first needed, once for a bank, again whenever the bank has changed in any way."""
    found = search_in(random(50, 4), "auto", index)
    assert builds == []

    def check(times: int) -> None:
        for queries in (found.bank[:5], found.bank[5:11]):
            distances, indices = found(queries)
            np.testing.assert_allclose(distances.numpy(), 0, atol=1e-6)
            assert indices.shape == (len(queries), 1)
        assert len(builds) == times

    check(1)
    found.bank = random(60, 4, seed=1)  # another tensor
    check(2)
    found.bank.add_(100)  # the same one, in place
    check(3)
    found.load_state_dict({"bank": random(70, 4, seed=2)})  # of another size
    check(4)
    found.load_state_dict({"bank": random(70, 4, seed=3)})
    check(5)
    found.double()
    check(6)
    assert builds == [50, 60, 60, 70, 70, 70]


@pytest.mark.parametrize("index", APPROXIMATE)
def test_index_stays_out_of_files_and_copies(index: str, builds: list[int]) -> None:
    found = search_in(clusters(200), "auto", index)
    asked = clusters(20, seed=1)
    expected = found(asked)
    file = io.BytesIO()
    torch.save(found.state_dict(), file)
    assert list(found.state_dict()) == ["bank"]
    assert file.tell() < found.bank.nbytes + 2000
    pickled = pickle.dumps(found)
    assert len(pickled) < found.bank.nbytes + 5000
    for other in (pickle.loads(pickled), copy.deepcopy(found)):
        assert other._built is None
        torch.testing.assert_close(other(asked), expected)
    restored = NearestNeighbors("auto", index)
    restored.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    torch.testing.assert_close(restored(asked), expected)
    assert builds == 4 * [200]


def test_exact_search_has_no_index() -> None:
    for search in SEARCHES:
        found = search_in(random(20, 4), search)
        found(random(3, 4))
        assert found._built is None


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"search": "annoy"}, r"search .*faiss.*annoy"),
        ({"index": "lsh"}, r"index .*ivf.*lsh"),
        ({"search": "torch", "index": "hnsw"}, r"index .*flat.*search='torch'.*hnsw"),
    ],
)
def test_impossible_arguments(arguments: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        NearestNeighbors(**arguments)


@pytest.mark.parametrize(("search", "index"), [("torch", "flat"), ("faiss", "flat"), ("auto", "ivf")])
@pytest.mark.parametrize("k", [0, 4])
def test_more_neighbours_than_entries(search: str, index: str, k: int) -> None:
    found = search_in(random(3, 4), search, index)
    with pytest.raises(ValueError, match=f"k .*3, got {k}"):
        found(random(2, 4), k)


def test_empty_bank() -> None:
    with pytest.raises(ValueError, match="entries of the bank, 0"):
        NearestNeighbors("torch")(random(2, 4))


@pytest.fixture
def no_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if FAISS were not installed."""
    find_spec = importlib.util.find_spec
    monkeypatch.setitem(sys.modules, "faiss", None)  # makes `import faiss` fail
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "faiss" else find_spec(name))


@pytest.mark.usefixtures("no_faiss")
@pytest.mark.parametrize(
    "arguments", [{"search": "faiss"}, {"index": "pq"}, {"index": "ivf"}, {"index": "hnsw"}], ids=str
)
def test_without_faiss(arguments: dict) -> None:
    """Said when the model is built, with what to install and what to do without."""
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'anomalib-pack\[cpu\]'.*search='torch'") as failure:
        NearestNeighbors(**arguments)
    assert failure.value.name == "faiss"


@pytest.mark.usefixtures("no_faiss")
@pytest.mark.parametrize("search", ["auto", "torch"])
def test_search_without_faiss(search: str) -> None:
    assert not faiss_serves(torch.device("cpu"))
    bank = random(30, 4)
    distances, indices = search_in(bank, search, "auto")(bank)
    assert indices[:, 0].tolist() == list(range(30))
    assert not distances.any()


def test_auto_uses_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fixed rule, that of docs/search.md: but for many queries on x86 CPUs, in float32."""

    def refuse(*_arguments) -> None:
        raise AssertionError

    monkeypatch.setattr(module, "nearest_in_parts", refuse)
    bank, few, many = random(50, 4), random(31, 4), random(32, 4)
    search_in(bank, "auto")(few)
    with torch.autocast("cpu"):
        search_in(bank, "auto")(many)
    with pytest.raises(AssertionError):
        search_in(bank, "torch")(few)
    if packs(bank):
        with pytest.raises(AssertionError):
            search_in(bank, "auto")(many)
        with unpacked(), pytest.raises(AssertionError):  # the same search is counted
            search_in(bank, "auto")(many)
    monkeypatch.setattr("anomalib_pack.packing.PROCESSORS", ())
    search_in(bank, "auto")(many)


@needs_packing
def test_gradients_of_distances() -> None:
    """Of the distances from what was found; the search itself has none."""
    asked, bank = random(40, 4).requires_grad_(), random(50, 4, seed=1)
    distances, indices = search_in(bank)(asked)
    distances.sum().backward()
    expected = (asked.detach() - bank[indices[:, 0]]) / distances.detach()
    torch.testing.assert_close(asked.grad, expected)


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize(
    ("search", "index"),
    [("auto", "flat"), ("auto", "auto"), ("torch", "flat"), ("auto", "pq"), ("auto", "ivf"), ("auto", "hnsw")],
)
def test_cuda_agrees_with_the_cpu(search: str, index: str) -> None:
    asked, bank = clusters(400, seed=1), clusters(3000)
    expected_distances, expected_indices = search_in(bank, search, index)(asked, 5)
    distances, indices = search_in(bank, search, index).cuda()(asked.cuda(), 5)
    assert distances.is_cuda
    assert indices.is_cuda
    torch.testing.assert_close(distances.cpu(), expected_distances, atol=1e-4, rtol=1e-4)
    assert (indices.cpu() == expected_indices).float().mean() > 0.99


@pytest.mark.gpu
@gpu
def test_faiss_on_a_gpu() -> None:
    """With FAISS for GPUs it searches there; with the one for CPUs it says what to install."""
    found = search_in(clusters(300), "faiss").cuda()
    asked = clusters(20, seed=1).cuda()
    if faiss_serves(asked.device):
        torch.testing.assert_close(found(asked), search_in(clusters(300)).cuda()(asked))
    else:
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'anomalib-pack\[gpu\]'"):
            found(asked)
