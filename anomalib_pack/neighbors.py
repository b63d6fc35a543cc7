"""Nearest neighbours in a memory bank: exact or approximate, with FAISS on the CPU or the GPU, or in PyTorch."""

from __future__ import annotations

import logging
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn.functional import pad

from .checks import require
from .packing import FEW, linear, pack_matrix, packable, pays

logger = logging.getLogger(__name__)

SEARCHES = ("auto", "faiss", "torch")
INDICES = ("auto", "flat", "pq", "ivf", "hnsw")
LARGE = 10_000  # entries from which "auto" is approximate on a CPU; ours, see docs/search.md
TABLE = 2**24  # distances held at a time: 64 MiB
PART = 2**22  # the same by oneDNN: 16 MiB, which a processor's cache holds
GROUP = 64  # entries of which the nearest is known before it is known which of them it is
ROWS = 4096  # queries that are packed, or whose neighbours are gathered, at a time
WIDTH = 4  # PQ: values that share a code of 4 bits; ours, see docs/search.md
CANDIDATES = 128  # PQ: entries that are compared exactly; ours, see docs/search.md
CANDIDATES_EACH = 16  # PQ: at least so many for each neighbour
LINKS = 32  # HNSW: neighbours of a node; FAISS's default
BEAM = 64  # HNSW: candidates kept while searching; ours, see docs/search.md
PROBED = 16  # IVF: one in so many cells is searched; ours, see docs/search.md


