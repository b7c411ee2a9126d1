"""The path of text that ``attach`` chooses: through the pre-Buffer only where words come through unharmed."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from llm_builders import native_model, relate_embeddings, text_llm

from neo_components import NEO, attach, build, load_recipe
from neo_components.components.bridge import Bridge, LeastSquares
from neo_components.model.attach import MOST_LOST, chosen_route, export_pre_buffer, lost_words

WIDTH, OTHER_WIDTH = 32, 48


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A language model with its asset, one whose embeddings are an affine map of its own, and an unrelated one."""
    root = tmp_path_factory.mktemp("auto")
    ours = text_llm(root / "ours")
    made = {"ours": ours}
    for name in ("related", "unrelated"):
        made[name] = text_llm(root / name, hidden_size=OTHER_WIDTH, heads=3, kv_heads=1, vocab_size=290, seed=5)
    torch.manual_seed(0)
    weight, bias = torch.randn(OTHER_WIDTH, WIDTH) / WIDTH**0.5, torch.randn(OTHER_WIDTH)
    relate_embeddings(ours, made["related"], weight, bias)
    model = native_model(ours)
    return made | {
        "asset": export_pre_buffer(model, root / "asset", ours),
        "few": export_pre_buffer(model, root / "few", ours, anchors=40),
    }


@pytest.mark.parametrize(
    ("asset", "llm", "text", "why"),
    [
        ("asset", "ours", "shared", "there are no bridges"),
        ("asset", "related", "shared", "the bridges lose 0.00 of the variance"),
        ("asset", "unrelated", "bypass", "the bridges lose 1."),
    ],
)
def test_the_fit_of_left_out_words_decides(
    folders: dict[str, Path],
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    asset: str,
    llm: str,
    text: str,
    why: str,
) -> None:
    with caplog.at_level(logging.INFO):
        model = attach(folders[asset], folders[llm])
    assert model.text == text and (model.bridge_in is None) == (llm != "related")
    assert f"text auto: {text}, as {why}" in caplog.text
    assert NEO.from_pretrained(model.save_pretrained(tmp_path / "saved")).text == text


def test_an_exact_fit_through_few_anchors_is_not_believed(folders: dict[str, Path]) -> None:
    """40 anchors lie in a space of 48 directions, so that the bridge into the pre-Buffer explains all of its own pairs
    whatever they are."""
    shared = attach(folders["few"], folders["unrelated"], text="shared")
    assert shared.bridge_in is not None and shared.bridge_in.unexplained is not None
    assert shared.bridge_in.unexplained < 0.05 < MOST_LOST < 0.5 < lost_words(shared.bridge_in)
    assert attach(folders["few"], folders["unrelated"]).text == "bypass"


def test_bridges_that_are_not_fitted_carry_no_words(folders: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert attach(folders["asset"], folders["related"], bridge="random").text == "bypass"
    assert "text auto: bypass, as the bridges are not fitted" in caplog.text
    partly = LeastSquares(4, 4)
    partly.unexplained = 0.05  # of a bridge of one's own, whose fit leaves nothing out
    assert lost_words(partly, None) == 0.05 and chosen_route(partly, None) == "shared"
    assert lost_words(partly, Bridge(4, 4)) == float("inf")


def test_a_recipe_chooses_alike(folders: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "attach.yaml"
    for llm, text in (("related", "shared"), ("unrelated", "bypass")):
        parts = f"pre_buffer: {{from_pretrained: {folders['asset']}}}, post_llm: {{from_pretrained: {folders[llm]}}}"
        path.write_text(f"model: {{{parts}}}")
        recipe = load_recipe(path)
        assert recipe.model.text == "auto" and build(recipe.model).text == text
