"""Who sees whom and where each token stands: each rendering against a plain reading, positions written by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import pytest
import torch
from builders import (
    MRope,
    document_of,
    image_tokens,
    plain_tokens,
    random_batch,
    random_image,
    set_backend,
    tiny_model,
)
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

from neo_components import NEO, InputSpec, Sample, pack
from neo_components.components.document_attention import make_buckets
from neo_components.components.masks import Tokens, block_mask, dense_mask, span_mask
from neo_components.components.ropes.native import Native
from neo_components.components.ropes.one_dimensional import OneDimensional
from neo_components.components.rotary import H, PairTable, Rotary, T, W, section
from neo_components.registry import MASKS, ROPES
from neo_components.token_indices import Span, document_spans
from neo_components.types import NO_IMAGE, PADDING


def plain_mask(
    rows: Sequence[Sequence[Sample]], spec: InputSpec, length: int, rule: str, window: int | None = None
) -> Tensor:
    """[B, L, L] bool, the rule read in words, pair by pair; padding neither sees nor is seen."""
    mask = torch.zeros(len(rows), length, length, dtype=torch.bool)
    for row, samples in enumerate(rows):
        tokens = plain_tokens(samples, spec)
        for query, (document, image) in enumerate(tokens):
            for key, (key_document, key_image) in enumerate(tokens):
                if document == key_document:
                    same_image = image is not None and image == key_image
                    seen = key <= query or (rule == "mixed" and same_image)
                    near = window is None or key > query - window or same_image
                    mask[row, query, key] = seen and near
    return mask


@pytest.fixture(scope="module")
def model() -> NEO:
    return tiny_model()


def spread(document_ids: Tensor, image_ids: Tensor, rule: str, window: int | None, one: bool) -> Tensor:
    """[B, L, L]: the masks of all buckets at the places of their tokens."""
    rows, length = document_ids.shape
    mask = torch.zeros(rows * length, rows * length, dtype=torch.bool)
    for bucket in make_buckets(document_ids, image_ids, rule, window, one):
        n, m = bucket.index.shape
        inner = torch.ones(m, m).tril().bool().expand(n, m, m) if bucket.mask is None else bucket.mask[:, 0]
        for index, length_, see in zip(bucket.index, bucket.lengths.tolist(), inner, strict=True):
            place = index[:length_]
            mask[place[:, None], place[None]] = see[:length_, :length_]
            assert not see[:length_, length_:].any(), "a token sees filling"
    blocks = mask.view(rows, length, rows, length)
    return torch.stack([blocks[row, :, row] for row in range(rows)])


@pytest.mark.parametrize("rule", ["mixed", "causal"])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("window", [None, 1, 4, 11, 500])
def test_renderings(model: NEO, seed: int, rule: str, window: int | None) -> None:
    """Dense, FlexAttention and per document, on rows of several documents of several images with padding."""
    batch, rows = random_batch(model.input_spec, seed, rows=3, documents=4, text=(1, 12))
    expected = plain_mask(rows, model.input_spec, batch.token_ids.shape[1], rule, window)
    real = batch.document_ids != PADDING
    assert (~real).any(dim=1).all()
    assert max(len(sample.images) for row in rows for sample in row) > 1
    where = (batch.document_ids, batch.image_ids, rule, window)

    dense = dense_mask(*where)
    assert torch.equal(dense & real[:, :, None], expected)
    assert dense.any(dim=-1).all()
    blocks = block_mask(*where)
    size = batch.token_ids.shape[1]
    assert torch.equal(create_mask(blocks.mask_mod, len(rows), None, size, size, "cpu")[:, 0], dense)
    assert torch.equal(spread(*where, one=False), expected)
    assert torch.equal(spread(*where, one=True), expected)


def test_block_mask_leaves_out_only_empty_blocks(model: NEO) -> None:
    """Every block of 128 x 128 in which somebody sees somebody is computed, and no other."""
    batch, _ = random_batch(model.input_spec, 7, rows=2, documents=12, text=(10, 60), padding=130)
    length = batch.token_ids.shape[1] // 128 * 128
    assert length >= 512
    dense = dense_mask(batch.document_ids, batch.image_ids)
    blocks = block_mask(batch.document_ids, batch.image_ids)
    used = dense[:, :length, :length].unflatten(1, (-1, 128)).unflatten(3, (-1, 128)).any(dim=4).any(dim=2)
    computed = blocks.to_dense()[:, 0, : length // 128, : length // 128].bool()
    assert torch.equal(computed, used)
    assert not used.all()


def test_spans_and_span_mask_by_hand() -> None:
    document_ids = torch.tensor([[0, 0, 1, 2, 2, 2, -1], [-1, 0, 0, 0, 0, 1, 1]])
    assert document_spans(document_ids) == [
        Span(0, 0, 2), Span(0, 2, 1), Span(0, 3, 3), Span(1, 1, 4), Span(1, 5, 2),
    ]  # fmt: skip
    # A text, two visual tokens of image 5, a text; and a single token with filling that carries rubbish.
    mask = span_mask(torch.tensor([[-1, 5, 5, -1], [-1, 5, 5, 5]]), torch.tensor([4, 1]))
    assert mask.long().tolist() == [
        [[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]],
        [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]],
    ]


def test_mask_by_hand(model: NEO) -> None:
    """``a <img> v v </img> b | v v c``: the second document's image neither sees nor is seen by the first's."""
    spec = model.input_spec
    image = torch.zeros(3, spec.factor, 2 * spec.factor)
    first = Sample(torch.tensor([1, *image_tokens(spec, (1, 2)), 2]), images=[image])
    second = Sample(torch.tensor([*image_tokens(spec, (1, 2), boundary=False), 3]), images=[image])
    batch = pack([first, second], spec)
    assert batch.image_ids[0].tolist() == [-1, -1, 0, 0, -1, -1, 1, 1, -1]
    seen = ["1", "11", "1111", "1111", "11111", "111111", "00000011", "00000011", "000000111"]
    expected = torch.tensor([[int(bit) for bit in row.ljust(9, "0")] for row in seen]).bool()
    assert torch.equal(dense_mask(batch.document_ids, batch.image_ids)[0], expected)


def test_a_registered_rule_reaches_every_backend() -> None:
    """A rule of the user's own, only the nearest four tokens, is computed alike by all backends."""
    name = "window-of-four"

    @MASKS.register(name)
    def window(query: Tokens, key: Tokens) -> Tensor:
        near = query.position - key.position
        return (query.document == key.document) & (near >= 0) & (near < 4)

    try:
        model = tiny_model(attention=name)
        batch, _ = random_batch(model.input_spec, 3)
        real = batch.document_ids != PADDING
        with torch.no_grad():
            states = {}
            for backend in ("sdpa", "eager"):
                set_backend(model, backend)
                states[backend] = model.hidden(batch)[real]
        assert torch.allclose(states["sdpa"], states["eager"], atol=1e-5)
        weights = model.attention_maps(batch)[0]
        assert int((weights[0, 0, 10] > 0).sum()) <= 4
    finally:
        MASKS.remove(name)
    with pytest.raises(ValueError, match=r"'window-of-four' is unknown; registered: .*causal, mixed"):
        MASKS[name]
    with pytest.raises(ValueError, match="'window-of-four' is unknown"):
        tiny_model(attention=name)