class NearestNeighbors(nn.Module):
    """A memory bank and the search for the Euclidean nearest neighbours in it.

    The bank is a buffer, so checkpoints hold it and nothing else: an approximate index is built from it when it is
    first needed, again whenever the bank has changed, and is never pickled. The exact search has no index and makes
    no copy of the bank. Distances are computed from the neighbours that were found, which is accurate also near zero.
    An exported program has the exact search in plain tensor operations.

    Args:
        search: ``"faiss"``, ``"torch"``, or ``"auto"``: FAISS where it is installed for the bank's device, but for
            exact searches on x86 CPUs for 32 queries or more, which are faster in PyTorch.
        index: ``"flat"`` (exact), ``"pq"`` (product quantiser whose best candidates are compared exactly), ``"ivf"``
            (inverted file) or ``"hnsw"`` (graph), the last three with FAISS and approximate, see :meth:`recall`.
            ``"auto"``: ``"pq"`` for banks of 10 000 entries or more on a CPU where FAISS may be used, else ``"flat"``.

    Raises:
        ValueError: If a value is impossible; the message names the argument.
        ModuleNotFoundError: If FAISS is needed and not installed.

    Example:
        >>> neighbors = NearestNeighbors("torch")
        >>> neighbors.bank = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
        >>> distances, indices = neighbors(torch.tensor([[0.0, 1.0], [3.0, 2.0]]))
        >>> distances.tolist(), indices.tolist()
        ([[1.0], [2.0]], [[0], [1]])
    """

    bank: torch.Tensor

    def __init__(
        self,
        search: Literal["auto", "faiss", "torch"] = "auto",
        index: Literal["auto", "flat", "pq", "ivf", "hnsw"] = "auto",
    ) -> None:
        super().__init__()
        require("search", search, search in SEARCHES, f"one of {SEARCHES}")
        require("index", index, index in INDICES, f"one of {INDICES}")
        exact = index in ("auto", "flat")  # or can be
        require("index", index, exact or search != "torch", "'flat' or 'auto' with search='torch'")
        if search == "faiss" or not exact:
            import_faiss()
        self.search = search
        self.index = index
        self.register_buffer("bank", torch.empty(0, 0))
        self._built: tuple[torch.Tensor, int, Any] | None = None  # the bank, its version, the index made of it

    @property
    def kind(self) -> str:
        """The index in use: ``index``, or what ``"auto"`` means for this bank, on its device."""
        if self.index != "auto":
            return self.index
        on_cpu = self.search != "torch" and self.bank.device.type == "cpu" and faiss_serves(self.bank.device)
        return "pq" if on_cpu and len(self.bank) >= LARGE else "flat"

    def forward(self, queries: torch.Tensor, k: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """Find the nearest entries of the bank.

        Args:
            queries: (Q, D), on the bank's device.
            k: Number of neighbours, at most the bank's entries.

        Returns:
            Euclidean distances (Q, k), the smallest first, and the entries' indices (Q, k).

        Raises:
            ValueError: If the bank has fewer than ``k`` entries.
        """
        entries = len(self.bank)
        require("k", k, 1 <= k <= entries, f"at least 1 and at most the number of entries of the bank, {entries}")
        bank, queries = self.bank.float(), queries.float()
        if torch.compiler.is_exporting():
            if k == 1:
                bank = whole_groups(bank)  # here, so that a file holds this one alone
                indices = nearest_in_groups(queries, bank).clamp(max=entries - 1)
            else:
                indices = nearest_in_torch(queries, bank, k)
            return torch.linalg.vector_norm(queries.unsqueeze(1) - bank[indices], dim=2), indices
        indices = self._indices(queries.contiguous(), bank, k)
        distances = [
            torch.linalg.vector_norm(rows.unsqueeze(1) - bank[found], dim=2)
            for rows, found in zip(queries.split(ROWS), indices.split(ROWS), strict=True)
        ]
        return torch.cat(distances), indices

    @torch.no_grad()
    def recall(self, queries: torch.Tensor) -> float:
        """Share of queries (Q, D) for which the index finds an entry as near as the nearest, from 0 to 1."""
        exact = nearest_in_parts(queries.float(), self.bank.float(), 1)
        distances = torch.linalg.vector_norm(queries.float() - self.bank[exact[:, 0]].float(), dim=1)
        found, _ = self(queries)
        return (found[:, 0] <= distances * (1 + 1e-6)).float().mean().item()

    def _indices(self, queries: torch.Tensor, bank: torch.Tensor, k: int) -> torch.Tensor:
        kind = self.kind
        if kind == "pq" and candidates(k) >= len(bank):
            kind = "flat"  # all entries would be compared exactly
        if kind != "flat":
            return self._approximate(queries, bank, k, kind)
        if self._searches_in_torch(queries, bank):
            return nearest_in_parts(queries, bank, k)
        faiss = import_faiss()
        if bank.is_cuda:
            require_gpu(faiss)
            return faiss.knn_gpu(gpu_resources(), queries, bank, k)[1]
        return torch.from_numpy(faiss.knn(queries.numpy(), bank.numpy(), k)[1])

    def _searches_in_torch(self, queries: torch.Tensor, bank: torch.Tensor) -> bool:
        """Whether the exact search is PyTorch's."""
        if self.search != "auto":
            return self.search == "torch"
        return not faiss_serves(bank.device) or (packable(bank) and len(queries) >= FEW)

    def _approximate(self, queries: torch.Tensor, bank: torch.Tensor, k: int, kind: str) -> torch.Tensor:
        if self._built is None or self._built[0] is not self.bank or self._built[1] != self.bank._version:
            self._built = (self.bank, self.bank._version, build_index(bank.cpu(), kind))
        found = torch.from_numpy(self._built[2].search(queries.cpu().numpy(), k)[1]).to(bank.device)
        short = (found < 0).any(dim=1)  # what was searched has fewer than k entries
        if short.any():
            found[short] = nearest_in_parts(queries[short], bank, k)
        return found

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *arguments: Any) -> None:
        """Take a bank of any size, as a new tensor: memory that NumPy and FAISS have seen cannot be resized."""
        stored = state_dict.get(f"{prefix}bank")
        if stored is not None:
            self.bank = self.bank.new_empty(stored.shape)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the index, which belongs to FAISS and is built again."""
        return {**self.__dict__, "_built": None}


def nearest_in_torch(queries: torch.Tensor, bank: torch.Tensor, k: int, rows: int | None = None) -> torch.Tensor:
    """Indices (Q, k) of the nearest entries of a bank (n, D) to queries (Q, D), for ``rows`` queries at a time."""
    # |q - b|^2 / 2 = |q|^2 / 2 + (|b|^2 / 2 - q b); the first term changes nothing for a query.
    halves = bank.square().sum(dim=1) / 2
    chunks = [queries] if rows is None else queries.split(rows)
    tables = (torch.addmm(halves, chunk, bank.T, alpha=-1) for chunk in chunks)
    if k == 1:
        return torch.cat([table.argmin(dim=1, keepdim=True) for table in tables])
    return torch.cat([table.topk(k, dim=1, largest=False).indices for table in tables])


def whole_groups(bank: torch.Tensor) -> torch.Tensor:
    """A bank (n, D) whose last entry is repeated until there are whole groups of ``GROUP``."""
    rest = -len(bank) % GROUP
    return torch.cat([bank, bank[-1:].expand(rest, -1)]) if rest else bank


def nearest_in_groups(queries: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
    """Indices (Q, 1) of the nearest entries of :func:`whole_groups` of a bank (n, D) to queries (Q, D).

    In steps that OpenVINO, too, computes fast: it sorts for the place of a minimum.
    """
    bank = whole_groups(bank)
    table = torch.addmm(bank.square().sum(dim=1) / 2, queries, bank.T, alpha=-1).unflatten(1, (-1, GROUP))
    group = table.amin(dim=2).argmin(dim=1, keepdim=True)
    members = table.gather(1, group.unsqueeze(2).expand(-1, 1, GROUP)).squeeze(1)
    return group * GROUP + members.argmin(dim=1, keepdim=True)


def nearest_in_parts(queries: torch.Tensor, bank: torch.Tensor, k: int) -> torch.Tensor:
    """The same, by oneDNN where that is faster, with at most ``TABLE`` distances at a time."""
    queries = queries.detach()
    if pays(bank, queries):
        return torch.cat([nearest_to_packed(rows, bank, k) for rows in queries.split(ROWS)])
    return nearest_in_torch(queries, bank, k, max(1, TABLE // len(bank)))


def nearest_to_packed(queries: torch.Tensor, bank: torch.Tensor, k: int) -> torch.Tensor:
    """The same by oneDNN, with at most ``PART`` distances at a time, or ``GROUP`` of each query.

    The queries are packed, not the bank, of which there is no copy.
    """
    size = max(1, PART // (GROUP * len(queries))) * GROUP  # entries at a time, whole groups
    packed = pack_matrix(queries, min(size, len(bank)))
    nearness = queries.new_empty(0, len(queries))
    indices = nearness.long()
    for number, entries in enumerate(bank.split(size)):
        # -|q - b|^2 / 2 without the term that is the same for all entries
        table = linear(entries, packed).sub_(entries.square().sum(dim=1, keepdim=True) / 2)
        found, rows = largest(table, k)
        nearness, places = largest(torch.cat([nearness, found]), k)
        indices = torch.cat([indices, rows + number * size]).gather(0, places)
    return indices.T


def largest(table: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``k`` largest values of each column (or all), the largest first, and their rows; of equal ones the first."""
    if k > 1:
        return table.topk(min(k, len(table)), dim=0)
    if len(table) % GROUP:
        return table.max(dim=0, keepdim=True)
    # Values alone are compared many times as fast as with their rows.
    groups = table.unflatten(0, (-1, GROUP))
    _, group = groups.amax(dim=1).max(dim=0)
    members = groups.gather(0, group.expand(1, GROUP, -1))[0]
    values, member = members.max(dim=0, keepdim=True)
    return values, group * GROUP + member


