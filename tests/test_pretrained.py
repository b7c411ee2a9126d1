"""Assets that ship: found by name wherever one can be named, checked before they are read, added by one command."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import edit_config, weights_of
from commands import good, neo
from hub_stub import serving
from llm_builders import word_tokenizer
from safetensors.torch import load_file
from test_hub import run

from neo_components import NEO, PreBuffer, attach, build, load_recipe
from neo_components.pretrained.ship import LARGEST, ship, trained_on
from neo_components.storage import pretrained
from neo_components.storage.pretrained import (
    StoredFile,
    assets_folder,
    list_pretrained,
    resolve_asset,
    write_index,
)
from neo_components.storage.weights import save_tensors

ROOT = Path(__file__).parent.parent
FILES = {"config.json", "model.safetensors", "anchors.safetensors", "preprocessor_config.json", "README.md"}


@pytest.fixture(scope="module")
def exported(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An asset out of a real run of two steps."""
    root = tmp_path_factory.mktemp("trained")
    good("train", world / "run.yaml", f"output={root}/run")
    good("export", root / "run" / "neo", "-o", root / "asset", "--license", "apache-2.0")
    return root / "asset"


@pytest.fixture(scope="module")
def shipped(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of assets with that one, added by the command."""
    assets = tmp_path_factory.mktemp("shipped") / "assets"
    assets.mkdir()
    (assets / "index.json").write_text("{}\n")
    good("pretrained", "add", exported, "small", "--description", "Colors.", "--assets", assets)
    return assets


@pytest.fixture
def assets(shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder, in the place of this library's own."""
    folder = Path(shutil.copytree(shipped, tmp_path / "assets"))
    monkeypatch.setattr(pretrained, "assets_folder", lambda: folder)
    return folder


# --- what is added


def test_what_ships_is_float16_with_checksums(exported: Path, shipped: Path) -> None:
    stored, exact = (load_file(folder / "model.safetensors") for folder in (shipped / "small", exported))
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert all(torch.equal(tensor, exact[name].half()) for name, tensor in stored.items())
    anchors = load_file(shipped / "small" / "anchors.safetensors")
    assert anchors["vectors"].dtype == torch.float16 and len(anchors["vectors"]) > 256
    entry = list_pretrained(shipped)["small"]
    assert set(entry.files) == FILES == {path.name for path in (shipped / "small").iterdir()}
    assert all(StoredFile.of(shipped / "small" / name) == stored for name, stored in entry.files.items())
    assert entry.bytes == sum(path.stat().st_size for path in (shipped / "small").iterdir())
    assert entry.parameters == sum(tensor.numel() for tensor in exact.values())
    assert (entry.license, entry.trained_on, entry.hub) == ("apache-2.0", "2 steps on shards", "")
    card = (shipped / "small" / "README.md").read_text()
    assert 'PreBuffer.from_pretrained("pretrained:small")' in card and "THIS_FOLDER" not in card


def test_an_asset_is_listed_with_what_decides(assets: Path, exported: Path) -> None:
    size = list_pretrained(assets)["small"].bytes / 1e6
    parameters = list_pretrained(assets)["small"].parameters / 1e6
    assert re.fullmatch(
        rf"pretrained:small +{size:.1f} MB, {parameters:.1f} M parameters, license apache-2.0. Colors. Trained for 2 "
        r"steps on shards\.\n",
        good("pretrained", "list"),
    )


def test_nothing_ships(assets: Path) -> None:
    write_index({}, assets)
    assert neo("pretrained", "list") == (0, "", "no asset ships with this version\n")


def test_the_commands_of_the_asset_page(
    assets: Path, world: Path, tmp_path: Path, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "quickstart").mkdir(parents=True)
    (tmp_path / "outputs" / "quickstart" / "neo").symlink_to(exported.parent / "run" / "neo")
    page = (ROOT / "docs" / "asset.md").read_text()
    lines = [line for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    outputs = [good(*shlex.split(line)[1:]) for line in lines]
    assert outputs[0] == outputs[2] == "outputs/asset\n" and outputs[1].startswith("pretrained:small ")
    assert re.fullmatch(r"pretrained:mine: 0\.\d MB, trained for 2 steps on shards\n", outputs[3])
    assert list(list_pretrained(assets)) == ["mine", "small"]
    keys = {
        key
        for line in page.splitlines()
        if line.startswith("| `")
        for key in re.findall(r"`(\w+)`", line.split("|")[1])
    }
    assert set(json.loads((assets / "index.json").read_text())["mine"]) <= keys


def test_adding_again_gives_the_same_bytes(exported: Path, assets: Path) -> None:
    before = {path.name: path.read_bytes() for path in (assets / "small").iterdir()}
    index = (assets / "index.json").read_bytes()
    (assets / "small" / "old.txt").touch()
    ship(exported, "small", "Colors.", assets)
    assert {path.name: path.read_bytes() for path in (assets / "small").iterdir()} == before
    assert (assets / "index.json").read_bytes() == index
    ship(exported, "other", "Colors again.", assets, trained_for="2 steps on eight colors")
    assert {name: asset.trained_on for name, asset in list_pretrained(assets).items()} == {
        "other": "2 steps on eight colors", "small": "2 steps on shards"
    }  # fmt: skip


def test_what_was_trained_on() -> None:
    stages = [{"steps": 1200, "data": ["a", "b"]}, {"steps": 300, "data": ["b", "c"]}]
    assert trained_on({"stages": stages}) == "1,500 steps on a, b, c"


def scaled(folder: Path, factor: float) -> None:
    """Multiplies the weights of the first norm, so that float16 does not hold them."""
    state = weights_of(folder)
    state["layers.0.input_layernorm.weight"] *= factor
    save_tensors(folder / "model.safetensors", state)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda f: edit_config(f, lambda c: c.update(license="")), r"lacks a license \(neo export --license\); export"),
        (lambda f: edit_config(f, lambda c: c.update(provenance={})), r"lacks its training stages \(provenance.json"),
        (lambda f: (f / "anchors.safetensors").unlink(), r"lacks anchors \(word embeddings for bridges\)"),
        (lambda f: scaled(f, 1e6), r"layers.0.input_layernorm.weight has values that are not finite in float16"),
    ],
)
def test_what_does_not_ship(exported: Path, assets: Path, tmp_path: Path, edit: Any, message: str) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "asset"))
    edit(folder)
    before = (assets / "index.json").read_bytes()
    with pytest.raises(ValueError, match=message):
        ship(folder, "small", "Colors.", assets)
    assert (assets / "index.json").read_bytes() == before and set(FILES) == {
        p.name for p in (assets / "small").iterdir()
    }


