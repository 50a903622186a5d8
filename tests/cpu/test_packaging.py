"""The package can be imported as a wheel, an editable install and a checkout, and shadows no other `kernels`."""

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {"rewriter": "rewriter", "kernels": "rewriter/kernels", "patterns": "rewriter/patterns"}
SITE = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
HAS_KERNELS = any(Path(folder, "kernels", "__init__.py").is_file() for folder in SITE)


def sources(folder):
    return {path.relative_to(ROOT / folder).as_posix() for path in (ROOT / folder).rglob("*.py")}


def python(code, *, cwd, site=()):
    """Run `code` in a fresh interpreter that sees `site` and the dependencies, but no editable install of ours.

    As with `python -c`, the current folder comes first on the path. Returns what it printed, as lines.
    """
    paths = [str(path) for path in site]
    start = f"import sys, site; [site.addsitedir(path) for path in {paths!r}]; sys.path.extend({SITE!r})"
    done = subprocess.run([sys.executable, "-S", "-c", f"{start}\n{code}"], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[:-1]


def build(kind, source, target):
    """Build `source` with the installed setuptools; the built wheel's path."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(target)!r}))"
    return target / python(code, cwd=source)[-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy to build from, as building leaves files behind in the tree."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def installed(source, tmp_path_factory):
    """A folder that holds what the wheel installs."""
    target = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(build("wheel", source, target)) as wheel:
        wheel.extractall(target / "site")
    return target / "site"


WHERE_ARE_WE = """
import importlib, pkgutil
import rewriter, rewriter.kernels.rms_norm, rewriter.patterns.rms_norm, rewriter.patterns
print(rewriter.__file__, rewriter.kernels.rms_norm.__file__, rewriter.patterns.rms_norm.__file__, sep="\\n")
for folder in (rewriter.kernels, rewriter.patterns):
    for module in pkgutil.iter_modules(folder.__path__):
        importlib.import_module(f"{folder.__name__}.{module.name}")
"""


def test_wheel_holds_every_source_file_and_no_top_level_kernels_or_patterns(installed):
    expected = {f"{place}/{file}" for folder, place in FOLDERS.items() for file in sources(folder)}
    found = {path.relative_to(installed).as_posix() for path in installed.rglob("*.py")}
    assert found == expected
    top_level = next(installed.glob("rewriter-*.dist-info")) / "top_level.txt"
    assert top_level.read_text().split() == ["rewriter"]


def test_wheel_can_be_imported(installed, tmp_path):
    package = installed / "rewriter"
    places = python(WHERE_ARE_WE, cwd=tmp_path, site=[installed])
    expected = [package / "__init__.py", package / "kernels/rms_norm.py", package / "patterns/rms_norm.py"]
    assert places == [str(path) for path in expected]
    assert python("import rewriter; print(*rewriter.__path__)", cwd=tmp_path, site=[installed]) == [str(package)]


def test_editable_install_can_be_imported(source, tmp_path):
    with zipfile.ZipFile(build("editable", source, tmp_path)) as wheel:
        wheel.extractall(tmp_path / "site")
    places = python(WHERE_ARE_WE, cwd=tmp_path, site=[tmp_path / "site"])
    expected = [source / "rewriter/__init__.py", source / "kernels/rms_norm.py", source / "patterns/rms_norm.py"]
    assert places == [str(path) for path in expected]


def test_checkout_can_be_imported_without_an_install():
    places = python(WHERE_ARE_WE, cwd=ROOT)
    expected = [ROOT / "rewriter/__init__.py", ROOT / "kernels/rms_norm.py", ROOT / "patterns/rms_norm.py"]
    assert [Path(place).resolve() for place in places] == [path.resolve() for path in expected]


def test_entry_points_name_things_that_exist(installed, tmp_path):
    code = """
from importlib.metadata import distribution
for point in distribution("rewriter").entry_points:
    print(point.group, point.name, callable(point.load()))
"""
    points = python(code, cwd=tmp_path, site=[installed])
    assert points == ["console_scripts rewriter True", "torch_dynamo_backends rewriter True"]


@pytest.fixture
def other_kernels(tmp_path):
    """A site folder with a distribution called `kernels`, as Hugging Face's is."""
    package, info = tmp_path / "site/kernels", tmp_path / "site/kernels-99.0.dist-info"
    package.mkdir(parents=True)
    info.mkdir()
    (package / "__init__.py").write_text('__version__ = "99.0"\n')
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 99.0\n")
    return tmp_path / "site"


@pytest.mark.parametrize("installed_too", [False, True])
def test_a_package_called_kernels_is_not_shadowed_in_the_repository_root(other_kernels, installed, installed_too):
    """Holds with the checkout alone, and with our wheel installed beside the other package."""
    code = """
import kernels, rewriter.kernels.rms_norm
print(kernels.__file__, rewriter.kernels.rms_norm.__file__, sep="\\n")
"""
    sites = [other_kernels, installed] if installed_too else [other_kernels]
    theirs, ours = python(code, cwd=ROOT, site=sites)
    assert theirs == str(other_kernels / "kernels/__init__.py")
    assert Path(ours).resolve() == ROOT / "kernels/rms_norm.py"


def test_transformers_does_not_take_our_folder_for_the_kernels_package():
    pytest.importorskip("transformers")
    code = "from transformers.utils.import_utils import _is_package_available as seen; print(seen('kernels', True)[0])"
    assert python(code, cwd=ROOT) == [str(HAS_KERNELS)]


def test_kernels_and_patterns_stay_plain_folders():
    """An `__init__.py` there would make them win over an installed package of the same name."""
    assert not [name for name in ("kernels", "patterns") if (ROOT / name / "__init__.py").exists()]
