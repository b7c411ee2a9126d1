"""Sources of pictures: how fast they draw, and how much of their answers a model without images could know.

    python benchmarks/picture_sources.py PACKAGES [--only lettering charts] [--count 2000] [--sheets FOLDER]

PACKAGES is the folder of unpacked packages that ``neo data pretrain-mix`` uses. For each source: pictures per second of
CPU time; questions per picture; ``yes`` among the answers yes and no; ``blind``, the part of the questions that is
answered rightly by the most frequent answer to the same question, over questions that were asked ten times or more, and
how large a part of all those are. ``--sheets`` writes a sheet of 48 pictures of each source, to look at.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter, defaultdict
from pathlib import Path

from PIL import Image

from neo_components.data.pictures.picture import SPLITS, TRAIN, Picture
from neo_components.data.skip_counts import SampleError
from neo_components.registry import PICTURES

WARM_UP = 100
"""Pictures drawn before the clock starts: they load fonts."""
OFTEN = 10
COLUMNS, ROWS, CELL = 8, 6, 232


def draw_all(name: str, packages: Path, split: str, count: int) -> tuple[list[Picture], float]:
    """Pictures of a source, and the seconds of CPU time that the last ``count`` of them took."""
    source = PICTURES.make(name, packages=packages)
    pictures: list[Picture] = []
    start = 0.0
    for number in range(WARM_UP + count):
        if number == WARM_UP:
            start = time.process_time()
        try:
            pictures.append(source.draw(number, split, random.Random(f"{name} {split} {number}")))
        except SampleError:
            continue
    return pictures, time.process_time() - start


def yes_part(pictures: list[Picture]) -> float:
    """``yes`` among the answers yes and no."""
    answers = Counter(answer for picture in pictures for _, answer in picture.turns)
    return answers["yes"] / max(1, answers["yes"] + answers["no"])


def blind(pictures: list[Picture]) -> tuple[float, float]:
    """Part answered rightly by each question's most frequent answer, and the part of questions that this is about."""
    by_question: dict[str, Counter[str]] = defaultdict(Counter)
    for picture in pictures:
        for question, answer in picture.turns:
            by_question[question][answer] += 1
    often = [counts for counts in by_question.values() if counts.total() >= OFTEN]
    asked = sum(counts.total() for counts in often)
    right = sum(max(counts.values()) for counts in often)
    return right / max(1, asked), asked / sum(counts.total() for counts in by_question.values())


def sheet(pictures: list[Picture]) -> Image.Image:
    """Pictures side by side."""
    page = Image.new("RGB", (COLUMNS * CELL, ROWS * CELL), (120, 160, 120))
    for number, picture in enumerate(pictures[: COLUMNS * ROWS]):
        image = picture.image.convert("RGBA")
        page.paste(image, (number % COLUMNS * CELL + 4, number // COLUMNS * CELL + 4), image)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("packages", type=Path)
    parser.add_argument("--only", nargs="+", default=sorted(PICTURES), choices=sorted(PICTURES))
    parser.add_argument("--split", default=TRAIN, choices=SPLITS)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--sheets", type=Path)
    options = parser.parse_args()
    print("| source | pictures/s | questions/picture | yes | blind | of |\n|---|---|---|---|---|---|")
    for name in options.only:
        pictures, seconds = draw_all(name, options.packages, options.split, options.count)
        asked = sum(len(picture.turns) for picture in pictures) / len(pictures)
        known, of = blind(pictures)
        speed = options.count / max(seconds, 1e-9)
        print(f"| {name} | {speed:.0f} | {asked:.2f} | {yes_part(pictures):.2f} | {known:.2f} | {of:.2f} |", flush=True)
        if options.sheets:
            options.sheets.mkdir(parents=True, exist_ok=True)
            sheet(pictures).save(options.sheets / f"{name}_{options.split}.png")


if __name__ == "__main__":
    main()
