"""Site, citations and settings name what there is; `make docs` checks the links."""

import importlib
import pkgutil
import re
from importlib.metadata import distribution
from types import ModuleType

import pytest
import yaml
from documents import CHECKOUT

import anomalib_pack

ENTRY_POINTS = distribution("anomalib-pack").entry_points
MODELS = {entry.name: entry for entry in ENTRY_POINTS.select(group="anomalib.models")}
DOCUMENTED = re.compile(r"^\.\. auto(?:class|function):: (\S+)$", re.MULTILINE)


def read(name: str) -> str:
    return (CHECKOUT / name).read_text(encoding="utf-8")


def public_modules() -> list[ModuleType]:
    """The models' packages, and modules of the pack that say what is public. Commands are described by documents."""
    names = [module.name for module in pkgutil.iter_modules(anomalib_pack.__path__) if not module.name.startswith("_")]
    packs = [importlib.import_module(f"anomalib_pack.{name}") for name in names]
    methods = {importlib.import_module(entry.module) for entry in MODELS.values()}
    commands = {entry.module for entry in ENTRY_POINTS.select(group="anomalib.pipelines")}
    return [module for module in [*packs, *methods] if hasattr(module, "__all__") and module.__name__ not in commands]


def test_api_pages_have_every_public_name() -> None:
    documented = set()
    for page in (CHECKOUT / "docs/api").glob("*.md"):
        for name in DOCUMENTED.findall(page.read_text(encoding="utf-8")):
            module, _, attribute = name.rpartition(".")
            documented.add(getattr(importlib.import_module(module), attribute))
    public = {getattr(module, name) for module in public_modules() for name in module.__all__}
    public |= {entry.load() for entry in ENTRY_POINTS.select(group="anomalib.data")}
    assert {f"{thing.__module__}.{thing.__name__}" for thing in public - documented} == set()


@pytest.mark.parametrize("model", MODELS)
def test_every_model_is_presented(model: str) -> None:
    for page in ("README.md", "docs/index.md", "docs/which_model.md", "docs/citing.md", "configs/README.md"):
        assert f"`{model}`" in read(page), page


def test_index_links_every_page() -> None:
    """In its text, and once in the tables of contents beside every page."""
    index = read("docs/index.md")
    linked = set(re.findall(r"\]\(([\w/]+\.md)\)", index))
    listed = re.findall(
        r"^(?:.+ <)?([\w/.]+)>?$", "".join(re.findall(r"^:caption: .+\n\n([^`]+)", index, re.MULTILINE)), re.MULTILINE
    )
    pages = {path.relative_to(CHECKOUT / "docs").as_posix() for path in (CHECKOUT / "docs").rglob("*.md")} - {
        "index.md"
    }
    assert pages <= linked
    assert sorted(f"{name}.md" for name in listed if not name.startswith("../")) == sorted(pages)


def test_citations_are_those_of_the_page() -> None:
    citation = yaml.safe_load(read("CITATION.cff"))
    page = read("docs/citing.md")
    assert citation["version"] == re.search(r'^version = "(.+)"$', read("pyproject.toml"), re.MULTILINE)[1]
    for entry in [citation, *citation["references"]]:
        assert f"= {{{entry['title']}}}" in page
        assert entry.get("url", "") in page
        for author in entry["authors"]:
            assert author.get("name") or f"{author['family-names']}, {author['given-names']}" in page
    assert f"version = {{{citation['version']}}}" in page


def test_pre_commit_has_the_ruff_of_the_tests() -> None:
    [version] = re.findall(r"^ruff==(\S+)$", read("constraints.txt"), re.MULTILINE)
    [hooks] = [each for each in yaml.safe_load(read(".pre-commit-config.yaml"))["repos"] if "ruff" in each["repo"]]
    assert hooks["rev"] == f"v{version}"


def test_workflow_runs_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    jobs = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"]
    matrix = jobs["test"]["strategy"]["matrix"]
    wanted = {*matrix["target"], *(each["target"] for each in matrix["include"])}
    wanted |= set(re.findall(r"^ +- run: make ([a-z-]+)$", read(".github/workflows/ci.yml"), re.MULTILINE))
    assert wanted == wanted & targets
    classifiers = re.findall(r"Programming Language :: Python :: (3\.\d+)", read("pyproject.toml"))
    assert matrix["python"] == classifiers
