"""Figures: what is drawn is checked by counting the pixels of its colors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor
from torch import Tensor

from neo_components.data import load_image
from neo_components.viewers import draw_answers, draw_attention, draw_curves, draw_mask
from neo_components.viewers.figure import BLUE, FAINT, GREEN, ORANGE, RED, to_pixels
from neo_components.viewers.masks import _apart, _runs


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert round(image.info["dpi"][0]) == 150
        return np.asarray(image.convert("RGB"))


def count(picture: np.ndarray, colour: str) -> int:
    """Pixels of exactly this colour."""
    return int((picture == ImageColor.getrgb(colour)).all(-1).sum())


def mixed_mask(length: int = 10, image: tuple[int, int] = (2, 7)) -> Tensor:
    """One document with one image."""
    mask = torch.ones(length, length).tril().bool()
    mask[image[0] : image[1], image[0] : image[1]] = True
    return mask


def test_mask_shows_each_kind_of_cell_in_proportion(tmp_path: Path) -> None:
    mask = mixed_mask()
    labels = ["<|im_start|>", "<img>", *["<IMG_CONTEXT>"] * 5, "</img>", "what$", "\n"]
    path = draw_mask(mask, tmp_path / "new" / "mask.png", labels, "one image")
    assert path == tmp_path / "new" / "mask.png"
    picture = pixels(path)
    cells = {BLUE: 55, ORANGE: 10, FAINT: 35}
    # The legend's own patches are about half a cell, so each area is measured against the largest.
    cell = count(picture, BLUE) / cells[BLUE]
    for colour, number in cells.items():
        assert count(picture, colour) == pytest.approx(number * cell, abs=1.0 * cell), colour


def test_causal_mask_has_no_colour_for_later_tokens(tmp_path: Path) -> None:
    picture = pixels(draw_mask(torch.ones(5, 5).tril().bool(), tmp_path / "mask.png"))
    assert count(picture, ORANGE) == 0
    assert count(picture, BLUE) > 0


def test_labels_of_a_mask() -> None:
    assert _runs(["a", " b", " b", "\n"], 4) == [("a", 1), ("␣b", 2), ("↵", 1)]
    assert _runs([("text 1", 3), ("image", 4)], 7) == [("text 1", 3), ("image", 4)]
    edges = np.cumsum([0, 1, 1, 50, 1, 47])
    assert _apart(edges, 0.5) == [0, 1, 2, 3, 4]
    assert _apart(edges, 3.0) == [0, 2, 3, 4]


def test_long_mask(tmp_path: Path) -> None:
    path = draw_mask(mixed_mask(300, (10, 266)), tmp_path / "mask.png", [("text", 10), ("image", 256), ("text", 34)])
    assert max(pixels(path).shape) < 2000


@pytest.mark.parametrize(
    ("mask", "labels", "message"),
    [
        (torch.ones(2, 3), None, r"got shape \(2, 3\)"),
        (torch.ones(0, 0), None, r"got shape \(0, 0\)"),
        (torch.ones(3, 3), ["a"], "cover 1 tokens, the mask has 3"),
        (torch.ones(3, 3), [("a", 3), ("b", 0)], "label each token once"),
    ],
)
def test_mask_refuses(tmp_path: Path, mask: Tensor, labels: list[str] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_mask(mask, tmp_path / "mask.png", labels)


def test_normalized_image_is_shown_in_its_own_colors() -> None:
    original = Image.new("RGB", (64, 32), (200, 30, 120))
    shown = to_pixels(load_image(original, 32, 32 * 64, 32 * 64))
    assert shown.shape == (32, 64, 3)
    assert np.array_equal(shown, np.asarray(original))
    assert np.array_equal(to_pixels(original), np.asarray(original))
    raw = torch.from_numpy(np.array(original)).permute(2, 0, 1)
    assert np.array_equal(to_pixels(raw), np.asarray(original))  # as shards give it to training
    with pytest.raises(ValueError, match=r"\[3, H, W\], got shape \(1, 4, 4\)"):
        to_pixels(torch.zeros(1, 4, 4))


@pytest.mark.parametrize(("size", "grid"), [((64, 64), (2, 2)), ((256, 64), (2, 8)), ((32, 256), (8, 1))])
def test_attention_stands_beside_the_image(tmp_path: Path, size: tuple[int, int], grid: tuple[int, int]) -> None:
    weights = torch.zeros(grid)
    weights[-1, -1] = 1.0
    picture = pixels(draw_attention(Image.new("RGB", size, "red"), weights, tmp_path / "a.png", "$ where"))
    plain = (picture == (255, 0, 0)).all(-1)
    # The picture is plain on the left only; on the right, one cell of all is lit.
    right = np.flatnonzero(plain.any(0)).max()
    assert right < picture.shape[1] / 2
    heated = picture[:, right + 1 :].astype(int)
    lit = (heated[..., 0] > 190) & (heated[..., 1] > 150) & (heated[..., 2] < 60)
    assert lit.sum() == pytest.approx(plain.sum() / weights.numel(), rel=0.3)


def test_attention_refuses_what_it_cannot_draw(tmp_path: Path) -> None:
    for weights in (torch.ones(4), torch.tensor([[float("nan")]])):
        with pytest.raises(ValueError, match="finite numbers"):
            draw_attention(Image.new("RGB", (8, 8)), weights, tmp_path / "a.png")


def test_curves_have_their_own_colors(tmp_path: Path) -> None:
    curves = {"a": (range(5), [5, 4, 3, 2, 1]), "b": (range(200), [float(n % 7) for n in range(200)])}
    picture = pixels(draw_curves(curves, tmp_path / "c.png", "step", "loss"))
    assert count(picture, BLUE) > 500
    assert count(picture, ORANGE) > 500
    assert count(picture, GREEN) == 0
    logarithmic = pixels(draw_curves({"a": ([1, 2], [1.0, 1000.0])}, tmp_path / "l.png", "step", "loss", log=True))
    linear = pixels(draw_curves({"a": ([1, 2], [1.0, 1000.0])}, tmp_path / "n.png", "step", "loss"))
    assert logarithmic.shape != linear.shape or (logarithmic != linear).any()


def test_curves_refuse_what_they_cannot_draw(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no curve"):
        draw_curves({}, tmp_path / "c.png", "x", "y")
    with pytest.raises(ValueError, match="curve 'a' has 2 x and 1 y values"):
        draw_curves({"a": ([1, 2], [1])}, tmp_path / "c.png", "x", "y")
    with pytest.raises(ValueError, match=r"ends in \.png"):
        draw_curves({"a": ([1], [1])}, tmp_path / "c.pdf", "x", "y")


def test_answers_are_framed_by_whether_they_are_right(tmp_path: Path) -> None:
    image = Image.new("RGB", (64, 64), "white")
    right = (image, "what is it? " * 20, "a very long accepted answer indeed", "", True)
    wrong = (image, "is it $5?", "no", "yes", False)
    frame = count(pixels(draw_answers([right], tmp_path / "one.png")), GREEN)
    picture = pixels(
        draw_answers([right, wrong, right, wrong, wrong, right, right, right], tmp_path / "eight.png", "8")
    )
    assert count(picture, GREEN) == pytest.approx(5 * frame, rel=0.15)
    assert count(picture, RED) == pytest.approx(3 * frame, rel=0.15)
    for answers in ([], [right] * 9):
        with pytest.raises(ValueError, match=f"shows 1 to 8 answers, got {len(answers)}"):
            draw_answers(answers, tmp_path / "x.png")


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    first, second = (draw_mask(mixed_mask(), tmp_path / name) for name in ("1.png", "2.png"))
    assert first.read_bytes() == second.read_bytes()


def test_viewers_leave_pyplot_alone(tmp_path: Path) -> None:
    program = (
        "import sys, torch, neo_components.viewers as v\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"v.draw_mask(torch.ones(3, 3).bool(), {str(tmp_path / 'm.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.filterwarnings("error:Glyph")
def test_control_characters_in_answers_are_written_as_escapes(tmp_path: Path) -> None:
    """An untrained model answers them too, and no font has them."""
    picture = torch.zeros(3, 32, 32)
    odd, plain = (
        draw_answers([(picture, "what?", "a", answer, False)], tmp_path / f"{name}.png")
        for name, answer in {"odd": "\x07\x1b", "plain": "\\x07\\x1b"}.items()
    )
    assert odd.read_bytes() == plain.read_bytes()


def test_a_character_that_the_font_lacks_is_a_box(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """A model may answer in any script; drawing its answer prints no warning."""
    path = draw_mask(torch.ones(2, 2).tril().bool(), tmp_path / "mask.png", ["ษ", "b"])
    assert path.stat().st_size > 0
    assert not [entry for entry in recwarn if "Glyph" in str(entry.message)]