def test_names_and_descriptions_that_are_none(exported: Path, assets: Path) -> None:
    for name in ("Small", "", "../small", "a b"):
        with pytest.raises(ValueError, match=r"name must be lower case letters, digits, '-' and '_', got "):
            ship(exported, name, "Colors.", assets)
    with pytest.raises(ValueError, match="description is empty; say in a sentence what"):
        ship(exported, "small", " ", assets)


def test_an_asset_too_large_to_ship(exported: Path, assets: Path, tmp_path: Path) -> None:
    """A card of 40 MB makes it so."""
    folder = Path(shutil.copytree(exported, tmp_path / "asset"))
    (folder / "README.md").write_text("x" * LARGEST)
    with pytest.raises(ValueError, match=r"bytes in float16, and at most 40,000,000 ship; publish it with push_to_hub"):
        ship(folder, "large", "Colors.", assets)


# --- wherever an asset can be named


def test_python_takes_the_name(exported: Path, assets: Path, world: Path) -> None:
    part, exact = PreBuffer.from_pretrained("pretrained:small"), PreBuffer.from_pretrained(exported)
    assert part.source == "pretrained:small" and {p.dtype for p in part.parameters()} == {torch.float32}
    for name, tensor in exact.state_dict().items():
        assert torch.equal(part.state_dict()[name], tensor.half().float()), name
    assert part.anchors is not None and part.anchors.vectors.dtype == torch.float32
    half = PreBuffer.from_pretrained("pretrained:small", dtype="float16")
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    model = attach("pretrained:small", world / "other")
    assert model.bridge_out is not None
    assert torch.equal(model.pre_buffer.boundary, part.boundary)


def test_commands_take_the_name(assets: Path, world: Path, tmp_path: Path) -> None:
    good("attach", "pretrained:small", world / "other", "-o", tmp_path / "attached")
    attached = NEO.from_pretrained(tmp_path / "attached")
    stored = load_file(assets / "small" / "model.safetensors")
    assert torch.equal(attached.pre_buffer.boundary, stored["boundary"].float())
    answer = good("chat", tmp_path / "attached", "what is it?", "--image", world / "red.png", "--max-new-tokens", "2")
    assert answer.endswith("\n")