class CodedBank:
    """A product quantiser's codes of a bank (n, D), and the exact comparison of the candidates that they give.

    A code has 4 bits for ``WIDTH`` values, so that processors look up the distances of 32 entries at once (FAISS's
    "fast scan"). The same bank gives the same codes, whatever the number of threads.

    Args:
        bank: On the CPU, float32. It is not copied.
    """

    def __init__(self, bank: torch.Tensor) -> None:
        self.faiss = import_faiss()
        self.bank = bank.numpy()
        rows = coded_rows(bank)
        self.codes = self.faiss.IndexPQFastScan(rows.shape[1], rows.shape[1] // WIDTH, 4)
        self.codes.pq.cp.min_points_per_centroid = 1  # otherwise a warning for small banks
        self.codes.train(rows)
        self.codes.add(rows)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Squared distances (Q, k) and indices (Q, k) for queries (Q, D), as FAISS's indices give them."""
        parts = [self._search(torch.from_numpy(rows), k) for rows in np.split(queries, range(ROWS, len(queries), ROWS))]
        distances, indices = (np.concatenate(part) for part in zip(*parts, strict=True))
        return distances, indices

    def _search(self, queries: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
        _, found = self.codes.search(coded_rows(queries), candidates(k))
        squared = np.empty(found.shape, dtype=np.float32)
        pointers = [self.faiss.swig_ptr(array) for array in (squared, queries.numpy(), self.bank, found)]
        self.faiss.fvec_L2sqr_by_idx(*pointers, queries.shape[1], *found.shape)
        best, places = torch.from_numpy(squared).topk(k, dim=1, largest=False)
        return best.numpy(), np.take_along_axis(found, places.numpy(), axis=1)


def candidates(k: int) -> int:
    """Number of entries that :class:`CodedBank` compares exactly for ``k`` neighbours."""
    return max(CANDIDATES, CANDIDATES_EACH * k)


def coded_rows(rows: torch.Tensor) -> np.ndarray:
    """Rows (n, D) as they are coded: with zeros up to a multiple of ``WIDTH`` values."""
    return pad(rows, (0, -rows.shape[1] % WIDTH)).numpy() if rows.shape[1] % WIDTH else rows.numpy()


def build_index(bank: torch.Tensor, kind: str) -> Any:
    """Build FAISS's approximate index of a bank (n, D) on the CPU."""
    if kind == "pq":
        return CodedBank(bank)
    faiss = import_faiss()
    entries, dimension = bank.shape
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(dimension, LINKS)
        index.hnsw.efSearch = BEAM
    else:
        cells = max(1, round(entries**0.5))
        index = faiss.IndexIVFFlat(faiss.IndexFlatL2(dimension), dimension, cells)
        index.cp.min_points_per_centroid = 1  # otherwise a warning for small banks
        index.nprobe = max(1, cells // PROBED)
        index.train(bank.numpy())
    index.add(bank.numpy())
    return index


def faiss_serves(device: torch.device) -> bool:
    """Tell whether FAISS is installed and works on a device."""
    if find_spec("faiss") is None:
        return False
    return device.type == "cpu" or (device.type == "cuda" and hasattr(import_faiss(), "StandardGpuResources"))


def import_faiss() -> ModuleType:
    """Import FAISS.

    Raises:
        ModuleNotFoundError: If it is not installed; the message says what to install.
    """
    try:
        return import_module("faiss")
    except ModuleNotFoundError as error:
        msg = (
            "This search needs FAISS: pip install 'anomalib-pack[cpu]', or 'anomalib-pack[gpu]' for CUDA. "
            "search='torch' with index='flat' works without it."
        )
        raise ModuleNotFoundError(msg, name="faiss") from error


def require_gpu(faiss: ModuleType) -> None:
    """Check that FAISS can search on a GPU.

    Raises:
        ModuleNotFoundError: If it is built for the CPU only.
    """
    if not hasattr(faiss, "StandardGpuResources"):
        msg = "search='faiss' on a GPU needs pip install 'anomalib-pack[gpu]'. search='torch' works without it."
        raise ModuleNotFoundError(msg, name="faiss")


@cache
def gpu_resources() -> Any:
    """FAISS's scratch memory on the GPU, once for a process as FAISS advises."""
    import_module("faiss.contrib.torch_utils")  # makes FAISS take CUDA tensors where they are
    return import_faiss().StandardGpuResources()
