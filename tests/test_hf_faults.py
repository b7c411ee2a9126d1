"""The exported model and processor in this process: what they refuse, and prompts of other templates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import tiny_model
from chat_templates import STYLES, tokenizer_of
from llm_builders import word_tokenizer
from PIL import Image

from neo_components.data import encode_prompt, load_tokenizer
from neo_components.export.hf.configuration_neo import NEOConfig
from neo_components.export.hf.modeling_neo import NEOForConditionalGeneration
from neo_components.export.hf.processing_neo import NEOImageProcessor, NEOProcessor
from neo_components.export.hf.text import CHATML, IMAGES, chat_template
from neo_components.model.layouts import own_config


@pytest.fixture(scope="module")
def model() -> NEOForConditionalGeneration:
    """Image tokens 57, 58 and 59, 8-pixel visual tokens."""
    config = own_config(tiny_model())
    parts = ("patch_embedding", "pre_buffer", "post_llm", "bridge_in", "bridge_out")
    return NEOForConditionalGeneration(NEOConfig(**{name: config[name] for name in parts})).eval()


@pytest.fixture(scope="module")
def processor() -> NEOProcessor:
    tokenizer = word_tokenizer()
    return NEOProcessor(NEOImageProcessor(4, 2, 64, 256), tokenizer, chat_template=chat_template(tokenizer, True))


IDS = torch.tensor([[1, 2, 58, 57, 57, 59, 3]])
GRID = torch.tensor([[2, 4]])


def call(model: Any, ids: torch.Tensor = IDS, patches: int = 8, **inputs: Any) -> Any:
    """The model on one image of 1 x 2 visual tokens."""
    pixels = {"pixel_values": torch.zeros(patches, 48), "image_grid_hw": GRID}
    with torch.no_grad():
        return model(input_ids=ids, **pixels | inputs)


def test_it_runs(model: Any) -> None:
    assert call(model).logits.shape == (1, 7, 60)
    assert call(model, logits_to_keep=2).logits.shape == (1, 2, 60)
    assert isinstance(call(model, return_dict=False), tuple)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"image_grid_hw": None, "pixel_values": None}, r"row 0: 2 image tokens \(id 57\), but its 0 images"),
        ({"image_grid_hw": GRID * 2, "patches": 32}, "but its 1 images give 8 visual tokens"),
        ({"patches": 7}, "image_grid_hw counts 8 patches, pixel_values holds 7"),
        ({"ids": torch.tensor([[57, 1, 57]])}, "each image needs one unbroken run"),
        ({"ids": torch.tensor([[1, 60, 58, 57, 57, 59]])}, "token id 60 is out of range; the vocabulary has 60 tokens"),
        ({"attention_mask": torch.ones(1, 9)}, r"attention_mask must be \[1, 7\].*got \[1, 9\]"),
        ({"attention_mask": torch.ones(1, 1, 7, 7)}, r"got \[1, 1, 7, 7\]"),
        ({"output_attentions": True}, "NEO.attention_maps"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs: dict[str, Any], message: str, model: Any) -> None:
    with pytest.raises(ValueError, match=message):
        call(model, **inputs)


def test_a_cache_of_someone_else_is_refused(model: Any) -> None:
    from transformers import DynamicCache

    cache = DynamicCache()
    for number in range(4):
        cache.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 8), number)
    text = {"pixel_values": None, "image_grid_hw": None, "past_key_values": cache}
    with pytest.raises(ValueError, match="holds tokens that this model did not read"):
        call(model, torch.tensor([[1]]), **text)
    own = call(model).past_key_values
    with pytest.raises(ValueError, match="the cache holds 1 rows, the new tokens are of 2"):
        call(model, torch.tensor([[1], [2]]), **text | {"past_key_values": own})


def test_a_conversation_goes_on_with_another_picture(model: Any) -> None:
    """From the cache, also after it was cropped; holes in the mask are padding like any other."""
    more = torch.tensor([[4, 58, 57, 57, 59, 5]])
    pixels = torch.randn(16, 48)
    both = {"pixel_values": pixels, "image_grid_hw": GRID.repeat(2, 1)}
    whole = call(model, torch.cat([IDS, more], 1), **both).logits
    first = call(model, pixel_values=pixels[:8])
    then = call(model, more, pixel_values=pixels[8:], past_key_values=first.past_key_values)
    assert torch.allclose(torch.cat([first.logits, then.logits], 1), whole, atol=1e-5)
    then.past_key_values.crop(-4)
    again = call(model, more[:, 2:], pixel_values=pixels[8:], past_key_values=then.past_key_values)
    assert torch.allclose(again.logits, whole[:, -4:], atol=1e-5)
    hole = torch.tensor([[1] * 7 + [0] * 3 + [1] * 6])
    padded = torch.cat([IDS, torch.full((1, 3), 7), more], 1)
    assert torch.allclose(call(model, padded, attention_mask=hole, **both).logits[hole.bool()], whole[0], atol=1e-5)


def test_other_ways_to_generate_text(model: Any) -> None:
    """In chunks, with guesses to check, which crop the cache: the ids of plain greedy generation."""
    ids = torch.tensor([[1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3]])
    plain = model.generate(ids, max_new_tokens=12, do_sample=False)
    for options in ({"prefill_chunk_size": 4}, {"prompt_lookup_num_tokens": 3}, {"assistant_model": model}):
        assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False, **options), plain), options
    with pytest.raises(ValueError, match="caches of a fixed length are not supported"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static")


def picture(height: int = 8, width: int = 16) -> Image.Image:
    return Image.effect_noise((width, height), 80).convert("RGB")


def test_pictures_are_dealt_out_by_tags(processor: Any) -> None:
    """A flat list, one for each text, or one picture: the same inputs."""
    texts, three = ["w1 <image> w2 <image>", "w3", "<image>"], [picture(), picture(16, 8), picture(8, 24)]
    inputs = processor(text=texts, images=three, padding=True, return_tensors="pt")
    nested = processor(text=texts, images=[three[:2], [], three[2:]], padding=True, return_tensors="pt")
    assert all(torch.equal(inputs[name], nested[name]) for name in inputs)
    assert inputs["image_grid_hw"].tolist() == [[2, 4], [4, 2], [2, 6]]
    assert inputs["pixel_values"].shape == (8 + 8 + 12, 48)
    assert (inputs["input_ids"] == 90).sum(1).tolist() == [4, 0, 3]
    alone = processor(text="<image>", images=three[2])
    assert alone["input_ids"] == [[91, 90, 90, 90, 92]]
    array = torch.from_numpy(__import__("numpy").asarray(three[2]).copy())
    assert torch.equal(processor(text="<image>", images=array.numpy())["pixel_values"], alone["pixel_values"])
    assert torch.equal(processor(text="<image>", images=array.permute(2, 0, 1))["pixel_values"], alone["pixel_values"])
    larger = processor(text="<image>", images=three[2], min_pixels=1000, max_pixels=1000)
    assert larger["image_grid_hw"].prod() > 12
    assert set(processor(text="w1", return_tensors="pt")) == {"input_ids", "attention_mask"}
    assert set(processor(images=three)) == {"pixel_values", "image_grid_hw"}


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"text": "<image> <image>", "images": [picture()]}, "2 <image> tags for 1 images"),
        ({"text": ["<image>", "w1"], "images": [[picture()], [picture()]]}, r"\[1, 0\] and \[1, 1\]"),
        ({"text": "w1", "images": picture()}, "0 <image> tags for 1 images"),
        ({"text": "<image>"}, "1 <image> tags for 0 images"),
        ({"text": "w1 <IMG_CONTEXT>"}, "a text holds one of the reserved <IMG_CONTEXT>, <img>, </img>; write <image>"),
        (
            {"text": "<image>", "images": picture(), "images_kwargs": {"do_resize": False}},
            r"not to be changed: \['do_r",
        ),
        ({"text": "<image>", "images": picture(2, 600)}, "has an aspect ratio over 200"),
        ({}, "give images, text or both"),
    ],
)
def test_what_the_processor_refuses(inputs: dict[str, Any], message: str, processor: Any) -> None:
    with pytest.raises(ValueError, match=message):
        processor(**inputs)


def test_ids_of_the_model(processor: Any) -> None:
    """The tokenizer's image ids become the model's, unless the text uses those."""
    other = NEOProcessor(processor.image_processor, processor.tokenizer, image_ids=[5, 100, 101])
    assert other(text="w4 <image>", images=picture())["input_ids"] == [[4, 100, 5, 5, 101]]
    with pytest.raises(ValueError, match=r"use ids \[5\] of the text"):
        other(text="w5 <image>", images=picture())


@pytest.mark.parametrize("name", STYLES)
def test_prompts_of_every_template_are_those_of_the_library(name: str, tmp_path: Path) -> None:
    """With and without a picture, in the first turn and later; also where the library writes more before an answer."""
    tokenizer_of(STYLES[name]).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    processor = NEOProcessor(
        NEOImageProcessor(4, 2, 64, 256), tokenizer, chat_template=chat_template(tokenizer, images=True)
    )
    tokenizer.chat_template, own = chat_template(tokenizer, images=False), tokenizer.chat_template
    talks = [[("What is it?", 0)], [("What is it?", 1)], [("Why is that?", 0), ("A word.", 0), ("<image> or what?", 1)]]
    for talk in talks:
        turns, messages, count = [], [], sum(images for _, images in talk)
        for number, (text, images) in enumerate(talk):
            tagged = f"<image>\n{text}" if images and "<image>" not in text else text
            turns.append({"from": ("human", "gpt")[number % 2], "value": tagged})
            content = [{"type": "image", "image": picture()}] * images + [{"type": "text", "text": text}]
            plain = "<image>" in text
            messages.append({"role": ("user", "assistant")[number % 2], "content": text if plain else content})
        written = processor.apply_chat_template(messages, add_generation_prompt=True)
        found = processor(text=written, images=[picture()] * count or None)["input_ids"][0]
        tokenizer.chat_template = own
        assert found == encode_prompt(turns, tokenizer, [2] * count).tolist(), written


def test_a_template_that_leads_to_other_tokens_is_refused(tmp_path: Path) -> None:
    """Its prompts go on where the library lets the model begin."""
    tokenizer = word_tokenizer()
    assert chat_template(tokenizer, images=True) == IMAGES + CHATML
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}w7 w8{% endif %}"
    )
    with pytest.raises(ValueError, match="but the model is asked in other tokens, 'w0 "):
        chat_template(tokenizer, images=True)


def test_messages_with_pictures(processor: Any) -> None:
    """Pictures before all text are a line each, others stand where they are; system and earlier answers are kept."""
    image = {"type": "image"}
    talk = [
        {"role": "system", "content": "w9"},
        {
            "role": "user",
            "content": [image, image, {"type": "text", "text": "w1"}, image, {"type": "text", "text": "w2"}],
        },
        {"role": "assistant", "content": "w3"},
        {"role": "user", "content": [{"type": "text", "text": "w4"}]},
    ]
    text = processor.apply_chat_template(talk, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nw9<|im_end|>\n<|im_start|>user\n<image>\n<image>\nw1<image>w2<|im_end|>\n"
        "<|im_start|>assistant\nw3<|im_end|>\n<|im_start|>user\nw4<|im_end|>\n<|im_start|>assistant\n"
    )
    turns = [{"from": "human", "value": "<image>\nw1"}]
    inputs = processor(text="<|im_start|>user\n<image>\nw1<|im_end|>\n<|im_start|>assistant\n", images=picture())
    assert inputs["input_ids"] == [encode_prompt(turns, processor.tokenizer, [2]).tolist()]
    with pytest.raises(Exception, match="content may be image or text, not video"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}])


def test_an_image_file_is_read_as_the_library_reads_it(processor: Any, tmp_path: Path) -> None:
    """Pixels as they are stored: its EXIF orientation is not applied."""
    image, exif = picture(8, 24), Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    grids = [
        processor(text="<image>", images=source)["image_grid_hw"].tolist()
        for source in (str(tmp_path / "turned.png"), tmp_path / "turned.png", (tmp_path / "turned.png").read_bytes())
    ]
    assert grids == [[[2, 6]]] * 3
