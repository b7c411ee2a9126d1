"""Packing samples into rows: what a batch holds, and each fault named."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from builders import image_tokens, random_batch, random_image, random_sample, tiny_model
from torch import Tensor

from neo_components import Batch, InputSpec, Sample, pack
from neo_components.components.ropes.native import Native
from neo_components.data.packing import patchify
from neo_components.types import LISTS

SPEC = InputSpec(
    image_token_id=10, image_start_id=11, image_end_id=12, vocab_size=10, patch_size=2, fold=2, channels=1,
    index_rule=Native().positions,
)  # fmt: skip


def image(rows: int, columns: int) -> Tensor:
    """[1, H, W] pixels that count up."""
    return torch.arange(16.0 * rows * columns).view(1, 4 * rows, 4 * columns)


def test_a_row_by_hand() -> None:
    first = Sample(torch.tensor([1, 11, 10, 10, 12, 2, 3]), torch.tensor([-100] * 5 + [2, 3]), [image(1, 2)], "one")
    second = Sample(torch.tensor([4, 11, 10, 12, 5]), torch.tensor([4, -100, -100, -100, 5]), [image(1, 1)], "two")
    batch = pack([first, second], SPEC, loss_reduction="square", seq_len=14)
    assert batch.token_ids.tolist() == [[1, 11, 10, 10, 12, 2, 3, 4, 11, 10, 12, 5, 0, 0]]
    assert batch.document_ids.tolist() == [[0] * 7 + [1] * 5 + [-1] * 2]
    assert batch.image_ids.tolist() == [[-1, -1, 0, 0, -1, -1, -1, -1, -1, 1, -1, -1, -1, -1]]
    assert batch.positions[0, :, 0].tolist() == [0, 1, 2, 2, 3, 4, 5, 0, 1, 2, 3, 4, 0, 0]
    assert batch.positions[0, :, 1].tolist() == [0] * 14
    assert batch.positions[0, :, 2].tolist() == [0, 0, 0, 1] + [0] * 10
    # The second document's first token would be predicted by the first document, so it is not learnt.
    assert batch.labels.tolist() == [[-100] * 5 + [2, 3] + [-100] * 4 + [5] + [-100] * 2]
    half = 2**-0.5
    assert batch.loss_weights[0].tolist() == pytest.approx([0] * 5 + [half, half] + [0] * 4 + [1, 0, 0])
    assert batch.keys == [["one", "two"]]
    assert second.labels is not None
    assert second.labels[0] == 4


def test_patches_by_hand() -> None:
    """The four patches of a visual token are neighbours; each is read (channel, y, x)."""
    patches, places = patchify([image(1, 2)], SPEC)
    assert patches.tolist() == [
        [0, 1, 8, 9], [2, 3, 10, 11], [16, 17, 24, 25], [18, 19, 26, 27],
        [4, 5, 12, 13], [6, 7, 14, 15], [20, 21, 28, 29], [22, 23, 30, 31],
    ]  # fmt: skip
    assert places.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]


@pytest.mark.parametrize("size", [(8, 1, 3), (14, 2, 3), (4, 3, 2)])
def test_patches_hold_every_pixel_at_its_place(size: tuple[int, int, int]) -> None:
    patch_size, fold, channels = size
    spec = InputSpec(0, 1, 2, 3, patch_size, fold, channels, Native().positions)
    generator = torch.Generator().manual_seed(0)
    images = [random_image(spec, grid, generator) for grid in ((2, 3), (1, 1))]
    patches, places = patchify(images, spec)
    number = 0
    for picture in images:
        again = torch.zeros_like(picture)
        rows, columns = picture.shape[1] // patch_size, picture.shape[2] // patch_size
        for patch, place in zip(patches[number:][: rows * columns], places[number:][: rows * columns], strict=True):
            y, x = (place * patch_size).tolist()
            again[:, y : y + patch_size, x : x + patch_size] = patch.view(channels, patch_size, patch_size)
        assert torch.equal(again, picture)
        number += rows * columns
    assert number == len(patches) == len(places)


TEXT = torch.tensor([1, 2, 3])
ONE_IMAGE = torch.tensor([1, 11, 10, 10, 12, 2])


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (Sample(torch.tensor([[1, 2]])), r"token_ids must be \[L\] with L > 0, got shape \(1, 2\)"),
        (Sample(torch.tensor([], dtype=torch.int64)), r"got shape \(0,\)"),
        (Sample(torch.tensor([1, 13])), r"token id 13 is out of range; the vocabulary has 10 tokens"),
        (Sample(torch.tensor([1, -1])), r"token id -1 is out of range"),
        (Sample(ONE_IMAGE), r"2 image tokens \(id 10\), but its 0 images give 0 visual tokens"),
        (Sample(ONE_IMAGE, images=[image(1, 1)]), r"2 image tokens .* 1 images give 1 visual tokens \[1\]"),
        (Sample(ONE_IMAGE, images=[image(1, 2)] * 2), r"2 image tokens .* 2 images give 4 visual tokens \[2, 2\]"),
        (Sample(TEXT, images=[image(1, 1)]), r"0 image tokens .* 1 images give 1 visual tokens"),
        (
            Sample(torch.tensor([10, 10, 10, 1, 10]), images=[image(1, 2), image(2, 1)]),
            r"runs of image tokens \(id 10\) do not match its images, which give \[2, 2\]",
        ),
        (Sample(torch.tensor([10, 1, 10]), images=[image(1, 2)]), r"each image needs one unbroken run"),
        (
            Sample(ONE_IMAGE, images=[image(1, 2)[:, :3]]),
            r"shape \(1, 3, 8\); it must be \[1, H, W\] .* multiples of 4",
        ),
        (
            Sample(ONE_IMAGE, images=[image(1, 2).expand(3, -1, -1)]),
            r"image of shape \(3, 4, 8\); it must be \[1, H, W\]",
        ),
        (Sample(ONE_IMAGE, images=[image(1, 2)[0]]), r"image of shape \(4, 8\)"),
        (Sample(TEXT, torch.tensor([1, 2])), r"\(2,\) labels for \(3,\) token ids"),
        (Sample(TEXT, torch.tensor([-100, 2, 10])), r"label 10 is out of range; .*image tokens cannot be targets"),
        (Sample(TEXT, torch.tensor([-100, -5, 3])), r"label -5 is out of range"),
    ],
)
def test_faults_are_named(sample: Sample, message: str) -> None:
    with pytest.raises(ValueError, match=f"^sample 1: .*{message}"):
        pack([Sample(TEXT), sample], SPEC)
    sample.key = "cats/007"
    with pytest.raises(ValueError, match=f"^sample 'cats/007': .*{message}"):
        pack([Sample(TEXT), sample], SPEC)


def test_faults_of_the_row_are_named() -> None:
    with pytest.raises(ValueError, match="loss_reduction must be one of token, sample, square, got 'mean'"):
        pack([Sample(TEXT)], SPEC, loss_reduction="mean")
    with pytest.raises(ValueError, match="at least one sample"):
        pack([], SPEC)
    with pytest.raises(ValueError, match="6 tokens do not fit a row of 5"):
        pack([Sample(TEXT), Sample(TEXT)], SPEC, seq_len=5)
    assert pack([Sample(TEXT), Sample(TEXT)], SPEC, seq_len=6).token_ids.shape == (1, 6)


def test_neighbouring_images_need_no_token_between() -> None:
    batch = pack([Sample(torch.tensor([10, 10, 10, 1]), images=[image(1, 2), image(1, 1)])], SPEC)
    assert batch.image_ids.tolist() == [[0, 0, 1, -1]]


def test_stack_keeps_every_row() -> None:
    """Stacked rows give each row's own outputs; their patches follow one another."""
    model = tiny_model()
    spec = model.input_spec
    samples = [[random_sample(spec, 10 * row + n, images=row) for n in range(2)] for row in range(3)]
    length = max(sum(len(sample.token_ids) for sample in row) for row in samples)
    rows = [pack(row, spec, seq_len=length) for row in samples]
    batch = Batch.stack(rows)
    assert batch.token_ids.shape == (3, length)
    assert batch.keys == [row.keys[0] for row in rows]
    with torch.no_grad():
        together = model.hidden(batch)
        for n, row in enumerate(rows):
            assert torch.allclose(together[n], model.hidden(row)[0], atol=1e-5)
            for field in ("positions", "labels", "loss_weights", "document_ids", "image_ids"):
                assert torch.equal(getattr(batch, field)[n], getattr(row, field)[0])


def test_stack_refuses_rows_of_different_lengths() -> None:
    rows = [pack([Sample(TEXT)], SPEC), pack([Sample(TEXT)], SPEC, seq_len=7)]
    with pytest.raises(ValueError, match=r"equally long, got lengths \[3, 7\]; set seq_len"):
        Batch.stack(rows)


def test_to_moves_every_tensor() -> None:
    batch, _ = random_batch(tiny_model().input_spec, seed=0)
    moved = batch.to("meta")
    assert all(getattr(moved, field.name).is_meta for field in fields(Batch) if field.name not in LISTS)
    assert all(getattr(moved, name) == getattr(batch, name) for name in LISTS)
    assert moved.keys == batch.keys
    assert not batch.token_ids.is_meta


def test_inference_samples_have_no_labels() -> None:
    ids = torch.tensor([1, *image_tokens(SPEC, (1, 2))])
    batch = pack([Sample(ids, images=[image(1, 2)])], SPEC)
    assert (batch.labels == -100).all()
    assert not batch.loss_weights.any()