# 3 text, one 2 x 3 image, 2 text, without boundary tokens.
WORKED = torch.tensor([NO_IMAGE] * 3 + [0] * 6 + [NO_IMAGE] * 2)
CELLS = [(h, w) for h in range(2) for w in range(3)]


def test_native_positions_by_hand() -> None:
    text = [(0, 0, 0), (1, 0, 0), (2, 0, 0)]
    expected = [*text, *((3, h, w) for h, w in CELLS), (4, 0, 0), (5, 0, 0)]
    assert Native().positions(document_of(WORKED, [(2, 3)])).tolist() == [list(p) for p in expected]


def test_native_positions_with_boundary_tokens_by_hand(model: NEO) -> None:
    """The same content between ``<img>`` and ``</img>``; and the example of four patches of NEO's figure 3."""
    spec = model.input_spec
    image = torch.zeros(3, 2 * spec.factor, 3 * spec.factor)
    worked = Sample(torch.tensor([1, 2, 3, *image_tokens(spec, (2, 3)), 4, 5]), images=[image])
    square = torch.zeros(3, 2 * spec.factor, 2 * spec.factor)
    figure = Sample(torch.tensor([1, 2, *image_tokens(spec, (2, 2))]), images=[square])
    batch = pack([worked, figure], spec)
    text = [(0, 0, 0), (1, 0, 0), (2, 0, 0)]
    expected = [*text, (3, 0, 0), *((4, h, w) for h, w in CELLS), (5, 0, 0), (6, 0, 0), (7, 0, 0)]
    expected += [(0, 0, 0), (1, 0, 0), (2, 0, 0), (3, 0, 0), (3, 0, 1), (3, 1, 0), (3, 1, 1), (4, 0, 0)]
    assert batch.positions[0].tolist() == [list(p) for p in expected]


