"""Wheel and sdist, each installed from its file into an environment that has nothing else of the pack."""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from plugin_commands import ANOMALIB, TABLE

WRITTEN_BY_PIP = {"INSTALLER", "RECORD", "REQUESTED", "direct_url.json"}


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "sdist", "--directory", folder]
    subprocess.run(command, check=True, capture_output=True, cwd=checkout)
    return next(folder.glob("*.tar.gz"))


def installed(environment) -> dict[str, bytes]:
    """Files of the pack, without what says how they were installed."""
    return {
        path.relative_to(environment.site_packages).as_posix(): path.read_bytes()
        for path in environment.site_packages.rglob("*")
        if path.is_file()
        and "__pycache__" not in path.parts
        and path.name not in WRITTEN_BY_PIP | {"packages_of_the_test_run.pth"}
    }


def test_sdist_installs_what_the_wheel_does(sdist, fresh_environment, empty_environment):
    empty_environment.install(sdist)
    assert installed(empty_environment) == installed(fresh_environment)


def test_wheel_has_all_files_of_the_packages_and_the_tables(wheel, checkout):
    folders = [*checkout.glob("anomalib_*/"), checkout / "configs" / "papers"]
    files = [
        path for folder in folders for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    names = {path.relative_to(checkout).as_posix() for path in files}
    expected = {re.sub("^configs/", "anomalib_pack/configs/", name) for name in names} | {"anomalib_pack.pth"}
    assert {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name} == expected


def test_names_have_the_version(wheel, sdist, checkout):
    version = yaml.safe_load((checkout / "CITATION.cff").read_text())["version"]
    assert wheel.name == f"anomalib_pack-{version}-py3-none-any.whl"
    assert sdist.name == f"anomalib_pack-{version}.tar.gz"


def test_everything_is_listed(fresh_python, checkout):
    result = fresh_python.check(TABLE, "--json")
    declared = re.split(r'^\[project\.entry-points\."(.+)"\]$', (checkout / "pyproject.toml").read_text(), flags=re.M)
    names = {
        (group, name)
        for group, lines in zip(declared[1::2], declared[2::2], strict=True)
        for name in re.findall(r'^(\w+) = "anomalib_', lines.partition("\n[")[0], re.MULTILINE)
    }
    assert {group for group, _ in names} == {"anomalib.models", "anomalib.data", "anomalib.pipelines"}
    version = yaml.safe_load((checkout / "CITATION.cff").read_text())["version"]
    rows = json.loads(result.stdout)["plugins"]
    assert {(row["group"], row["name"]) for row in rows} == names
    assert {(row["distribution"], row["version"], row["status"]) for row in rows} == {
        ("anomalib-pack", version, "loaded")
    }


def test_tables_of_papers_are_found_by_name(fresh_python):
    shown = fresh_python.check(ANOMALIB, "sweep", "--config", "papers/ulsad/table_22", "--list").stdout
    assert re.search(r"^[1-9]\d* jobs, 0 of them done\.$", shown, re.MULTILINE)


def test_page_of_the_report_is_made(fresh_python):
    page = fresh_python.check("""
from anomalib_pack.report.document import make_document
from anomalib_pack.report.pictures import Limits, Pictures
print(make_document([], Pictures(), Limits(0, 0, 0, 0)))
""").stdout
    assert page.lstrip().startswith("<!doctype html>")
