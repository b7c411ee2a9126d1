"""A metric from a file outside the package scores answers by name: on the command line, in Python and in a recipe."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from commands import good, installed_neo, neo

from neo_components import load_recipe
from neo_components.evaluation import AnswerMetric, ExactMatch, make_metric
from neo_components.recipe.stage import StageConfig
from neo_components.registry import METRICS

MINE = '''
"""Scores an answer by its length: how close it is to that of the best target."""
from collections.abc import Sequence

from neo_components.evaluation import AnswerMetric
from neo_components.registry import METRICS


@METRICS.register("length")
class Length(AnswerMetric):
    """The smaller length over the larger; less than ``threshold`` counts as 0."""

    def __init__(self, kinds: Sequence[str] = (), threshold: float = 0.0) -> None:
        super().__init__(kinds)
        self.threshold = threshold

    def score(self, prediction: str, targets: Sequence[str]) -> float:
        best = max(min(len(t), len(prediction)) / max(len(t), len(prediction)) for t in targets)
        return best if best >= self.threshold else 0.0
'''


def closeness(prediction: str, target: str) -> float:
    return min(len(target), len(prediction)) / max(len(target), len(prediction))


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A folder with the module, outside the package."""
    assert len(MINE.strip().splitlines()) <= 40
    (tmp_path / "my_metric.py").write_text(MINE)
    return tmp_path


def test_a_metric_of_ones_own_on_the_command_line(world: Path, mine: Path) -> None:
    asked = ["evaluate", world / "neo", world / "shards", "--max-new-tokens", "3", "--metric", "length"]
    scores = {}
    for threshold in (0.0, 0.9):
        file = mine / f"{threshold}.json"
        more = ["--import", "my_metric", "--metric-option", f"threshold={threshold}", "-o", file]
        done = installed_neo(*asked, *more, folder=mine)
        assert done.status == 0, done.err
        report = json.loads(file.read_text())
        assert report["metric"] == {"kind": "length", "threshold": threshold}
        for answer in report["predictions"]:
            share = closeness(answer["prediction"], answer["answers"][0])
            assert answer["score"] == pytest.approx(share if share >= threshold else 0.0)
        scores[threshold] = [answer["score"] for answer in report["predictions"]]
        mean = sum(scores[threshold]) / len(scores[threshold])
        assert report["accuracy"] == pytest.approx({"overall": mean, "color": mean})
        assert done.out.split()[:4] == ["overall", f"{mean:.4f}", "of", "8"]
    assert any(0 < score < 1 for score in scores[0.0])
    refused = installed_neo(*asked, folder=mine)
    assert refused.status == 1 and "metric 'length' is unknown; registered: exact_match" in refused.err


def test_a_metric_of_ones_own_in_a_recipe(world: Path, mine: Path) -> None:
    """It scores the validation questions of a run, under its own name, and is part of the saved recipe."""
    chosen = ["stage.metric={kind: length, threshold: 0.1}", f"data.validation=[{{shards: {world}/shards}}]"]
    more = ["stage.validate_every=1", "stage.predictions=8", "stage.log_every=1", f"output={mine}/run"]
    done = installed_neo("train", world / "run.yaml", *chosen, *more, "--import", "my_metric", folder=mine)
    assert done.status == 0, done.err
    with (mine / "run" / "logs" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    logged = [float(row["val/length"]) for row in rows if row["val/length"]]
    assert len(logged) == 2 and all(0 <= score <= 1 for score in logged)
    assert "val/exact_match" not in rows[0]
    assert re.search(rf"length: {logged[0]:.4f} at step 1, {logged[-1]:.4f} at step 2\n", done.out)
    assert "kind: length\n    threshold: 0.1" in (mine / "run" / "recipe.yaml").read_text()
    assert list((mine / "run" / "figures").glob("answers-*.png"))


def test_unknown_metrics_and_options_name_the_nearest(world: Path) -> None:
    refused = neo("evaluate", world / "neo", world / "shards", "--metric", "exact_mach")
    assert refused.status == 1 and "did you mean 'exact_match'?" in refused.err
    refused = neo("evaluate", world / "neo", world / "shards", "--metric-option", "x=1")
    assert refused.status == 1 and "'exact_match' has no option 'x' (options: none)" in refused.err
    refused = neo("evaluate", world / "neo", world / "shards", "--metric-option", "threshold")
    assert refused.status == 1 and "--metric-option 'threshold': must be key=value" in refused.err
    with pytest.raises(ValueError, match=r"stage\.metric: unknown metric 'exact_mach'; nearest: exact_match"):
        load_recipe(world / "run.yaml", ["stage.metric=exact_mach"])
    with pytest.raises(ValueError, match=r"metric 'exact_match' has no option 'lower'"):
        StageConfig(train=("all",), metric={"kind": "exact_match", "lower": True})


@pytest.fixture
def registered() -> Any:
    """Registers parts under ``test_...`` and takes them away again."""
    names: list[str] = []

    def register(part: Any) -> str:
        names.append(f"test_{part.__name__}")
        METRICS.register(names[-1])(part)
        return names[-1]

    yield register
    for name in names:
        METRICS.remove(name)


def test_what_is_no_metric_is_refused(registered: Any) -> None:
    class NoKinds(AnswerMetric):
        def __init__(self, lower: bool = True) -> None:
            super().__init__()

    class TooMuch(AnswerMetric):
        def score(self, prediction: str, targets: Sequence[str]) -> float:
            return 100.0

    with pytest.raises(TypeError, match="its constructor must take 'kinds'"):
        make_metric(registered(NoKinds), ["a"])
    with pytest.raises(TypeError, match=r"must be a subclass of .*AnswerMetric"):
        make_metric(registered(len), ["a"])
    with pytest.raises(ValueError, match=r"TooMuch\.score must return a number from 0 to 1, got 100\.0"):
        make_metric(registered(TooMuch), []).update(["x"], ["x"])


def test_repeated_targets_reach_the_metric_and_fractions_are_averaged(registered: Any) -> None:
    """Ten annotators: the protocol of VQA accuracy."""

    class Annotators(AnswerMetric):
        def score(self, prediction: str, targets: Sequence[str]) -> float:
            return min(1.0, targets.count(prediction) / 3)

    metric = make_metric(registered(Annotators), ["x", "y"])
    metric.update(["a", "b"], [["a"] * 2 + ["c"] * 8, ["b"] * 9 + ["c"]], ["x", "y"])
    found = {name: float(value) for name, value in metric.compute().items()}  # type: ignore[union-attr]
    assert found == pytest.approx({"overall": 5 / 6, "x": 2 / 3, "y": 1.0})


def test_the_default_metric_is_exact_match(world: Path) -> None:
    assert METRICS["exact_match"] is ExactMatch
    assert good("evaluate", world / "neo", world / "shards", "--limit", "2") == good(
        "evaluate", world / "neo", world / "shards", "--limit", "2", "--metric", "exact_match"
    )
