"""Digits, letters, short numbers and words that look written by hand, as a source of pictures.

Glyphs of script fonts (and some thin plain ones) are sheared, turned, stretched, pulled about, made thicker or thinner
and drawn in grays or colors, many of them at a low resolution.
"""

from __future__ import annotations

import random
import string
from pathlib import Path
from typing import ClassVar

from PIL import Image, ImageFilter

from neo_components.data.pictures import palette, words
from neo_components.data.pictures.asking import one_form, some, yes_no
from neo_components.data.pictures.fonts import NEEDS, Face, Fonts
from neo_components.data.pictures.ink import (
    SMALLEST,
    cropped,
    fitting_size,
    lay,
    scaled_to_fit,
    slanted,
    text_mask,
    wavy,
)
from neo_components.data.pictures.picture import Picture, PictureSource
from neo_components.data.pictures.signs import LETTERS, keeps, sign_turns
from neo_components.data.pictures.words import Words
from neo_components.registry import PICTURES

SCRIPT = 0.75
"""Chance of a script font; the others are of all kinds."""
COARSE = (12, 28)
"""Least and most pixels of the longer side of a picture before it is enlarged, if its resolution is low."""


@PICTURES.register("handwriting")
class Handwriting(PictureSource):
    """Handwriting-like digits (half of the pictures), letters, numbers and words, in fonts that are bent."""

    license: ClassVar[str] = "OFL-1.1 AND Apache-2.0 AND MIT"
    origin: ClassVar[str] = "drawn text, bent; fonts of PyPI packages fontpkg-* (Google Fonts), words of wonderwords"
    needs: ClassVar[tuple[str, ...]] = (*NEEDS, words.PACKAGE)

    def __init__(self, packages: Path) -> None:
        super().__init__(packages)
        self.fonts, self.words = Fonts(packages), Words(packages, longest=8)

    def items(self, split: str) -> int:
        """Number of families of script fonts."""
        return len(self.fonts.families(split, ("hand",)))

    def draw(self, number: int, split: str, rng: random.Random) -> Picture:
        """A sign, number or word; the number chooses the family if it is a script font."""
        families = self.fonts.families(split, ("hand",))
        script = rng.random() < SCRIPT
        face = rng.choice(self.fonts.faces(families[number % len(families)])) if script else self.fonts.pick(rng, split)
        chance = rng.random()
        if chance < 0.75:
            text = rng.choice(string.digits if chance < 0.5 else LETTERS)
            text = text if face.has_small_letters else text.upper()
            first, others = sign_turns(rng, text, face.has_small_letters, digits_per_letter=2)
        elif chance < 0.87:
            text = str(rng.randint(10, 9999))
            first = [(one_form(rng, "what number is this?|which number is written here?|read the number."), text)]
            others = [(one_form(rng, "how many digits are there?|how many digits does it have?"), str(len(text)))]
            others += [(one_form(rng, "what is the first digit?|which digit comes first?"), text[0])]
            others += [(one_form(rng, "what is the last digit?|which digit comes last?"), text[-1])]
        else:
            text = self.words.word(rng)
            text = text if face.has_small_letters else text.upper()
            first = [
                (
                    one_form(rng, "what word is this?|what is written here?|read the handwriting.|what does it say?"),
                    text,
                )
            ]
            others = [(one_form(rng, "what is the first letter?|with which letter does it begin?"), text[0].upper())]
            others += [(one_form(rng, "how many letters are there?|count the letters."), str(len(text)))]
        image, light = written(rng, face, text)
        what = "writing" if len(text) > 1 else "digit" if text.isdigit() else "letter"
        forms = "is the {what} lighter than the background?|is it light {what} on a dark background?"
        others.append(
            (
                one_form(rng, forms.replace("light {what}", "a light {what}") if len(text) == 1 else forms, what=what),
                yes_no(light),
            )
        )
        turns = some(rng, first, others, most=3)
        return Picture(image, turns, "text", keeps(turns))


def written(rng: random.Random, face: Face, text: str) -> tuple[Image.Image, bool]:
    """Draws a text as if by hand, and whether it is lighter than its ground."""
    single = len(text) == 1
    width = rng.randint(64, 128) if single else rng.randint(96, 208)
    height = round(width * rng.uniform(0.8, 1.2)) if single else max(48, round(width * rng.uniform(0.4, 0.7)))
    size = (
        fitting_size(face, text, width * 0.9, height * 1.1)
        if not single
        else max(SMALLEST, int(height * rng.uniform(0.7, 1.1)))
    )
    thickness = rng.choice((0, 0, rng.uniform(0, 0.03), rng.uniform(0.02, 0.06) if single else 0.02))
    mask = text_mask(text, face.at(size), 0, round(size * thickness))
    mask = slanted(mask, rng.gauss(0, 6), rng.uniform(-0.35, 0.35) if rng.random() < 0.7 else 0)
    if rng.random() < 0.7:
        mask = wavy(mask, rng, rng.uniform(0.01, 0.045 if single else 0.02))
    stretch = rng.uniform(0.7, 1.35) if rng.random() < 0.5 else 1
    mask = mask.resize((max(4, round(mask.width * stretch)), mask.height), Image.Resampling.BILINEAR)
    if rng.random() < 0.2 and mask.height > 40:  # a pen that is nearly dry
        mask = cropped(mask.filter(ImageFilter.GaussianBlur(1)).point([0] * 100 + list(range(100, 256))))
    fill = rng.uniform(0.45, 0.95)
    if single:  # as large as its frame allows: digits on forms are cut out like that
        scale = min(width * fill / mask.width, height * fill / mask.height)
        mask = mask.resize(
            (max(3, int(mask.width * scale)), max(3, int(mask.height * scale))), Image.Resampling.BILINEAR
        )
    mask = scaled_to_fit(mask, width - 6, height - 6)
    ink, ground = shades(rng)
    image = palette.ground(rng, (width, height), ground)
    away = 0.5 if rng.random() < 0.6 else rng.random()
    lay(
        image, mask, ink, ((width - mask.width) * away, (height - mask.height) * (0.5 if away == 0.5 else rng.random()))
    )
    if single and rng.random() < 0.4:
        image = coarse(image, rng)
    return image, palette.luminance(ink) > palette.luminance(ground)


def shades(rng: random.Random) -> tuple[palette.RGB, palette.RGB]:
    """Colors of ink and ground: grays in three of four cases, either the lighter one."""
    if rng.random() < 0.25:
        _, ink, _, ground = palette.pair(rng, 3)
        return ink, ground
    dark, light = rng.randint(0, 90), rng.randint(165, 255)
    one, other = (dark, dark, dark), (light, light, light)
    return (one, other) if rng.random() < 0.5 else (other, one)


def coarse(image: Image.Image, rng: random.Random) -> Image.Image:
    """The picture at a low resolution, enlarged to its size again, smoothly or in squares."""
    scale = rng.randint(*COARSE) / max(image.size)
    small = image.resize(
        (max(8, round(image.width * scale)), max(8, round(image.height * scale))), Image.Resampling.BOX
    )
    way = rng.choice((Image.Resampling.NEAREST, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC))
    return small.resize(image.size, way)
