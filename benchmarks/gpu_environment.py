"""What a GPU machine lacks and what it is: carried wheels, missing packages, versions and device.

Wheels go into a folder of their own by ``pip --target``, never beside the machine's packages, and only those of
packages that it does not have: its torch and all that belongs to it stay as they are.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tomllib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.tags import sys_tags
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).parent.parent
TESTING = ("pytest", "pytest-timeout", "easy-vqa")
"""What the three parts need beside the library's own dependencies."""
SHOWN = ("torch", "torchvision", "triton", "lightning", "torchmetrics", "transformers", "tokenizers", "numpy", "pillow")


def version_of(name: str) -> str | None:
    """Installed version of a distribution; ``None`` if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def install(wheels: Path, site: Path) -> list[str]:
    """Installs into ``site`` the wheels of packages that this Python lacks; returns their names.

    Raises:
        FileNotFoundError: if the folder holds no wheel.
        ValueError: if a wheel that is needed is for another Python or machine.
    """
    files = sorted(wheels.glob("*.whl"))
    if not files:
        raise FileNotFoundError(f"--wheels {wheels} holds no wheel; make it by benchmarks/gpu_wheels.py")
    tags, wanted = set(sys_tags()), {}
    for file in files:
        name, _, _, fits = parse_wheel_filename(file.name)
        if version_of(name) is not None:
            continue
        if not fits & tags:
            raise ValueError(
                f"{file.name} does not fit Python {platform.python_version()} on {platform.machine()}; fetch others by "
                f"benchmarks/gpu_wheels.py {wheels} --python {sys.version_info.major}.{sys.version_info.minor}"
            )
        wanted[str(name)] = file
    if wanted:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        pip += ["--disable-pip-version-check", "--upgrade", "--target", str(site)]
        subprocess.run([*pip, *map(str, wanted.values())], check=True)
    return sorted(wanted)


def use(site: Path) -> None:
    """Makes this process and its children import what is in ``site`` and this library from its sources."""
    paths = [str(ROOT), str(site)]
    sys.path[:0] = [path for path in paths if path not in sys.path]
    importlib.invalidate_caches()
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *([before] if before else [])])


def unmet() -> tuple[list[str], list[str]]:
    """Requirements of the library and of the script: those that are missing, and those met by another version only."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    missing, other = [], []
    for requirement in map(Requirement, [*project["dependencies"], *TESTING]):
        found = version_of(canonicalize_name(requirement.name))
        if found is None:
            missing.append(str(requirement))
        elif not requirement.specifier.contains(found.split("+")[0], prereleases=True):
            other.append(f"{requirement} (has {found})")
    return missing, other


def commit() -> str:
    """The commit of this tree, with ``-dirty`` if files differ; ``unknown`` outside a repository."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def driver() -> str | None:
    """Version of NVIDIA's driver; ``None`` without one."""
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def describe(device: str, of_commit: str | None = None) -> dict[str, Any]:
    """The machine: device, driver, versions, date and commit. Every result carries it.

    Raises:
        ValueError: if torch finds no GPU though ``device`` is ``cuda``.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here; --device cpu --tiny rehearses the script")
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU",
        "cores": len(os.sched_getaffinity(0)),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "memory_gb": round(properties.total_memory / 1e9, 2),
            "capability": f"{properties.major}.{properties.minor}",
            "driver": driver(),
            "cuda": torch.version.cuda,
        }
    found |= {"python": platform.python_version()}
    found |= {name: version for name in SHOWN if (version := version_of(name))}
    found |= {"commit": of_commit or commit(), "date": datetime.now(UTC).isoformat(timespec="seconds")}
    return found


def write_json(path: Path, values: Any) -> None:
    """Writes a file at once, so that a run that is cut off leaves no half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
