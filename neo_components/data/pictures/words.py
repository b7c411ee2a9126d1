"""Words to be written: nouns, verbs and adjectives of the package ``wonderwords``, made-up words, and numbers."""

from __future__ import annotations

import random
import string
from pathlib import Path

from neo_components.data.pictures.packages import PACKAGES, missing, package_folder

PACKAGE = "wonderwords"
LISTS = ("nounlist.txt", "verblist.txt", "adjectivelist.txt")
CONSONANTS, VOWELS = "bcdfghjklmnprstvwz", "aeiou"
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


class Words:
    """The words of the package, those of its list of profanity left out.

    Args:
        packages: folder of the unpacked packages.
        longest: number of letters of the longest word.

    Raises:
        FileNotFoundError: if the package is not there.
    """

    def __init__(self, packages: Path, longest: int = 10) -> None:
        folder = package_folder(packages, PACKAGE) / PACKAGE / "assets"
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder} is not there; remove {packages / PACKAGE}. Then {missing(packages, PACKAGES[PACKAGE])}"
            )
        banned = set((folder / "profanitylist.txt").read_text().split())
        kept = []
        for name in LISTS:
            words = (folder / name).read_text().split()
            small = {word.lower() for word in words if word.isascii() and word.isalpha() and 2 < len(word) <= longest}
            kept.append(sorted(small - banned))
        self.nouns, self.verbs, self.adjectives = kept
        self.all = sorted({word for words in kept for word in words})

    def word(self, rng: random.Random) -> str:
        """A word in small letters; one in eight is made up, so that it cannot be guessed from its beginning."""
        return made_up(rng) if rng.random() < 0.125 else rng.choice(self.all)

    def similar(self, rng: random.Random, word: str) -> str:
        """Another word, half the time the same one with a letter changed."""
        if rng.random() < 0.5:
            index = rng.randrange(len(word))
            letter = rng.choice([one for one in string.ascii_lowercase if one != word[index].lower()])
            changed = letter.upper() if word[index].isupper() else letter
            return word[:index] + changed + word[index + 1 :]
        while True:
            other = match_case(self.word(rng), word)
            if other.lower() != word.lower():
                return other


def made_up(rng: random.Random) -> str:
    """A word that does not exist: syllables, or any letters."""
    if rng.random() < 0.6:
        return "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(rng.randint(1, 3))) + rng.choice(
            ("", *CONSONANTS)
        )
    return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 6)))


def match_case(word: str, like: str) -> str:
    """The word in capitals, or with a first capital, as another one is."""
    if like.isupper() and len(like) > 1:
        return word.upper()
    return word.capitalize() if like[:1].isupper() else word


def number(rng: random.Random) -> str:
    """A number in figures: one to five digits, at times with a point, a comma, a sign or a percent sign."""
    digits = rng.choice((1, 2, 2, 3, 3, 4, 5))
    least = 10 ** (digits - 1) if digits > 1 else 0
    value = rng.randint(least, 10**digits - 1)
    form = rng.random()
    if form < 0.7:
        return str(value)
    if form < 0.8:
        return f"{value / 10:.1f}" if rng.random() < 0.5 else f"{value / 100:.2f}"
    if form < 0.87:
        return f"{value:,}"
    return f"{value % 101}%" if form < 0.94 else f"-{max(1, value)}"


def price(rng: random.Random) -> str:
    """A price in dollars or pounds."""
    value = rng.choice((rng.randint(1, 9), rng.randint(10, 99), rng.randint(100, 999)))
    cents = rng.choice(("", ".99", ".50", f".{rng.randint(0, 99):02d}"))
    return f"{rng.choice('$$$£')}{value}{cents}"


def clock(rng: random.Random) -> str:
    """A time of day."""
    if rng.random() < 0.6:
        return f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"
    return f"{rng.randint(1, 12)}:{rng.randint(0, 59):02d} {rng.choice(('AM', 'PM'))}"


def date(rng: random.Random) -> tuple[str, str, str, str]:
    """A date as written, and its day, month and year as they stand in it."""
    year, month, day = rng.randint(1950, 2039), rng.randint(1, 12), rng.randint(1, 28)
    name = MONTHS[month - 1]
    short = name[:3]
    text, shown = rng.choice((
        (f"{day} {name} {year}", name), (f"{name} {day}, {year}", name), (f"{short} {day}, {year}", short),
        (f"{day} {short} {year}", short),
    ))  # fmt: skip
    return text, str(day), shown, str(year)
