"""FlexAttention in the form of its kernels: widths, one compilation for all lengths, no wait for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from builders import random_batch, tiny_model
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

from neo_components.components import flex_attention as flex
from neo_components.components.backends import EagerAttention
from neo_components.components.flex_attention import LEAST, WIDE_TILES, FlexAttention
from neo_components.components.masks import block_mask
from neo_components.types import PADDING

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without")


def heads_of(n: int, k: int, width: int, length: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((n, 2 * width), (k, 2 * width), (k, width))
    return [torch.randn(1, length, heads, channels, generator=generator) for heads, channels in shapes]


@pytest.mark.parametrize(("n", "k", "width"), [(4, 2, 128), (4, 2, 96), (3, 1, 32), (2, 2, 4)])
def test_heads_as_the_kernels_take_them(n: int, k: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys are not repeated and values not padded, except below the kernels' least width; equal to the plain way."""
    seen: dict[str, Any] = {}
    real = flex.flex_attention()

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.update(options, shapes=[tuple(x.shape) for x in (q, k, v)])
        return real(q, k, v, **options)

    monkeypatch.setattr(flex, "flex_attention", lambda: spy)
    model = tiny_model()
    batch, _ = random_batch(model.input_spec, seed=3)
    where = (batch.document_ids[:1], batch.image_ids[:1])
    length = where[0].shape[1]
    q, key, v = heads_of(n, k, width, length)
    out = FlexAttention(*where)(q, key, v, width**-0.5)
    wide, narrow = max(LEAST, 2 * width), max(LEAST, width)
    assert seen["shapes"] == [(1, n, length, wide), (1, k, length, wide), (1, k, length, narrow)]
    assert seen["enable_gqa"] is (n != k) and seen["kernel_options"] is None
    expected = EagerAttention(*where)(q, key, v, width**-0.5)
    real_tokens = where[0] != PADDING
    assert out.shape == (1, length, n, width)
    assert torch.allclose(out[real_tokens], expected[real_tokens], atol=1e-5)


def test_tiles_are_for_wide_heads_of_a_hopper_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append(options["kernel_options"])
        return v

    monkeypatch.setattr(flex, "flex_attention", lambda: spy)
    ids = torch.zeros(1, 128, dtype=torch.int64)
    attend = FlexAttention(ids, ids - 1)
    assert not attend.hopper
    attend.hopper = True
    for width, dtype in ((128, torch.bfloat16), (128, torch.float32), (64, torch.bfloat16)):
        attend(*(x.to(dtype) for x in heads_of(2, 2, width, 128)), 1.0)
    assert seen == [WIDE_TILES, None, None]
    # What torch demands of them: tiles divide the mask's blocks and each other.
    tiles = [WIDE_TILES[f"bwd_BLOCK_{name}"] for name in ("M1", "N1", "M2", "N2")]
    assert all(128 % size == 0 for size in tiles) and tiles[1] % tiles[0] == tiles[2] % tiles[3] == 0


@torch._dynamo.config.patch(recompile_limit=8)
def test_other_lengths_compile_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve lengths are past the eight variants that the compiler allows by default: two graphs do for all of them."""
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(flex.flex_attention(), fullgraph=True, backend="eager")
    monkeypatch.setattr(flex, "flex_attention", lambda: compiled)
    graphs = []
    for number in range(12):
        length = 130 + 7 * number
        ids = torch.zeros(1, length, dtype=torch.int64)
        with torch.no_grad():
            FlexAttention(ids, ids - 1)(*heads_of(2, 1, 16, length), 0.25)
        graphs.append(counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    assert graphs[0] == 1 and graphs[1:] == [2] * 11


def test_a_mask_reads_nothing_from_its_device() -> None:
    """Fake tensors of a GPU have no values, so whatever would wait for one raises here; blocks are of 128 tokens."""
    with FakeTensorMode():
        ids = torch.zeros(2, 512, dtype=torch.int64, device="cuda")
        mask = block_mask(ids, ids - 1, window=64, compiled=False)
    assert mask.BLOCK_SIZE == (128, 128) and mask.kv_indices.shape == (2, 1, 4, 4)
    assert mask.kv_indices.device.type == mask.full_kv_num_blocks.device.type == "cuda"
