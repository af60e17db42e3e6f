"""Try a wheel as a user meets it: in an empty environment and an empty folder, run the demo.

    python scripts/try_wheel.py dist/batchnorm_retrofit-0.1.0-py3-none-any.whl
    python scripts/try_wheel.py --download dist/batchnorm_retrofit-0.1.0-py3-none-any.whl

The environment gets the wheel and the packages that the wheel says it needs, and no other: neither
the source tree nor the packages of an extra. They are linked from the environment that runs this,
which has them already; with --download pip fetches them, 3 GB on Linux: do that before a release.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement

IMPORTED = "import retrofit; print(f'retrofit {retrofit.__version__} imported')"


def environment(folder: Path, wheel: Path, *, download: bool = False) -> Path:
    """Make an environment in `folder` with the wheel and what it needs; return its scripts' folder.

    Raises:
        SystemExit: pip cannot install the wheel, a package that it needs is not here, or is not of
            a version that it takes.
    """
    venv.create(folder, symlinks=True)
    bin_folder = folder / "bin"
    pip = [sys.executable, "-m", "pip", "--python", str(bin_folder / "python")]
    run([*pip, "install", "--quiet", *([] if download else ["--no-deps"]), str(wheel)], folder)
    if not download:
        (packages,) = folder.glob("lib/python*/site-packages")
        (installed,) = distributions(path=[str(packages)])
        for needed in needed_by(installed):
            link(needed, packages)
    run([*pip, "check"], folder)
    return bin_folder


def needed_by(installed: Distribution) -> Iterator[Distribution]:
    """List the packages that one requires, and that those require, from this environment."""
    seen: set[tuple[str, str]] = set()
    waiting = [(installed, "")]  # a package, and the extra of it that is asked for
    while waiting:
        package, extra = waiting.pop()
        for line in package.requires or ():
            required = Requirement(line)
            if required.marker and not required.marker.evaluate({"extra": extra}):
                continue
            needed = distribution(required.name)
            for wanted in ("", *required.extras):
                if (needed.name, wanted) not in seen:
                    seen.add((needed.name, wanted))
                    waiting.append((needed, wanted))
                    if not wanted:
                        yield needed


def link(package: Distribution, packages: Path) -> None:
    """Link the modules of a package, and its metadata, into another folder of packages."""
    for name in {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}:
        target = packages / name
        if not target.exists():  # several packages may share a folder, as nvidia's do
            target.symlink_to(Path(str(package.locate_file(name))))


def run(command: list[str], folder: Path) -> None:
    """Run a command in a folder, without the variables that would show it other packages."""
    others = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    variables = {name: value for name, value in os.environ.items() if name not in others}
    done = subprocess.run(command, cwd=folder, env=variables, check=False)  # noqa: S603
    if done.returncode:
        sys.exit(f"try_wheel.py: {' '.join(command)} failed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--download", action="store_true", help="let pip fetch what it needs")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wheel = arguments.wheel.resolve()
        bin_folder = environment(Path(folder, "environment"), wheel, download=arguments.download)
        elsewhere = Path(folder, "elsewhere")
        elsewhere.mkdir()
        run([str(bin_folder / "python"), "-c", IMPORTED], elsewhere)
        run([str(bin_folder / "retrofit"), "demo"], elsewhere)
    print(f"{wheel.name} works in an environment that has nothing else")


if __name__ == "__main__":
    main()
