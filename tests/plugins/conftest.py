"""A user's environment: the wheel of this checkout installed beside Anomalib and distributions of third parties.

The distributions are the folders in `third_party`: the modules to install, and `entry_points.txt`.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from waiting import TIMEOUT

HERE = Path(__file__).parent
CHECKOUT = HERE.parents[1]

collect_ignore = ["third_party"]  # half of it is broken on purpose


@dataclass
class Environment:
    """A virtual environment that sees the packages of the one that runs the tests, but not what these start up."""

    root: Path

    @property
    def python(self) -> Path:
        return self.root / "bin" / "python"

    @property
    def site_packages(self) -> Path:
        return next(self.root.glob("lib/python*/site-packages"))

    @classmethod
    def create(cls, root: Path) -> "Environment":
        venv.create(root, symlinks=True, with_pip=False)
        environment = cls(root)
        # A path in a .pth file: Python does not run the .pth files that lie there, among them an editable install's.
        path = sysconfig.get_path("purelib")
        (environment.site_packages / "packages_of_the_test_run.pth").write_text(f"{path}\n")
        return environment

    def pip(self, *arguments: str | Path) -> None:
        command = [sys.executable, "-m", "pip", "--python", self.python, *arguments]
        subprocess.run(command, check=True, capture_output=True, cwd=self.root)

    def install(self, *what: str | Path) -> None:
        self.pip("install", "--no-deps", "--no-index", "--no-build-isolation", *what)

    def install_third_party(self, folder: Path) -> None:
        """Install a folder's modules and entry points, as version 1.2 of a distribution of the folder's name."""
        shutil.copytree(
            folder, self.site_packages, dirs_exist_ok=True, ignore=shutil.ignore_patterns("entry_points.txt")
        )
        metadata = self.site_packages / f"{folder.name}-1.2.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {folder.name.replace('_', '-')}\nVersion: 1.2\n"
        )
        shutil.copy(folder / "entry_points.txt", metadata)

    def run(self, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess:
        command = [self.python, *arguments]
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=self.root,
            env=_variables(**variables),
            check=False,
            timeout=TIMEOUT,
        )


class WarmPython:
    """An interpreter that has imported Anomalib's dependencies, and runs each snippet in a fork."""

    def __init__(self, environment: Environment, **variables: str) -> None:
        self.process = subprocess.Popen(
            [environment.python, HERE / "warm_python.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=environment.root,
            env=_variables(**variables),
        )

    def run(self, code: str, *argv: str) -> subprocess.CompletedProcess:
        """Run a snippet, whatever comes of it."""
        self.process.stdin.write(json.dumps({"code": code, "argv": argv}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return subprocess.CompletedProcess(code, answer["code"], answer["out"], answer["err"])

    def check(self, code: str, *argv: str) -> subprocess.CompletedProcess:
        """Run a snippet that must succeed."""
        result = self.run(code, *argv)
        assert result.returncode == 0, result.stdout + result.stderr
        return result

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def _variables(**variables: str) -> dict[str, str]:
    # The test run's own settings of Python would leak into the user's environment.
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "ANOMALIB_PACK"))}
    return {**own, **variables}


@pytest.fixture(scope="session")
def checkout() -> Path:
    return CHECKOUT


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", folder, CHECKOUT], check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.fixture
def empty_environment(tmp_path: Path) -> Environment:
    return Environment.create(tmp_path / "empty")


@pytest.fixture(scope="session")
def fresh_environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The pack alone."""
    environment = Environment.create(tmp_path_factory.mktemp("fresh"))
    environment.install(wheel)
    return environment


@pytest.fixture(scope="session")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The pack and every distribution in `third_party`, the broken ones included."""
    environment = Environment.create(tmp_path_factory.mktemp("user"))
    environment.install(wheel)
    for folder in sorted((HERE / "third_party").iterdir()):
        environment.install_third_party(folder)
    return environment


@pytest.fixture(scope="session")
def python(environment: Environment) -> Iterator[WarmPython]:
    warm = WarmPython(environment)
    yield warm
    warm.close()


@pytest.fixture(scope="session")
def fresh_python(fresh_environment: Environment) -> Iterator[WarmPython]:
    warm = WarmPython(fresh_environment)
    yield warm
    warm.close()


@pytest.fixture(scope="session")
def python_switched_off(environment: Environment) -> Iterator[WarmPython]:
    warm = WarmPython(environment, ANOMALIB_PACK_AUTOLOAD="0")
    yield warm
    warm.close()
