"""Questions and answers about images, one per line of a CSV file without header: IMAGE,QUESTION,ANSWER.

neo data pairs pairs.csv --images photos -o shards/pairs --import pairs
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from neo_components.data import Converter
from neo_components.registry import CONVERTERS


@CONVERTERS.register("pairs")
@dataclass
class Pairs(Converter):
    """Convert questions and answers about images into shards.

    Args:
        table: CSV file with IMAGE,QUESTION,ANSWER in each line.
        images: Folder of the images.
        suffix: Text behind each question, for example how to answer.
    """

    table: Path
    images: Path = Path(".")
    suffix: str = ""

    def records(self) -> Iterator[list[str]]:
        with self.table.open(newline="", encoding="utf-8") as lines:
            yield from csv.reader(lines)

    def sample(self, record: list[str]) -> dict:
        image, question, answer = record
        asked = f"<image>\n{question}{self.suffix}"
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
        return {"conversations": turns, "images": [self.images / image]}
