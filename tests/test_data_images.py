"""Images: parity with the reference, and every kind of file that cannot be used."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from shard_builders import gigantic_png, png, truncated_png

from neo_components.data import load_image, max_pixels_per_image, smart_resize
from neo_components.data.image.augment import Augment
from neo_components.data.image.decoding import decode
from neo_components.data.image.files import ImageError, open_image
from neo_components.data.image.images import IMAGE_MEAN, IMAGE_STD, resize, resize_fast
from neo_components.data.packing import normalize, patchify
from neo_components.types import InputSpec

LIMITS = {"min_pixels": 4096, "max_pixels": 16384}


def cases_of(folder: Path, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "preprocessing" / name).read_text())
    return found


def patches(image: torch.Tensor, size: int) -> torch.Tensor:
    """Patches row by row, each (channel, y, x): a plain reading of the reference's layout."""
    _, height, width = image.shape
    places = [(y, x) for y in range(0, height, size) for x in range(0, width, size)]
    return torch.stack([image[:, y : y + size, x : x + size].flatten() for y, x in places])


def test_smart_resize_equals_reference(data_folder: Path) -> None:
    cases = cases_of(data_folder, "smart_resize.json")
    assert len(cases) == 200
    for case in cases:
        arguments = [case[name] for name in ("height", "width", "factor", "min_pixels", "max_pixels")]
        if case["error"]:
            with pytest.raises(ValueError, match="aspect ratio over 200"):
                smart_resize(*arguments)
        else:
            assert list(smart_resize(*arguments)) == case["result"], case


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 5, 32, 1, 2), "5x0 pixels is empty"),
        ((5, -1, 32, 1, 2), "is empty"),
        ((5, 5, 0, 1, 2), "factor >= 1"),
        ((5, 5, 32, 3, 2), "min_pixels=3"),
        ((5, 5, 32, 0, 2), "min_pixels=0"),
    ],
)
def test_smart_resize_refuses_impossible_sizes(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        smart_resize(*arguments)


@pytest.mark.parametrize("transparency", ["drop", "contrast"])
def test_pixels_equal_reference(data_folder: Path, transparency: str) -> None:
    expected = load_file(data_folder / "preprocessing" / "images.safetensors")
    for case in cases_of(data_folder, "images.json"):
        path = data_folder / "preprocessing" / case["file"]
        limits = {name: case[name] for name in ("factor", "min_pixels", "max_pixels")}
        image = load_image(path, transparency=transparency, **limits)
        assert list(image.shape) == [3, *case["resized"]]
        key = f"{case['name']}.pixel_values"
        if transparency == "contrast":
            key = f"{key}_composited" if f"{key}_composited" in expected else key
        assert torch.equal(patches(image, 16), expected[key])
        if transparency == "drop":
            mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGE_MEAN, IMAGE_STD))
            restored = (image * std + mean) * 255
            assert torch.equal(restored.round().byte().permute(1, 2, 0), expected[f"{case['name']}.resized_rgb"])


def test_every_kind_of_source_gives_the_same_pixels(data_folder: Path) -> None:
    path = data_folder / "preprocessing" / "images" / "wide_rgb.png"
    expected = load_image(path, **LIMITS)
    for source in (str(path), path.read_bytes(), Image.open(path)):
        assert torch.equal(load_image(source, **LIMITS), expected)


def test_contrast_shows_black_on_transparent() -> None:
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 64, 32))
    dropped, shown = (load_image(image, **LIMITS, transparency=way) for way in ("drop", "contrast"))
    assert torch.equal(dropped, dropped[:, :1, :1].expand_as(dropped))  # black all over
    white = (1 - torch.tensor(IMAGE_MEAN)) / torch.tensor(IMAGE_STD)
    assert torch.allclose(shown[:, -1, 0], white, atol=1e-6)
    assert torch.equal(shown[:, 0, 0], dropped[:, 0, 0])
    # Neither an opaque nor an invisible image has a background to fill.
    for plain in (Image.new("RGBA", (64, 64), (9, 9, 9, 255)), Image.new("RGBA", (64, 64), (9, 9, 9, 0))):
        assert torch.equal(load_image(plain, **LIMITS, transparency="contrast"), load_image(plain, **LIMITS))


