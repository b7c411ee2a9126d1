"""Runs ``neo`` as a user would, and a small folder of everything that its commands read."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

from llm_builders import COLORS, native_model, text_llm
from shard_builders import png, sample, write

from neo_components.cli.main import main
from neo_components.data import load_tokenizer
from neo_components.model.chat import Chat

SIDE = 32
"""Sides of the images in pixels; 4 x 4 visual tokens."""


class Done(NamedTuple):
    """What a command left."""

    status: int
    out: str
    err: str


def neo(*arguments: str | Path) -> Done:
    """The command's entry point in this process: start-up is most of a small command's time."""
    out, err = io.StringIO(), io.StringIO()
    status = 0
    with patch.object(sys, "argv", ["neo", *map(str, arguments)]), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            status = int(end.code or 0)
    return Done(status, out.getvalue(), err.getvalue())


def good(*arguments: str | Path) -> str:
    """Standard output of a command that succeeds."""
    done = neo(*arguments)
    assert done.status == 0, done.err
    return done.out


def installed_neo(*arguments: str | Path, folder: Path) -> Done:
    """The installed command in a process of its own."""
    command = [Path(sys.executable).with_name("neo"), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return Done(done.returncode, done.stdout, done.stderr)


def color_png(number: int) -> bytes:
    """A picture of one colour."""
    return png(SIDE, SIDE, (60 * number % 256, 90, 200))


def build_world(root: Path) -> Path:
    """Two language models, a model, shards with eight questions, pictures, and a recipe of two steps."""
    llm = text_llm(root / "llm")
    text_llm(root / "other", question="name the hue", hidden_size=48, heads=3, vocab_size=290)
    Chat(native_model(llm), load_tokenizer(str(llm)), SIDE**2, SIDE**2).save_pretrained(root / "neo")
    samples = [sample(f"s{n}", [color_png(n)], answer=COLORS[n % 4]) | {"kind": "color"} for n in range(8)]
    write(root / "shards", samples)
    (root / "red.png").write_bytes(color_png(1))
    (root / "broken.png").write_bytes(b"no picture")
    (root / "run.yaml").write_text(
        f"""
output: {root}/run
model:
  patch_embedding: {{width: 16, patch_size: 4}}
  pre_buffer: {{depth: 1}}
  post_llm: {{from_pretrained: {llm}}}
stage: {{train: [patch_embedding, pre_buffer], steps: 2, validate_every: 0, checkpoint_every: 1}}
data:
  tokenizer: {llm}
  train: [{{shards: {root}/shards}}]
  seq_len: 256
  min_pixels: {SIDE**2}
  max_pixels: {SIDE**2}
  workers: 0
trainer: {{accelerator: cpu}}
"""
    )
    return root
