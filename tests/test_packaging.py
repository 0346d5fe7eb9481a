"""What an install puts where: the packages of pyproject.toml, the wheel, and which MLX each platform gets."""

from __future__ import annotations

import ast
import importlib
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import mlx_codellama

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PKG = "mlx_codellama"
DEMO_LIMIT_BYTES = 12 * 2**20
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MAPPED = {
    name: folder for name, folder in SETTINGS["tool"]["setuptools"]["package-dir"].items() if name != PKG
}  # mlx_codellama.convert → convert


def packages_on_disk() -> set[str]:
    """Every folder with an __init__.py below the package folders, under its installed name."""
    found = set()
    for name, folder in {PKG: PKG, **MAPPED}.items():
        base = ROOT / folder
        for init in base.rglob("__init__.py"):
            inner = init.parent.relative_to(base).parts
            if name == PKG and inner and inner[0] in MAPPED.values():
                continue  # a developer's links
            found.add(".".join([name, *inner]))
    return found


def test_packages_of_pyproject_are_the_folders_on_disk() -> None:
    listed = SETTINGS["tool"]["setuptools"]["packages"]
    assert listed == sorted(listed)
    assert set(listed) == packages_on_disk()


def test_version_is_said_once_and_the_same() -> None:
    assert SETTINGS["project"]["version"] == mlx_codellama.__version__


@pytest.mark.parametrize("folder", sorted(MAPPED.values()))
def test_a_mapped_folder_refuses_to_be_imported_by_its_own_name(folder: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"import {folder}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"ImportError: import {PKG}.{folder}, not {folder}" in done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, so that nothing is left in the checkout."""
    source = tmp_path_factory.mktemp("source")
    for name in (PKG, *MAPPED.values()):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source / name)
    code = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    built = list((source / "dist").glob("*.whl"))
    assert len(built) == 1
    return built[0]


@pytest.fixture(scope="module")
def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def metadata(wheel: Path, contents: set[str]) -> Message:
    (name,) = [name for name in contents if name.endswith(".dist-info/METADATA")]
    with zipfile.ZipFile(wheel) as archive:
        return message_from_string(archive.read(name).decode())


def test_wheel_is_pure_python(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")


def test_wheel_holds_every_source_and_nothing_beside(contents: set[str]) -> None:
    expected = set()
    for name, folder in {PKG: PKG, **MAPPED}.items():
        base = ROOT / folder
        for path in base.rglob("*.py"):
            inner = path.relative_to(base).as_posix()
            if not (name == PKG and inner.split("/")[0] in MAPPED.values()):
                expected.add(f"{name.replace('.', '/')}/{inner}")
    assert {name for name in contents if name.endswith(".py")} == expected
    tops = {name.split("/")[0] for name in contents}
    assert {top for top in tops if not top.endswith(".dist-info")} == {PKG}


def test_wheel_holds_types_marker_and_licences(contents: set[str]) -> None:
    assert f"{PKG}/py.typed" in contents
    assert {"LICENSE", "NOTICE"} <= {name.rsplit("/", 1)[-1] for name in contents}


def test_wheel_holds_the_whole_demo_checkpoint_within_its_limit(contents: set[str]) -> None:
    folder = ROOT / PKG / "demo"
    files = {path.name for path in folder.iterdir() if path.is_file()}
    assert {"config.json", "model.safetensors", "tokenizer.model"} <= files
    assert {name.rsplit("/", 1)[-1] for name in contents if name.startswith(f"{PKG}/demo/")} == files
    assert sum((folder / name).stat().st_size for name in files) <= DEMO_LIMIT_BYTES


def test_wheel_runs_on_its_own(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import mlx_codellama.config, mlx_codellama.convert, mlx_codellama.quant\n"
        "print(mlx_codellama.config.__file__, mlx_codellama.convert.__file__, mlx_codellama.quant.__file__, sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert all(Path(line).is_relative_to(tmp_path) for line in done.stdout.split())


def chosen(metadata: Message, platform: str, extra: str = "") -> set[str]:
    """Requirements in force on a platform, with one extra or none, as `name[extras]`."""
    found = set()
    for line in metadata.get_all("Requires-Dist", []):
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"sys_platform": platform, "extra": extra}):
            found.add(requirement.name + (f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""))
    return found