def test_neighbouring_images_take_two_steps() -> None:
    positions = Native().positions(document_of(torch.tensor([0, 0, 1, 1, NO_IMAGE]), [(1, 2), (2, 1)]))
    assert positions.tolist() == [[0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 1, 0], [2, 0, 0]]


def test_sequential_positions_by_hand() -> None:
    assert OneDimensional().positions(document_of(WORKED, [(2, 3)])).tolist() == [[n] * 3 for n in range(11)]


def test_native_frequencies_by_hand() -> None:
    """Head width 16, bases 1e6 and 1e4."""
    own = section(T, 16, 1e6).frequency
    table = Native(1e4, 1e4).table(own)
    assert table.axis == (T,) * 8 + (H,) * 4 + (W,) * 4
    t = [1, 0.17783, 0.031623, 0.0056234, 0.001, 1.7783e-4, 3.1623e-5, 5.6234e-6]
    assert table.frequency == pytest.approx([*t, *[1, 0.1, 0.01, 0.001] * 2], rel=1e-4)
    other = Native(1e6, 1e4).table(own)
    assert other.frequency[8:12] == pytest.approx([1, 0.031623, 0.001, 3.1623e-5], rel=1e-4)


@pytest.fixture(scope="module")
def m_rope() -> Iterator[str]:
    """M-RoPE, registered from here as data."""
    name = "m-rope-of-this-test"
    ROPES.register(name)(MRope)
    yield name
    ROPES.remove(name)


def test_another_rope_by_hand(m_rope: str) -> None:
    """The same content and head width under M-RoPE."""
    expected = [(n, n, n) for n in range(3)] + [(3, 3 + h, 3 + w) for h, w in CELLS] + [(6, 6, 6), (7, 7, 7)]
    assert ROPES[m_rope]().positions(document_of(WORKED, [(2, 3)])).tolist() == [list(p) for p in expected]
    rotary = Rotary(m_rope, 16, 1e6, 1e4, 1e4)
    assert rotary.axis.tolist() == [T, T, H, H, H, W, W, W] * 2
    cosines, _ = rotary(torch.tensor([[[3, 100, 1000]]]))
    f = [1, 0.17783, 0.031623, 0.0056234, 0.001, 1.7783e-4, 3.1623e-5, 5.6234e-6]
    angles = [3 * f[0], 3 * f[1], 100 * f[2], 100 * f[3], 100 * f[4], 1000 * f[5], 1000 * f[6], 1000 * f[7]]
    assert torch.allclose(cosines.flatten(), torch.tensor(angles * 2).cos(), atol=1e-4)


def test_another_rope_runs_in_the_model(m_rope: str) -> None:
    """It packs, trains and generates; later blocks stand wholly behind earlier ones."""
    model = tiny_model(rope=m_rope, head_width=16)
    batch, _ = random_batch(model.input_spec, 5)
    model.loss(batch).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    for number in range(int(batch.image_ids[0].max()) + 1):
        inside = batch.image_ids[0] == number
        same_document = batch.document_ids[0] == batch.document_ids[0][inside][0]
        place = torch.arange(len(inside))
        before = batch.positions[0][same_document & (place < place[inside][0])]
        after = batch.positions[0][same_document & (place > place[inside][-1])]
        assert before.max() < batch.positions[0][inside].min()
        assert batch.positions[0][inside].max() < after.min()


def test_replicating_ropes_agree_on_text(m_rope: str) -> None:
    """A text-only sequence under M-RoPE equals 1D exactly."""
    texts = torch.randint(0, 50, (2, 12))
    models = [tiny_model(rope=rope, head_width=16) for rope in ("1d", m_rope)]
    with torch.no_grad():
        one, other = (model.post_llm.text_logits(texts) for model in models)
    assert torch.equal(one, other)


