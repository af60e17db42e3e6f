"""What is released: the wheel, the source distribution, and what they say of themselves."""

import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import try_wheel  # noqa: E402


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("wheel"))
    (file,) = WheelBuilder(str(ROOT)).build(directory=folder, versions=["standard"])
    return Path(file)


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_bytes(archive.read(name))


def test_the_wheel_has_every_file_of_the_package_and_no_other(wheel):
    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "retrofit").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == package
    assert names >= {
        "retrofit/py.typed",
        "retrofit/plots.mplstyle",
        "retrofit/report/page.html",
        "retrofit/demo/cifar10-sample.tar.xz",
        "retrofit/demo/vgg-cifar10.safetensors",
        "retrofit/demo/resnet-cifar10-folded.safetensors",
    }


def test_the_source_distribution_has_all_that_the_make_targets_need(tmp_path):
    (file,) = SdistBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with tarfile.open(file) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("retrofit", "tests", "scripts", "notebooks", "docs"):
        files = {p for p in (ROOT / folder).rglob("*.*") if p.suffix in (".py", ".ipynb")}
        assert {p.relative_to(ROOT).as_posix() for p in files} <= names
    assert names >= {
        *("CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md"),
        *("SECURITY.md", "mkdocs.yml", "pyproject.toml", "notebooks/resnet-cifar10.safetensors"),
    }
    assert not any("__pycache__" in name or name.startswith(".venv") for name in names)


def test_the_licence_is_said_once_as_an_expression(metadata):
    assert metadata["License-Expression"] == "MIT"
    assert not [c for c in metadata.get_all("Classifier") if c.startswith("License ::")]


def test_the_classifiers_name_the_pythons_that_are_required(metadata):
    minors = re.findall(
        r"Python :: 3\.(\d+)$", "\n".join(metadata.get_all("Classifier")), re.MULTILINE
    )
    assert metadata["Requires-Python"] == f">=3.{minors[0]}"
    assert [int(minor) for minor in minors] == list(range(int(minors[0]), int(minors[-1]) + 1))


def test_the_citation_is_of_this_version_and_licence(metadata):
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == metadata["Version"] == version("batchnorm-retrofit")
    assert citation["license"] == metadata["License-Expression"]


def test_every_install_line_names_the_released_package_and_an_extra_that_it_has(metadata):
    """But for the extras that serve a checkout, which its own folder installs."""
    of_a_checkout = {"dev", "docs", "notebooks", "benchmark"}
    texts = [
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("retrofit/**/*.py"),
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
    ]
    found = [
        (path.name, name, extra)
        for path in texts
        for name, extra in re.findall(r"pip install '([\w.-]+)\[(\w+)\]'", path.read_text())
    ]
    extras = set(metadata.get_all("Provides-Extra"))
    assert len(found) > 5
    assert [line for line in found if line[2] not in extras] == []
    wrong = [
        (file, name, extra)
        for file, name, extra in found
        if name != ("." if extra in of_a_checkout else metadata["Name"])
    ]
    assert wrong == []


def tiny_wheel(folder, requires=()):
    """A wheel of one module, written by hand."""
    file = folder / "tiny-1.0-py3-none-any.whl"
    about = ["Metadata-Version: 2.1", "Name: tiny", "Version: 1.0"]
    about += [f"Requires-Dist: {name}" for name in requires]
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("tiny.py", "import numpy")
        archive.writestr("tiny-1.0.dist-info/METADATA", "\n".join([*about, ""]))
        archive.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny-1.0.dist-info/RECORD", "")
    return file


@pytest.mark.slow
def test_an_environment_for_a_wheel_has_what_it_requires_and_nothing_else(tmp_path):
    def imports(folder, module):
        command = [folder / "python", "-I", "-c", f"import {module}"]
        return not subprocess.run(command, capture_output=True, check=False).returncode

    poor = try_wheel.environment(tmp_path / "poor", tiny_wheel(tmp_path))
    assert not imports(poor, "tiny")  # numpy is not declared
    rich = try_wheel.environment(tmp_path / "rich", tiny_wheel(tmp_path, ["numpy", "jinja2"]))
    assert imports(rich, "tiny")
    assert imports(rich, "jinja2, markupsafe")  # what jinja2 requires
    assert not imports(rich, "torch")
    assert not imports(rich, "retrofit")
    with pytest.raises(SystemExit, match=r"pip .*check failed"):
        try_wheel.environment(tmp_path / "old", tiny_wheel(tmp_path, ["numpy<1"]))
