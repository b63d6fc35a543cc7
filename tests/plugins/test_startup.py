"""What the start-up line does to a Python process that has nothing to do with Anomalib: next to nothing."""

import re
import shutil
from pathlib import Path

import pytest

LOADED_MODULES = "import sys; print(*sys.modules)"
LOADED_FROM = "import sys; print(*[m.__file__ for n, m in sys.modules.items() if n.startswith('anomalib_pack')])"


def test_loads_two_modules_of_the_pack_and_no_other(environment):
    with_pack = environment.run("-c", LOADED_MODULES).stdout.split()
    without = environment.run("-c", LOADED_MODULES, ANOMALIB_PACK_AUTOLOAD="0").stdout.split()
    assert set(with_pack) - set(without) == {"anomalib_pack", "anomalib_pack._autoload"}


def test_costs_less_than_a_millisecond(environment):
    """Compared with what every Python imports first, as machines differ, and are busy."""

    def microseconds(name, report):
        return int(re.search(rf"(\d+) \| *{name}$", report, re.MULTILINE)[1])

    reports = [environment.run("-X", "importtime", "-c", "pass").stderr for _ in range(5)]
    ours, pythons = (min(microseconds(name, report) for report in reports) for name in ("anomalib_pack", "encodings"))
    # Measured: 0.45 ms to 0.95 ms. Most of it is the search for the files; `importlib.metadata` alone takes 25 ms.
    assert ours < 3 * pythons


def _delete(package: Path) -> None:
    shutil.rmtree(package)


def _break_syntax(package: Path) -> None:
    (package / "__init__.py").write_text("def")


def _raise_in_finder(package: Path) -> None:
    (package / "_autoload.py").write_text("raise RuntimeError('broken')")


def _lose_finder(package: Path) -> None:
    (package / "_autoload.py").unlink()


def _corrupt(package: Path) -> None:
    (package / "__init__.py").write_bytes(b"\xff\x00")


@pytest.mark.parametrize("damage", [_delete, _break_syntax, _raise_in_finder, _lose_finder, _corrupt])
def test_damaged_pack_is_silent(environment, empty_environment, damage):
    package = empty_environment.site_packages / "anomalib_pack"
    shutil.copytree(environment.site_packages / package.name, package)
    shutil.copy(environment.site_packages / "anomalib_pack.pth", package.parent)
    assert "_autoload.py" in empty_environment.run("-c", LOADED_FROM).stdout
    damage(package)
    result = empty_environment.run("-c", "print('works')")
    assert (result.returncode, result.stdout, result.stderr) == (0, "works\n", "")


@pytest.mark.parametrize("options", [["-W", "error", "-X", "dev", "-bb"], ["-O"], ["-I"], ["-B"]])
def test_strict_interpreter_is_silent(environment, options):
    result = environment.run(*options, "-c", LOADED_FROM, PYTHONPYCACHEPREFIX="/proc/cannot-be-written")
    assert "_autoload.py" in result.stdout
    assert (result.returncode, result.stderr) == (0, "")


def _files(environment) -> set[str]:
    paths = environment.site_packages.rglob("*")
    return {str(path.relative_to(environment.site_packages)) for path in paths}


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_uninstalling_leaves_nothing_behind(wheel, checkout, empty_environment, kind):
    before = _files(empty_environment)
    empty_environment.install(*([wheel] if kind == "wheel" else ["--editable", checkout]))
    expected = empty_environment.site_packages if kind == "wheel" else checkout
    assert f"{expected}/anomalib_pack/_autoload.py" in empty_environment.run("-c", LOADED_FROM).stdout.split()
    empty_environment.pip("uninstall", "--yes", "anomalib-pack")
    assert _files(empty_environment) == before
    assert empty_environment.run("-c", LOADED_FROM).stdout == "\n"
