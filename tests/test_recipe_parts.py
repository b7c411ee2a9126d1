"""Parts with options: recipes read them from the part's own signature, of parts that ship and of a user's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pytest

from neo_components.recipe.faults import Origins
from neo_components.recipe.parts import Part, keys_of, split_beside
from neo_components.recipe.reader import FAULTY, Reader
from neo_components.registry import Choice, Registry

if TYPE_CHECKING:
    from neo_components.nowhere import NotThere  # type: ignore[import-not-found]


def positive(values: Any) -> dict[str, str]:
    return {key: f"got {value}, must be positive" for key, value in values.items() if value is not None and value <= 0}


@pytest.fixture
def wheels() -> Part:
    """Wheels of two kinds; the library passes ``load`` and ``speed``, and a recipe may give ``speed`` beside them."""
    registry = Registry("wheel", "neo_components.errors", given=("load", "speed"))

    @registry.register("plain")
    def plain(load: NotThere) -> str:
        return f"plain under {load}"

    @registry.register("spoked")
    class Spoked:
        def __init__(
            self, spokes: int, load: float, speed: float = 1.0, rim: float = 2.5, color: Literal["red", "blue"] = "red"
        ) -> None:
            self.spokes, self.load, self.speed, self.rim, self.color = spokes, load, speed, rim, color

    @registry.register("data")
    @dataclass(frozen=True)
    class Data:
        speed: float
        sizes: tuple[int, int] = (1, 2)
        hidden: object = None

    return Part(
        registry, "plain", {"price": (int | None, None), "speed": (float, 3.0)}, also=("none",), problems=positive
    )


def read(part: Part, value: Any) -> tuple[Any, list[tuple[str, str]]]:
    """The choice that a recipe with ``car.wheel: value`` makes, and what is wrong with it."""
    reader = Reader(Origins("my.yaml"))
    choice = reader.read(value, Annotated[Choice, part] | None, "car.wheel")
    return choice, [(fault.key, fault.text) for fault in reader.faults]


def test_a_choice_is_completed(wheels: Part) -> None:
    """Keys beside the options belong to it where the part takes them, and those that no part takes always."""
    whole = {"kind": "spoked", "spokes": 8, "rim": 2.5, "color": "red", "price": None, "speed": 3.0}
    assert read(wheels, {"kind": "spoked", "spokes": 8}) == (whole, [])
    assert list(read(wheels, {"kind": "spoked", "spokes": 8})[0]) == list(whole)
    assert read(wheels, {"spokes": 8, "kind": "spoked", "speed": 4, "color": "blue", "price": 5, "rim": "1e-1"}) == (
        whole | {"speed": 4.0, "color": "blue", "price": 5, "rim": 0.1},
        [],
    )
    assert read(wheels, "plain") == ({"kind": "plain", "price": None}, [])
    assert read(wheels, {"price": 3}) == ({"kind": "plain", "price": 3}, [])
    assert read(wheels, {"kind": "data", "sizes": [3, 4]}) == (
        {"kind": "data", "sizes": (3, 4), "price": None, "speed": 3.0},
        [],
    )
    assert read(wheels, None) == (None, [])
    assert wheels.choice() == {"kind": "plain", "price": None}


def test_a_part_without_any_key_is_its_name(wheels: Part) -> None:
    part = Part(wheels.registry, "plain", also=("none",))
    assert [read(part, value)[0] for value in ("plain", {"kind": "plain"}, "none", {})] == [
        "plain", "plain", "none", "plain",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "faults"),
    [
        ("spokd", [("", "unknown wheel 'spokd'; nearest: spoked (registered: data, none, plain, spoked)")]),
        ({"kind": "spokd", "spokes": "x"}, [(".kind", "unknown wheel 'spokd'; nearest: spoked (registered: data, ")]),
        ({"kind": 3}, [(".kind", "unknown wheel 3; nearest: ")]),
        (7, [("", "got 7 (int), wanted a name or a mapping (kind: name, option: value) or null")]),
        ("spoked", [("", "lacks car.wheel.spokes")]),
        (
            {"kind": "spoked", "spokes": 8.5, "rin": 2, "color": "rad", "speed": 0.0},
            [
                (".spokes", "got 8.5 (float), wanted int (a whole number)"),
                (
                    ".rin",
                    "is no option of wheel 'spoked'; nearest: car.wheel.rim (valid here: kind, spokes, rim, color, ",
                ),
                (".color", "got 'rad' (str), wanted one of red, blue; nearest: red"),
                (".speed", "got 0.0, must be positive"),
            ],
        ),
        ({"kind": "plain", "speed": 1}, [(".speed", "is no option of wheel 'plain'; nearest: car.wheel.price (valid")]),
        ({"kind": "plain", "load": 1}, [(".load", "is no option of wheel 'plain'")]),
        ({"kind": "none", "price": 1}, [(".price", "is no option of wheel 'none' (valid here: kind)")]),
        ({"kind": "data", "hidden": 1}, [(".hidden", "is no option of wheel 'data'; nearest: car.wheel.")]),
    ],
)
def test_faults_of_options(wheels: Part, value: Any, faults: list[tuple[str, str]]) -> None:
    """All together, each with its key; options are those of the part that ``kind`` names."""
    choice, found = read(wheels, value)
    assert choice is FAULTY
    assert [key.removeprefix("car.wheel") for key, _ in found] == [key for key, _ in faults]
    assert all(text.startswith(start) for (_, text), (_, start) in zip(found, faults, strict=True)), found


def test_an_option_that_yaml_cannot_express(wheels: Part) -> None:
    @wheels.registry.register("odd")
    def odd(hub: bytes) -> None: ...

    assert read(wheels, "odd")[1] == [("car.wheel", f"'odd' needs hub: {bytes}, which YAML cannot express")]


def test_a_choice_comes_back_from_arguments(wheels: Part) -> None:
    """As a saved asset keeps them; a key that something else brings along stays open."""
    arguments = {"wheel": {"kind": "spoked", "spokes": 6}, "price": 9, "speed": 4.0}
    choice = wheels.of_arguments("wheel", arguments)
    assert choice == {"kind": "spoked", "spokes": 6, "rim": 2.5, "color": "red", "price": None, "speed": 4.0}
    ours, beside = split_beside(choice, wheels.beside)
    assert ours == {"kind": "spoked", "spokes": 6, "rim": 2.5, "color": "red"}
    assert beside == {"price": None, "speed": 4.0}
    assert wheels.registry.make(ours, load=2.0, speed=4.0).spokes == 6
    assert split_beside({"kind": "plain", "price": 1}, wheels.beside) == ("plain", {"price": 1})


def test_every_key_of_every_part_is_known(wheels: Part) -> None:
    assert set(keys_of(wheels)) == {"kind", "price", "speed", "spokes", "rim", "color", "sizes"}