def test_recipes_take_the_name(assets: Path, world: Path, tmp_path: Path) -> None:
    text = (world / "run.yaml").read_text()
    text = re.sub(r"  patch_embedding: .*\n", "", text).replace("{depth: 1}", "{from_pretrained: pretrained:small}")
    (tmp_path / "run.yaml").write_text(text.replace(f"output: {world}/run", f"output: {tmp_path}/run"))
    assert good("recipes", "validate", tmp_path / "run.yaml") == "valid\n"
    parameters = list_pretrained(assets)["small"].parameters
    counted = json.loads(good("inspect", tmp_path / "run.yaml", "--json"))["groups"]
    assert counted["pre_buffer"]["parameters"] + counted["patch_embedding"]["parameters"] == parameters
    good("train", tmp_path / "run.yaml")
    recipe = (tmp_path / "run" / "recipe.yaml").read_text()
    assert "from_pretrained: pretrained:small" in recipe
    stored = load_file(assets / "small" / "model.safetensors")["layers.0.mlp.up_proj.weight"].float()
    start = build(load_recipe(tmp_path / "run.yaml").model).pre_buffer.state_dict()["layers.0.mlp.up_proj.weight"]
    assert torch.equal(start, stored)
    reset = load_recipe(tmp_path / "run.yaml", ["model.pre_buffer.reset=true"]).model
    assert not torch.equal(build(reset).pre_buffer.state_dict()["layers.0.mlp.up_proj.weight"], stored)


def test_a_large_asset_comes_from_the_hub_and_is_compared(exported: Path, assets: Path, tmp_path: Path) -> None:
    """The first call fetches no weights, the second does; of another asset the repository has changed since."""
    for name in ("big", "changed"):
        shutil.copytree(exported, tmp_path / "hub" / "me" / name)
        words = ("--description", "Colors.", "--hub", f"me/{name}", "--assets", assets)
        good("pretrained", "add", exported, name, *words)
        assert not (assets / name).exists()
    assert " MB (on the Hub: me/big), " in good("pretrained", "list")
    (tmp_path / "hub" / "me" / "changed" / "config.json").write_text("{}")
    code = (
        "import pathlib; from neo_components.storage.pretrained import resolve_asset as get; "
        f"where = pathlib.Path({str(assets)!r}); print(get('pretrained:big', False, where)); "
        "print(get('pretrained:big', assets=where)); get('pretrained:changed', assets=where)"
    )
    with serving(tmp_path / "hub") as hub:
        out, _ = run(code, tmp_path / "cache", hub.address)
    folder, same, failed = out.splitlines()
    assert folder == same and {path.name for path in Path(folder).iterdir()} == FILES
    weights = [name.endswith(".safetensors") for name in hub.fetched]
    assert sum(weights) == 4 and weights[:5] == [False, False, False, True, True]
    assert PreBuffer.from_pretrained(folder).hparams.depth == 1
    assert re.fullmatch(
        r"ValueError: pretrained:changed is damaged: .*config\.json has 2 bytes and must have .*; remove .*, and it is "
        r"downloaded again",
        failed,
    )


# --- what is wrong


def test_a_name_that_does_not_exist(assets: Path, world: Path) -> None:
    message = (
        "no pre-Buffer asset of the name 'pretrained:smal' ships with this version of neo-components; these do: "
        "pretrained:small; did you mean 'pretrained:small'?"
    )
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        PreBuffer.from_pretrained("pretrained:smal")
    done = neo("attach", "pretrained:smal", world / "other", "-o", assets.parent / "a")
    assert (done.status, done.err) == (1, f"error: {message}\n")
    for name in ("pretrained:", "pretrained:../small", "pretrained:SMALL"):
        with pytest.raises(FileNotFoundError, match=r"ships with this version .*; these do: pretrained:small"):
            resolve_asset(name)
    write_index({}, assets)
    with pytest.raises(FileNotFoundError, match=r"ships with this version of neo-components; none does$"):
        resolve_asset("pretrained:small")


@pytest.mark.parametrize("file", sorted(FILES))
def test_a_damaged_file(assets: Path, file: str) -> None:
    """One changed bit, one byte less, and none at all; what is meant for the weights does not read them."""
    path = assets / "small" / file
    whole = path.read_bytes()
    way_out = rf"; restore it in the clone: git checkout -- {assets}/small$"
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    wanted = rf"pretrained:small is damaged: {path} has a SHA-256 of [0-9a-f]{{12}}\.\.\., the index states .*{way_out}"
    with pytest.raises(ValueError, match=wanted):
        PreBuffer.from_pretrained("pretrained:small")
    if file.endswith(".safetensors"):
        assert resolve_asset("pretrained:small", weights=False) == assets / "small"
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=rf"{path} has {len(whole) - 1:,} bytes and must have {len(whole):,}{way_out}"):
        PreBuffer.from_pretrained("pretrained:small")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"pretrained:small is not complete: {path} is missing{way_out}"):
        PreBuffer.from_pretrained("pretrained:small")