@pytest.mark.parametrize("rope", ["native", "1d"])
def test_scaling_and_rest_concern_the_t_channels(rope: str) -> None:
    """Of 8 T pairs 6 turn, stretched and louder; 2 rest; those of H and W stay as they are."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 1.5}
    where = torch.tensor([[[7, 3, 5]]])
    one = [part.flatten() for part in Rotary(rope, 16, 1e4, 1e4, 1e3)(where)]
    cosines, sines = (part.flatten() for part in Rotary(rope, 16, 1e4, 1e4, 1e3, yarn, 12)(where))
    assert torch.allclose(cosines[:6].square() + sines[:6].square(), torch.full((6,), 1.5**2))
    assert cosines[6:8].tolist() == [1, 1] and sines[6:8].tolist() == [0, 0]
    assert torch.allclose(cosines[8:].square() + sines[8:].square(), torch.ones(8))
    if rope == "native":
        assert torch.equal(cosines[8:], one[0][8:]) and torch.equal(sines[8:], one[1][8:])
    assert cosines[0] == pytest.approx(1.5 * math.cos(7)) and sines[5] < 1.5 * math.sin(7 * 1e4 ** (-10 / 12))


def test_unknown_rope_is_named() -> None:
    with pytest.raises(ValueError, match=r"rope 'spiral' is unknown; registered: 1d, .*native"):
        tiny_model(rope="spiral")


def test_a_table_of_the_wrong_length_is_refused() -> None:
    name = "short"

    @ROPES.register(name)
    class Short(Native):
        def table(self, frequency_t: Sequence[float]) -> PairTable:
            return section(T, 2 * len(frequency_t), 1e4)

    try:
        with pytest.raises(
            ValueError, match="rope 'short' gives 4 axes and 4 frequencies, not one each for the 8 pairs"
        ):
            tiny_model(rope=name)
    finally:
        ROPES.remove(name)


def test_native_places_equal_cells_of_two_images_alike(model: NEO) -> None:
    """H and W differences at equal cells are zero whatever text lies between."""
    spec, generator = model.input_spec, torch.Generator().manual_seed(0)
    for between in (0, 1, 17):
        ids = [*image_tokens(spec, (2, 3)), *[1] * between, *image_tokens(spec, (2, 3)), 2]
        batch = pack([Sample(torch.tensor(ids), images=[random_image(spec, (2, 3), generator) for _ in "ab"])], spec)
        first, second = (batch.positions[0][batch.image_ids[0] == number] for number in (0, 1))
        assert torch.equal(first[:, [H, W]], second[:, [H, W]])
        assert torch.equal(second[:, T] - first[:, T], torch.full((6,), between + 3))


@pytest.mark.parametrize("axis", [T, H, W])
@pytest.mark.parametrize("rope", ["native", "1d"])
def test_scores_depend_on_differences_only(rope: str, axis: int) -> None:
    """Adding a constant to one axis of every token leaves all attention weights unchanged."""
    model = tiny_model(rope=rope)
    batch, _ = random_batch(model.input_spec, 11)
    before = model.attention_maps(batch)
    batch.positions[..., axis] += 9
    after = model.attention_maps(batch)
    assert max(float((a - b).abs().max()) for a, b in zip(before, after, strict=True)) < 1e-5


def test_each_axis_matters() -> None:
    """What makes the test above worth something: moving only some tokens along any axis changes the weights."""
    model = tiny_model()
    batch, _ = random_batch(model.input_spec, 11)
    before = model.attention_maps(batch)[0]
    for axis in (T, H, W):
        moved = batch.positions.clone()
        moved[:, ::2, axis] += 9
        after = model.attention_maps(type(batch)(**(vars(batch) | {"positions": moved})))[0]
        assert float((before - after).abs().max()) > 1e-3


def test_angles_stay_float32_in_a_half_precision_model() -> None:
    """Rounding the frequencies to bfloat16 would shift far positions by whole turns."""
    rotary = Rotary("native", 16, 1e6, 1e4, 1e4)
    positions = torch.randint(0, 5000, (1, 40, 3))
    expected = rotary(positions)
    for kind in (torch.bfloat16, torch.float16, torch.float64):
        for ours, theirs in zip(rotary.to(kind)(positions), expected, strict=True):
            assert torch.equal(ours, theirs), kind
