"""The script for a GPU machine: options, time limits, going on, carried wheels, summary; slow: a rehearsal on a CPU."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
MACHINE = {"commit": "abc", "device": "NVIDIA H200"}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """``benchmarks/gpu_run.py`` as it finds its neighbors when it is run."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_run

    return gpu_run


def started(*arguments: str | Path, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """The script itself, by this Python."""
    environment = os.environ | {"PYTHON": sys.executable}
    command = [str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=timeout)


# --- options


def test_the_script_reports_its_options() -> None:
    done = started("--help")
    assert done.returncode == 0
    assert all(option in done.stdout for option in ("--output", "--wheels", "--parts", "--again", "--tiny"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "--device cpu needs --tiny"),
        (["--parts", "4"], "invalid choice"),
        (["--minutes", "0"], "--minutes must be positive"),
        (["--device", "mps"], "invalid choice"),
    ],
)
def test_options_that_are_not_possible(
    script: ModuleType, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        script.options_of(["--output", "out", *arguments])
    assert message in capsys.readouterr().err


def test_a_folder_keeps_to_one_setting(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "setting.json").write_text('{"device": "cuda", "tiny": false}')
    options = script.options_of(["--output", str(tmp_path), "--device", "cpu", "--tiny"])
    with pytest.raises(ValueError, match="choose another --output"):
        script.prepare(options)


def test_every_command_is_understood(script: ModuleType, tmp_path: Path) -> None:
    """Scripts exist, and train_step.py takes its options as they are given on a GPU: the shape of NEO-2.2B."""
    import train_step

    for tiny in (False, True):
        steps = script.all_steps(tmp_path, "cuda", tiny, MACHINE)
        assert [(step.part, step.name) for step in steps] == [
            (1, "tests"), (2, "train_step_stage_1"), (2, "train_step_stage_3"), (2, "decode"), (2, "data_wait"),
            (3, "quickstart"), (3, "pretrained"),
        ]  # fmt: skip
        made = steps[-1].command
        assert made[-9:-6] == ["pretrained", "make", str(tmp_path / "pretrained")] and made[-2] == "--minutes"
        assert steps[-1].needs == tmp_path / "pretrained" / "small_llm" / "config.json"
        assert len([word for word in steps[0].command if word.startswith("tests/")]) == 4
        assert steps[3].command[-2:] == ["--output", str(tmp_path / "decode")] and "4800" in steps[3].command
        for stage, step in zip((1, 3), steps[1:3], strict=True):
            words = ["cpu" if word == "cuda" else word for word in step.command[3:]]
            options = train_step.options_of(words)
            assert options.stages == [stage] and options.compile and options.precision == "bf16"
            assert options.lengths == ([256] if tiny else [8192]) and options.hidden == (64 if tiny else 2048)


def test_wheels_are_installed_before_anything_is_imported() -> None:
    """The script starts with a bare Python that has pip and ``packaging`` alone."""
    absent = ("pytest", "torch", "numpy", "omegaconf", "neo_components", "lightning", "transformers")
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); import gpu_run; print(gpu_run.LEAST)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "benchmarks", capture_output=True, text=True, check=False
    )
    assert done.stdout == "20.0\n", done.stderr


# --- running, cutting off, going on


def step(script: ModuleType, name: str, code: str, **options: Any) -> Any:
    return script.Step(1, name, [sys.executable, "-u", "-c", code], **options)


def part(script: ModuleType, steps: list[Any], output: Path, minutes: float = 1.0, again: bool = False) -> list[str]:
    """Runs a part; the states of its steps."""
    options = argparse.Namespace(output=output, minutes=minutes, again=again)
    script.run_part(1, steps, options, {"commit": "abc", "date": "today"})
    return [json.loads((output / f"part_1_{one.name}.json").read_text())["status"] for one in steps]


