"""Weights that are written one by one are those of a model that is saved at once."""

from __future__ import annotations

from pathlib import Path

from builders import same_outputs, same_tensors, tiny_model, weights_of

from neo_components import NEO
from neo_components.storage.weight_writer import WeightWriter
from neo_components.storage.weights import TensorFiles


def write(model: NEO, folder: Path, largest: int) -> list[str]:
    """Writes a model in pieces; the names of the files of weights."""
    writer = WeightWriter(folder, largest)
    for name, tensor in sorted(model.state_dict().items()):
        writer.add(name, tensor)
    writer.close()
    model.save_description(folder)
    return sorted(path.name for path in folder.glob("*") if path.name not in ("config.json", "README.md"))


def test_what_fits_into_one_file_is_the_usual_folder(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "at_once")
    assert write(model, tmp_path / "pieces", 2**30) == ["model.safetensors"]
    for file in (tmp_path / "at_once").iterdir():
        assert (tmp_path / "pieces" / file.name).read_bytes() == file.read_bytes(), file.name


def test_more_goes_into_several_files_and_replaces_what_was_there(tmp_path: Path) -> None:
    model = tiny_model()
    state = model.state_dict()
    largest = 20_000
    assert write(model, tmp_path, 2**30) == ["model.safetensors"]
    names = write(model, tmp_path, largest)
    parts = names[:-1]
    assert names[-1] == "model.safetensors.index.json" and len(parts) > 3
    assert parts == [f"model-{n + 1:05d}-of-{len(parts):05d}.safetensors" for n in range(len(parts))]
    files = TensorFiles(tmp_path)
    assert same_tensors({name: files.get(name) for name in files.names()}, dict(state))
    sizes = [sum(state[name].nbytes for name, file in files.files.items() if file.name == part) for part in parts]
    biggest = max(tensor.nbytes for tensor in state.values())
    assert all(0 < size <= max(largest, biggest) for size in sizes)
    assert same_outputs(NEO.from_pretrained(tmp_path), model)
    assert write(model, tmp_path, 2**30) == ["model.safetensors"]
    assert same_tensors(weights_of(tmp_path), dict(state))
