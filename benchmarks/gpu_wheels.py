"""Fetches what a GPU machine without network may lack, as wheels in a folder; run it where there is a network.

    python benchmarks/gpu_wheels.py wheels --python 3.12
    python benchmarks/gpu_wheels.py wheels --python 3.12 --names omegaconf webdataset easy-vqa

The machine is taken to have torch, torchvision, transformers, lightning and torchmetrics with all that they need.
Versions are those of constraints.txt, for Linux on x86-64. ``benchmarks/gpu.sh --wheels wheels`` installs, into a
folder apart, those that the machine lacks; ``--names`` makes a smaller folder for a machine that has the others.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
NAMES = (
    "omegaconf", "webdataset", "easy-vqa", "tensorboard", "matplotlib", "rich", "typer", "pytest", "pytest-timeout",
)  # fmt: skip
"""Dependencies of this library and of its tests that torch, transformers and lightning do not bring."""
THERE = ("numpy", "pillow", "packaging", "pyyaml", "typing_extensions", "setuptools", "markupsafe")
"""Dependencies of the names above that they do bring."""
GLIBC = (17, 24, 27, 28, 31, 34)
"""Minor versions of glibc 2 that wheels are built for; pip takes them by exact name."""


def platform_options(python: str) -> list[str]:
    """pip's options for wheels of another Python on Linux."""
    options = ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    names = ["manylinux2014_x86_64", *(f"manylinux_2_{minor}_x86_64" for minor in GLIBC)]
    return [*options, *(word for name in names for word in ("--platform", name))]


def fetch(folder: Path, python: str, names: list[str]) -> list[Path]:
    """Downloads the wheels and drops those of :data:`THERE`; returns what is in the folder.

    Raises:
        subprocess.CalledProcessError: if pip does not find one.
    """
    pinned = ["-c", str(ROOT / "constraints.txt"), "-d", str(folder), *platform_options(python)]
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", *pinned, *names], check=True)
    for wheel in folder.glob("*.whl"):
        if wheel.name.split("-")[0].lower() in THERE:
            wheel.unlink()
    return sorted(folder.glob("*.whl"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", required=True, help="the machine's: python3 -V there; for example 3.12")
    parser.add_argument("--names", nargs="+", default=list(NAMES), metavar="NAME", help=f"default: {' '.join(NAMES)}")
    options = parser.parse_args()
    wheels = fetch(options.folder, options.python, options.names)
    size = sum(wheel.stat().st_size for wheel in wheels) / 1e6
    print(f"{len(wheels)} wheels for Python {options.python}, {size:.0f} MB: {options.folder}")


if __name__ == "__main__":
    main()