def test_what_has_passed_is_not_repeated(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    count = tmp_path / "count"
    counting = f"open({str(count)!r}, 'a').write('x'); print('figures', 12)"
    steps = [
        step(script, "good", counting),
        step(script, "bad", "import sys; print('trouble'); sys.exit(3)"),
        step(script, "absent", counting, needs=tmp_path / "nothing"),
    ]
    assert part(script, steps, tmp_path) == ["passed", "failed", "left out"]
    assert (tmp_path / "part_1_good.txt").read_text() == "figures 12\n"
    result = json.loads((tmp_path / "part_1_bad.json").read_text())
    assert (result["returncode"], result["machine"]["commit"]) == (3, "abc")
    out = capsys.readouterr().out
    assert "trouble" in out and "bad: FAILED" in out and "left out, as" in out
    assert part(script, steps, tmp_path) == ["passed", "failed", "left out"]
    assert count.read_text() == "x" and "passed before, at abc" in capsys.readouterr().out
    part(script, steps, tmp_path, again=True)
    assert count.read_text() == "xx"


def test_a_part_ends_in_its_time(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is asked to end, has time to save, and is killed with its children if it does not; what comes behind it is
    not started. Started again, it goes on from what it saved."""
    import gpu_steps

    monkeypatch.setattr(gpu_steps, "GRACE", 1.0)
    monkeypatch.setattr(script, "LEAST", 2.0)
    saved, child = tmp_path / "saved", tmp_path / "child"
    saving = (
        "import signal, sys, time, os\n"
        f"done = os.path.exists({str(saved)!r})\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (open({str(saved)!r}, 'w').close(), sys.exit(143)))\n"
        "print('on'); time.sleep(0 if done else 60)"
    )
    stubborn = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"one = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(child)!r}, 'w').write(str(one.pid)); time.sleep(60)"
    )
    steps = [step(script, "saving", saving), step(script, "behind", "print(1)")]
    assert part(script, steps, tmp_path, minutes=3 / 60) == ["cut off", "not started"]
    assert saved.exists()
    assert part(script, steps, tmp_path) == ["passed", "passed"]
    ended = gpu_steps.execute(step(script, "stuck", stubborn), 3.0, tmp_path / "stuck.txt")
    assert ended.status == "cut off" and 2.9 < ended.seconds < 8
    state = Path("/proc") / child.read_text() / "stat"
    for _ in range(50):
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("a child of a step that was cut off is alive")


def pytest_run(folder: Path, results: Path) -> tuple[int, str]:
    """Tests of a folder under the plugin, as part 1 runs them."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "benchmarks")}
    command = [sys.executable, "-m", "pytest", "-p", "gpu_tests", "-p", "no:cacheprovider", "--results", str(results)]
    done = subprocess.run(
        [*command, "--commit", "abc", "-q", "-rA", str(folder)], cwd=folder, env=environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout


def test_tests_go_on_one_by_one(script: ModuleType, tmp_path: Path) -> None:
    """A run that is cut off leaves the results that it had; the next one begins with what failed."""
    import gpu_tests

    file, results = tmp_path / "test_some.py", tmp_path / "results.jsonl"
    body = "import os\ndef test_a(): pass\ndef test_b(): os._exit(9)\ndef test_c(): assert {}\ndef test_d(): pass\n"
    file.write_text(body.format("1 == 2"))
    assert pytest_run(tmp_path, results)[0] == 9
    outcomes = {name.split("::")[1]: one["outcome"] for name, one in gpu_tests.last_results(results).items()}
    assert outcomes == {"test_a": "passed", "test_b": "started"}
    assert pytest_run(tmp_path, results)[0] == 9
    last = gpu_tests.last_results(results)
    assert list(last) == [
        "test_some.py::test_a",
        "test_some.py::test_b",
        "test_some.py::test_c",
        "test_some.py::test_d",
    ]
    assert [one["outcome"] for one in last.values()] == ["passed", "started", "failed", "passed"]
    assert "assert 1 == 2" in last["test_some.py::test_c"]["error"]
    file.write_text(body.format("1 == 1").replace("os._exit(9)", "pass"))
    status, out = pytest_run(tmp_path, results)
    assert status == 0 and "2 passed, 2 deselected" in out
    assert out.index("test_c") < out.index("test_b")
    assert pytest_run(tmp_path, results)[0] == 0


# --- the machine


def wheel(folder: Path, name: str, tag: str = "py3-none-any") -> Path:
    """A wheel of one module that says where it comes from."""
    path = folder / f"{name}-1.5-{tag}.whl"
    about = f"{name}-1.5.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", "carried = True\n")
        archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n")
        archive.writestr(f"{about}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        archive.writestr(f"{about}/RECORD", f"{name}.py,,\n{about}/METADATA,,\n{about}/WHEEL,,\n{about}/RECORD,,\n")
    return path


def test_carried_wheels_leave_the_machine_as_it_is(script: ModuleType, tmp_path: Path) -> None:
    """What is missing goes into a folder apart; a wheel of what is there is not touched; a wrong one is named."""
    import gpu_environment

    wheels, site = tmp_path / "wheels", tmp_path / "site"
    wheels.mkdir()
    with pytest.raises(FileNotFoundError, match="holds no wheel"):
        gpu_environment.install(wheels, site)
    wheel(wheels, "neo_carried_module")
    wheel(wheels, "torch")
    assert gpu_environment.install(wheels, site) == ["neo-carried-module"]
    assert {path.name for path in site.iterdir()} == {"neo_carried_module.py", "neo_carried_module-1.5.dist-info"}
    wheel(wheels, "neo_other_module", "cp27-cp27m-win32")
    with pytest.raises(ValueError, match=r"neo_other_module-1\.5-cp27-cp27m-win32\.whl does not fit Python"):
        gpu_environment.install(wheels, site)


def test_missing_packages_are_named(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_environment

    assert gpu_environment.unmet()[0] == []
    dependencies = '["no-such-package>=1", "torch>=99", "numpy>=1"]'
    (tmp_path / "pyproject.toml").write_text(f"[project]\ndependencies = {dependencies}\n")
    monkeypatch.setattr(gpu_environment, "ROOT", tmp_path)
    missing, other = gpu_environment.unmet()
    assert missing == ["no-such-package>=1"]
    assert len(other) == 1 and other[0].startswith("torch>=99 (has ")


def test_the_machine_is_described(script: ModuleType) -> None:
    import torch

    machine = script.describe("cpu", "abc")
    assert machine["commit"] == "abc" and machine["torch"] == torch.__version__.split("+")[0]
    assert {"device", "cores", "python", "lightning", "transformers", "date"} <= machine.keys()
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="finds no GPU here"):
            script.describe("cuda")


def test_figures_stand_beside_their_targets(script: ModuleType, tmp_path: Path) -> None:
    row = {"mfu": 0.47, "breaks": {}, "compiled_after_first_step": 0, "peak": 50e9, "estimated_peak": 40e9}
    for stage, mfu in ((1, 0.47), (3, 0.47)):
        folder = tmp_path / f"train_step_stage_{stage}"
        folder.mkdir()
        (folder / "train_step.json").write_text(json.dumps({"rows": [row | {"mfu": mfu}]}))
    (tmp_path / "machine.json").write_text('{"device": "X", "torch": "2", "commit": "abc", "date": "today"}')
    (tmp_path / "setting.json").write_text('{"device": "cuda", "tiny": false}')
    found, text = script.summary(tmp_path, script.all_steps(tmp_path, "cuda", False, MACHINE))
    verdicts = {aim["name"]: (aim["value"], aim["met"]) for aim in found["targets"]}
    assert verdicts["stage 1, 8192 tokens: MFU"] == (0.47, True)
    assert verdicts["stage 3, 8192 tokens: MFU"] == (0.47, False)
    assert verdicts["stage 1, 8192 tokens: peak memory over its estimate"] == (1.25, False)
    assert verdicts["stage 3, 8192 tokens: graph breaks"] == (0, True)
    assert verdicts["share of a step that waits for data"] == (None, None)
    [line] = [line for line in text.splitlines() if line.startswith("stage 3, 8192 tokens: MFU")]
    assert line.split() == ["stage", "3,", "8192", "tokens:", "MFU", "0.47", "at", "least", "0.50", "MISSED"]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_rehearsal_of_every_line(tmp_path: Path) -> None:
    """The whole script on a CPU; started again, it repeats nothing."""
    options = ["--output", tmp_path, "--device", "cpu", "--tiny", "--minutes", "8"]
    done = started(*options, timeout=1400)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    summary = json.loads((tmp_path / "summary.json").read_text())
    states = {name: one["status"] for name, one in summary["steps"].items()}
    assert states.pop("pretrained") == "left out"  # nothing is prepared in a new folder
    assert set(states.values()) == {"passed"}
    assert summary["tests"]["counts"].keys() <= {"passed", "skipped"} and summary["tests"]["counts"]["passed"] >= 30
    assert all("skipped tests/test_gpu_fast_paths.py" in one for one in summary["tests"]["not_passed"])
    assert summary["quickstart"]["scale"] == 0.02
    measured = {aim["name"] for aim in summary["targets"] if aim["value"] is not None}
    assert {"share of a step that waits for data", "stage 3, 8192 tokens: peak memory over its estimate"} <= measured
    for stage in (1, 3):
        [row] = json.loads((tmp_path / f"train_step_stage_{stage}" / "train_step.json").read_text())["rows"]
        assert len(row["kernels"]["largest"]) == 10 and row["seconds"] > 0 and row["compiled_after_first_step"] == 0
    again = started(*options)
    assert again.returncode == 0 and again.stdout.count("passed before, at ") == len(states)