@pytest.mark.parametrize(
    "text", ["", "[]", '{"small": 1}', '{"small": {"files": {"../x": {"bytes": 1, "sha256": ""}}}}']
)
def test_a_damaged_index(assets: Path, text: str) -> None:
    (assets / "index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json is damaged \(.*\); restore it in the clone: git checkout"):
        PreBuffer.from_pretrained("pretrained:small")
    (assets / "index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"index\.json is missing, which lists the assets that ship; restore"):
        PreBuffer.from_pretrained("pretrained:small")


def test_an_asset_of_a_newer_format(exported: Path, assets: Path, world: Path, tmp_path: Path) -> None:
    """Whoever reads it: Python, the command, and an estimate, which reads no weights."""
    edit_config(assets / "small", lambda config: config.update(format_version=2))
    entry = list_pretrained(assets)["small"]
    files = {name: StoredFile.of(assets / "small" / name) for name in entry.files}
    write_index({"small": pretrained.Pretrained(**vars(entry) | {"files": files})}, assets)
    message = r"small has format_version 2, this library reads up to 1; upgrade neo-components to open it"
    with pytest.raises(ValueError, match=message):
        attach("pretrained:small", world / "other")
    text = (world / "run.yaml").read_text()
    text = re.sub(r"  patch_embedding: .*\n", "", text).replace("{depth: 1}", "{from_pretrained: pretrained:small}")
    (tmp_path / "run.yaml").write_text(text)
    for command in (
        ("inspect", tmp_path / "run.yaml"),
        ("attach", "pretrained:small", world / "llm", "-o", tmp_path / "a"),
    ):
        done = neo(*command)
        assert done.status == 1 and re.search(message, done.err), done


def test_a_tokenizer_that_shares_nothing(assets: Path, world: Path, tmp_path: Path) -> None:
    strange = Path(shutil.copytree(world / "other", tmp_path / "strange"))
    (strange / "tokenizer.json").unlink()
    word_tokenizer().save_pretrained(strange)
    part = PreBuffer.from_pretrained("pretrained:small")
    assert part.anchors is not None
    message = (
        f"the pre-Buffer pretrained:small has {len(part.anchors.tokens)} anchors, and the tokenizer of {strange} "
        "shares only 2 of these tokens; 16 are needed to fit a bridge; use bridge='random' (--bridge random, "
        "model.bridge=random) and train the bridges"
    )
    done = neo("attach", "pretrained:small", strange, "-o", tmp_path / "a")
    assert (done.status, done.err) == (1, f"error: {message}\n")
    good("attach", "pretrained:small", strange, "-o", tmp_path / "a", "--bridge", "random")  # the way out


@pytest.mark.parametrize(
    "command",
    [
        "attach pretrained:small pretrained:small -o {t}/a", "attach {w}/neo pretrained:small -o {t}/a --dtype auto",
        "chat pretrained:small hi", "export pretrained:small -o {t}/a", "evaluate pretrained:small {w}/shards",
        "train {w}/run.yaml output={t}/a model.post_llm.from_pretrained=pretrained:small",
        "train {w}/run.yaml output={t}/a data.tokenizer=pretrained:small",
        "inspect {w}/run.yaml model.post_llm.from_pretrained=pretrained:small",
    ],
)  # fmt: skip
def test_a_name_in_the_place_of_a_model(command: str, assets: Path, world: Path, tmp_path: Path) -> None:
    done = neo(*command.format(w=world, t=tmp_path).split())
    assert done.status == 1
    assert (
        "'pretrained:small' names a pre-Buffer asset, which has neither a language model nor a tokenizer; give a "
        "folder or a hub id 'owner/name' of one here. `neo attach pretrained:small LLM -o OUT` joins the asset to a "
        "language model"
    ) in done.err
    assert "Traceback" not in done.err


# --- what ships with this version


def test_the_index_of_this_library_is_true() -> None:
    """Every listed asset is whole, every folder is listed, and none is larger than what ships."""
    assert assets_folder() == ROOT / "assets"
    listed = list_pretrained()
    assert {path.name for path in assets_folder().iterdir()} == {"index.json"} | {
        n for n, e in listed.items() if not e.hub
    }
    for name, entry in listed.items():
        if not entry.hub:
            part = PreBuffer.from_pretrained(f"pretrained:{name}", dtype="float16")
            assert sum(p.numel() for p in part.parameters()) == entry.parameters
            assert set(entry.files) == FILES == {path.name for path in (assets_folder() / name).iterdir()}
            assert entry.bytes <= LARGEST and part.info.license == entry.license != ""
            assert entry.description and entry.trained_on
