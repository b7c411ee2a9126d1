"""Code for a Hopper GPU, generated and compiled without one: a block at the shape of the 2.2B model, in bfloat16."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton compiles for sm_90")
SHARED_MEMORY = 232448
"""Bytes that a block of threads may have on an H100."""


@needs_triton
@pytest.mark.slow
def test_a_block_compiles_for_hopper(tmp_path: Path) -> None:
    """Forward and backward: FlexAttention uses the matrix units and fits registers and shared memory."""
    child = Path(__file__).with_name("sm90_child.py")
    env = os.environ | {
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TRITON_CACHE_DIR": str(tmp_path / "triton"),
    }  # fmt: skip
    ran = subprocess.run([sys.executable, str(child), "1024"], capture_output=True, text=True, env=env, timeout=600)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found: dict[str, list[dict[str, Any]]] = json.loads(ran.stdout.splitlines()[-1])
    assert sorted(found) == ["backward", "forward"]
    for way, kernels in found.items():
        attention = [kernel for kernel in kernels if kernel["name"].startswith("triton_tem")]
        assert len(attention) == 1 and len(kernels) > 10, way
        assert all(kernel["cubin"] > 0 and kernel["shared"] <= SHARED_MEMORY for kernel in kernels)
        assert attention[0]["matrix_units"] and attention[0]["spilled"] <= 64, attention