def mlx_of(requirements: set[str]) -> set[str]:
    return {name for name in requirements if name == "mlx" or name.startswith("mlx[")}


def test_a_mac_gets_mlx_and_linux_gets_the_one_it_asks_for(metadata: Message) -> None:
    assert mlx_of(chosen(metadata, "darwin")) == {"mlx"}
    assert mlx_of(chosen(metadata, "linux")) == set()
    assert mlx_of(chosen(metadata, "linux", "cpu")) == {"mlx[cpu]"}
    assert mlx_of(chosen(metadata, "linux", "cuda")) == {"mlx[cuda13]"}
    assert mlx_of(chosen(metadata, "darwin", "cpu")) == {"mlx"}  # a Mac may ask for an extra in vain, not in error


def test_running_needs_no_torch(metadata: Message) -> None:
    for extra in ("", "cpu", "cuda", "test", "dev"):
        names = chosen(metadata, "linux", extra) | chosen(metadata, "darwin", extra)
        assert not names & {"torch", "transformers", "mlx-lm"}


def imported() -> set[str]:
    """Third parties that shipped sources import at run time, as distributions name themselves."""
    roots = set()
    for folder in (PKG, *MAPPED.values()):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and not node.level:
                    names = [node.module or ""]
                roots |= {name.partition(".")[0] for name in names}
    ours = {PKG, "mlx_codellama_cpu", "typing_extensions", "__future__"}  # the last but one for type checkers only
    return {name.replace("_", "-") for name in roots - ours - sys.stdlib_module_names}


def test_what_is_imported_is_what_an_install_brings(metadata: Message) -> None:
    assert "mlx" in imported()
    assert imported() <= chosen(metadata, "darwin")
    assert imported() - {"mlx"} <= chosen(metadata, "linux")  # there MLX comes with an extra
    assert chosen(metadata, "linux") - imported() == {"safetensors"} - imported()


def test_the_oldest_python_is_the_same_everywhere() -> None:
    assert SETTINGS["project"]["requires-python"] == ">=3.10"
    assert SETTINGS["tool"]["ruff"]["target-version"] == "py310"
    assert SETTINGS["tool"]["mypy"]["python_version"] == "3.10"
    assert "sys.version_info < (3, 10)" in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "Python 3.10 or newer" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_command_is_a_function_that_exists() -> None:
    ((name, target),) = SETTINGS["project"]["scripts"].items()
    module, _, function = target.partition(":")
    assert name == "mlx-codellama"
    assert callable(getattr(importlib.import_module(module), function))


def test_both_distributions_agree_on_mlx() -> None:
    native = ROOT / "csrc" / "pyproject.toml"
    if not native.exists():
        pytest.skip("no native distribution in this checkout")
    pins = tomllib.loads(native.read_text(encoding="utf-8"))["project"]["dependencies"]
    (pin,) = [Requirement(line) for line in pins if Requirement(line).name == "mlx"]
    (exact,) = [specifier for specifier in pin.specifier if specifier.operator == "=="]
    for line in SETTINGS["project"]["optional-dependencies"]["cpu"]:
        assert exact.version in Requirement(line).specifier


@pytest.mark.skipif(sys.platform != "linux", reason="the native kernels are for Linux")
def test_the_native_distribution_travels_with_its_sources(tmp_path: Path) -> None:
    """setuptools by itself puts no C++ into an sdist, which then builds nowhere."""
    folder = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", folder, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    (folder / "build").mkdir()
    (folder / "build" / "left.cpp").touch()
    subprocess.run([sys.executable, "setup.py", "-q", "sdist"], cwd=folder, check=True, capture_output=True)
    (archive,) = (folder / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        packed = {name.partition("/")[2] for name in tar.getnames()}
    sources = {p.relative_to(ROOT / "csrc").as_posix() for p in (ROOT / "csrc").rglob("*.*") if p.is_file()}
    needed = {name for name in sources if name.endswith((".cpp", ".h", ".cmake", "CMakeLists.txt", "ops.py"))}
    assert len(needed) > 50
    assert {name for name in needed if not name.startswith("build/")} <= packed
    assert "build/left.cpp" not in packed