def test_several_images_share_the_pixels(data_folder: Path) -> None:
    assert max_pixels_per_image(1, 4096, 16384) == 16384
    assert max_pixels_per_image(2, 4096, 16384) == 16384
    assert max_pixels_per_image(3, 4096, 16384) == 10922
    assert max_pixels_per_image(100, 4096, 16384) == 4096
    for case in cases_of(data_folder, "samples.json"):
        limit = max_pixels_per_image(len(case["images"]), case["min_pixels"], case["max_pixels"])
        images = [
            load_image(data_folder / "preprocessing" / name, 32, case["min_pixels"], limit) for name in case["images"]
        ]
        assert [[image.shape[1] // 16, image.shape[2] // 16] for image in images] == case["grid_hw"]
        if images:
            spec = InputSpec(0, 1, 2, 3, 16, 2, 3, lambda ids, grids: ids)
            values = patchify(images, spec)[0].double()
            assert values.mean().item() == pytest.approx(case["pixel_values_mean"], abs=1e-6)
            assert values.abs().mean().item() == pytest.approx(case["pixel_values_abs_mean"], abs=1e-6)


@pytest.mark.parametrize(
    ("data", "reason", "message"),
    [
        (b"", "empty", "0 bytes"),
        (b"not an image", "unreadable", "not a readable image"),
        (pickle.dumps({"a": 1}), "unreadable", "not a readable image"),
        (png()[:20], "unreadable", "not a readable image"),
        (truncated_png(), "truncated", "truncated"),
        (gigantic_png(), "too_large", "60000"),
        (png(2, 402), "aspect_ratio", "402x2 pixels has an aspect ratio over 200"),
    ],
)
def test_unusable_images_are_named(data: bytes, reason: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=message) as found:
        load_image(data, name="the ninth image")
    assert found.value.reason == reason
    assert str(found.value).startswith("the ninth image: ")
    path = tmp_path / "bad.png"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"bad\.png"):
        load_image(path)


def test_zero_sized_image() -> None:
    with pytest.raises(ImageError, match="image of 0x7 pixels is empty") as found:
        load_image(Image.new("RGB", (0, 7)))
    assert found.value.reason == "empty"


def test_bomb_is_refused_before_decoding() -> None:
    image = open_image(png(100, 100), max_decoded_pixels=10_000)
    assert image.size == (100, 100)
    with pytest.raises(ImageError, match="100x101 pixels are over the limit of 10000"):
        load_image(png(101, 100), max_decoded_pixels=10_000)


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.png"):
        load_image(tmp_path / "missing.png")
    with pytest.raises(TypeError, match="got int"):
        load_image(5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="drop, contrast, got 'white'"):
        load_image(png(), transparency="white")  # type: ignore[arg-type]


def test_gray_and_palette_images() -> None:
    gray = Image.new("L", (64, 64), 77)
    buffer = io.BytesIO()
    gray.convert("P").save(buffer, "GIF")
    expected = load_image(gray.convert("RGB"), **LIMITS)
    assert torch.equal(load_image(gray, **LIMITS), expected)
    assert torch.equal(load_image(buffer.getvalue(), **LIMITS), expected)


def jpeg(size: tuple[int, int] = (90, 70), **options: Any) -> bytes:
    data = io.BytesIO()
    noise = torch.randint(0, 256, (size[1], size[0], 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    Image.fromarray(noise.numpy()).resize(size).save(data, "JPEG", **options)
    return data.getvalue()


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0, "quality": 95}])
def test_jpegs_are_decoded_as_pillow_does(options: dict[str, Any]) -> None:
    data = jpeg(**options)
    assert (decode(open_image(data)) == np.asarray(Image.open(io.BytesIO(data)))).all()
    for cut in (data[:-2], data[: len(data) // 2]):
        with pytest.raises(ImageError, match="truncated") as found:
            decode(open_image(cut))
        assert found.value.reason == "truncated"
    gray = io.BytesIO()
    Image.open(io.BytesIO(data)).convert("L").save(gray, "JPEG")
    assert decode(open_image(gray.getvalue())).shape == (70, 90, 3)


def test_raw_pixels_are_normalized_when_packed() -> None:
    """Bit by bit as load_image does."""
    spec = InputSpec(9, 7, 8, 7, 16, 2, 3, lambda ids, grids: torch.zeros(len(ids), 3))
    data = jpeg((192, 128))
    raw = resize(decode(open_image(data)), (64, 96))
    normalized = load_image(data, 32, 64 * 96, 64 * 96)
    assert raw.dtype == torch.uint8 and normalized.shape == raw.shape
    resized = np.asarray(Image.open(io.BytesIO(data)).resize((96, 64), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (IMAGE_MEAN, IMAGE_STD))
    assert (((resized.astype(np.float32) / np.float32(255)) - mean) / std == normalized.numpy()).all()
    for raws in ([raw], [raw, raw.flip(1)]):
        floats = [normalized, normalized.flip(1)][: len(raws)]
        assert torch.equal(patchify(raws, spec)[0], patchify(floats, spec)[0])


def test_fast_resize_is_nearly_exact() -> None:
    pixels = decode(open_image(jpeg((300, 200), quality=90)))
    for size in ((96, 160), (320, 416)):
        difference = (resize(pixels, size).int() - resize_fast(pixels, size).int()).abs()
        assert difference.max() <= 2 and 0 < (difference > 0).float().mean() < 0.01
    assert torch.equal(resize(pixels, (200, 300)), resize_fast(pixels, (200, 300)))


@pytest.mark.parametrize("layout", [(0, 1, 2), (1, 2, 0), (1, 0, 2)])
def test_raw_pixels_are_cut_like_others(layout: tuple[int, int, int]) -> None:
    """However they lie in memory."""
    for patch_size, fold in ((16, 2), (14, 2), (8, 3)):
        spec = InputSpec(9, 7, 8, 7, patch_size, fold, 3, lambda ids, grids: ids)
        raw = torch.randint(0, 256, (3, 2 * patch_size * fold, 3 * patch_size * fold), dtype=torch.uint8)
        lying = raw.permute(layout).contiguous().permute(tuple(np.argsort(layout)))
        floats = normalize(raw.flatten(1).float()).view(raw.shape)
        assert torch.equal(patchify([lying], spec)[0], patchify([floats], spec)[0])


def test_augmentation_is_random_by_its_seed_alone() -> None:
    pixels = decode(open_image(jpeg()))
    assert Augment()(pixels, (1,)) is pixels
    change = Augment(flip=0.5, color=0.3, jpeg_quality=(30, 90))
    state = torch.random.get_rng_state()
    assert (change(pixels, (1, 2)) == change(pixels, (1, 2))).all()
    assert torch.equal(torch.random.get_rng_state(), state)
    versions = {change(pixels, (1, n)).tobytes() for n in range(10)}
    assert len(versions) == 10 and pixels.tobytes() not in versions
    flips = [Augment(flip=0.5)(pixels, (n,)) for n in range(40)]
    mirrored = sum(bool((one == pixels[:, ::-1]).all()) for one in flips)
    assert 8 < mirrored < 32 and all((one == pixels).all() or (one == pixels[:, ::-1]).all() for one in flips)
    with pytest.raises(
        ValueError, match=r"augment\.flip must be from 0 to 1, got 2; augment\.jpeg_quality must be two"
    ):
        Augment(flip=2, jpeg_quality=(90, 30))
