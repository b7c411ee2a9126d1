"""Small models, random samples and plain readings of the rules for the tests of the core."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neo_components import NEO, Batch, InputSpec, PatchEmbedding, PostLLM, PreBuffer, Sample, pack
from neo_components.components.block_inputs import Attend, BlockInputs
from neo_components.components.rotary import H, PairTable, RopeVariant, T, W
from neo_components.types import IGNORED, NO_IMAGE, DocumentTokens, ImageGrid, kinds_of

Edit = Callable[[dict[str, Any]], Any]

SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "head_width": 8, "feed_forward_size": 48,
}  # fmt: skip
VOCAB = 60


def randomize(module: nn.Module, seed: int = 0, std: float = 0.2) -> None:
    """Random weights of a size that makes every part count; norms lie around 1 instead of at 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(1 + noise if "norm" in name else noise)


def tiny_model(
    patch: dict[str, Any] | None = None,
    pre: dict[str, Any] | None = None,
    post: dict[str, Any] | None = None,
    seed: int = 0,
    **sizes: Any,
) -> NEO:
    """A random NEO: 2 pre-Buffer and 2 post-LLM blocks, 4-pixel patches folded 2 x 2.

    Args:
        patch, pre, post: arguments of one part that differ.
        seed: of the weights.
        sizes: arguments of both stacks that differ.
    """
    sizes = SIZES | sizes
    patch = {"width": 16, "patch_size": 4} | (patch or {})
    pre_buffer = PreBuffer(**({"depth": 2} | sizes | (pre or {})))
    post_llm = PostLLM(**({"vocab_size": VOCAB, "depth": 2, "image_token_id": VOCAB - 3} | sizes | (post or {})))
    model = NEO(PatchEmbedding(pre_buffer.hparams.hidden_size, **patch), pre_buffer, post_llm)
    randomize(model, seed)
    return model


def expressible(tied: bool = False, **options: Any) -> NEO:
    """A model that the released layout can hold whole: its boundary vectors are rows of the word embedding."""
    model = tiny_model(post={"tie_embeddings": tied}, **options)
    with torch.no_grad():
        model.pre_buffer.boundary.copy_(model.post_llm.word_embedding.weight[VOCAB - 2 :])
    return model


def set_backend(model: NEO, backend: str) -> None:
    """Computes attention by that backend from now on."""
    model.pre_buffer.backend = model.post_llm.backend = backend


def image_tokens(spec: InputSpec, grid: tuple[int, int], boundary: bool = True) -> list[int]:
    """Token ids of one image of rows x columns visual tokens."""
    tokens = [spec.image_token_id] * (grid[0] * grid[1])
    return [spec.image_start_id, *tokens, spec.image_end_id] if boundary else tokens


def random_image(spec: InputSpec, grid: tuple[int, int], generator: torch.Generator) -> Tensor:
    """[C, H, W] normal noise of rows x columns visual tokens."""
    return torch.randn(spec.channels, grid[0] * spec.factor, grid[1] * spec.factor, generator=generator)


def random_sample(
    spec: InputSpec, seed: int, images: int | None = None, text: tuple[int, int] = (1, 8), learn: bool = True
) -> Sample:
    """Text with images of random sizes between it.

    Args:
        spec: of the model.
        seed: same seed, same sample.
        images: how many, 0 to 2 if not given.
        text: least and most tokens of each stretch of text.
        learn: whether about half of the text is labelled, the last token always.
    """
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    grids = [
        (choose.randint(1, 3), choose.randint(1, 3)) for _ in range(choose.randint(0, 2) if images is None else images)
    ]
    lowest_image_id = min(*spec.image_special_token_ids, spec.vocab_size)
    ids: list[int] = []
    for grid in (*grids, None):
        ids += [choose.randrange(lowest_image_id) for _ in range(choose.randint(*text))]
        ids += image_tokens(spec, grid) if grid else []
    ids += [choose.randrange(lowest_image_id) for _ in range(2)]
    token_ids = torch.tensor(ids)
    drawn = torch.rand(len(ids), generator=generator) < 0.5
    drawn[-1] = True
    labels = torch.where(drawn & (token_ids < lowest_image_id), token_ids, IGNORED)
    pictures = [random_image(spec, grid, generator) for grid in grids]
    return Sample(token_ids, labels if learn else None, pictures, key=f"random-{seed}")


def random_batch(
    spec: InputSpec, seed: int, rows: int = 2, documents: int = 3, padding: int = 3, **options: Any
) -> tuple[Batch, list[list[Sample]]]:
    """Packed rows, each padded by at least ``padding`` tokens, and the samples of each."""
    samples = [
        [random_sample(spec, 1000 * seed + 10 * row + n, **options) for n in range(documents)] for row in range(rows)
    ]
    longest = max(sum(len(sample.token_ids) for sample in row) for row in samples)
    return Batch.stack([pack(row, spec, seq_len=longest + padding) for row in samples]), samples


def plain_tokens(row: Sequence[Sample], spec: InputSpec) -> list[tuple[int, int | None]]:
    """(document, image of the row) of every token of a packed row, read off the samples one token at a time."""
    tokens: list[tuple[int, int | None]] = []
    image = -1
    for document, sample in enumerate(row):
        left = 0
        sizes = [(i.shape[1] // spec.factor) * (i.shape[2] // spec.factor) for i in sample.images]
        for token in sample.token_ids.tolist():
            if token != spec.image_token_id:
                tokens.append((document, None))
                continue
            if not left:
                image, left = image + 1, sizes.pop(0)
            left -= 1
            tokens.append((document, image))
    return tokens


def by_section(x: Tensor, head_width: int) -> tuple[Tensor, Tensor, Tensor]:
    """T, H and W channels of rotated queries or keys [..., 2E], whose first halves of all sections come first."""
    pairs = (head_width // 2, head_width // 4, head_width // 4)
    first, second = (half.split(pairs, dim=-1) for half in x.chunk(2, dim=-1))
    t, h, w = (torch.cat(both, dim=-1) for both in zip(first, second, strict=True))
    return t, h, w


def document_of(image_ids: Tensor, grids: Sequence[tuple[int, int]]) -> DocumentTokens:
    """A document of words and visual tokens, as index rules see it."""
    return DocumentTokens(image_ids, kinds_of(image_ids), [ImageGrid(*grid) for grid in grids])


class MRope(RopeVariant):
    """M-RoPE (Qwen2-VL)."""

    def positions(self, document: DocumentTokens) -> Tensor:
        """Text (p, p, p), image (b, b + h, b + w), text goes on behind the largest index."""
        positions, base, image = [], 0, 0
        while len(positions) < len(document.image_ids):
            if document.image_ids[len(positions)] == NO_IMAGE:
                positions.append((base, base, base))
                base += 1
            else:
                rows, columns = document.images[image].rows, document.images[image].columns
                positions += [(base, base + h, base + w) for h in range(rows) for w in range(columns)]
                base, image = base + max(rows, columns), image + 1
        return torch.tensor(positions)

    def table(self, frequency_t: Sequence[float]) -> PairTable:
        """Of every 8 pairs 2 on T, 3 on H and 3 on W, at the language model's frequencies; the new channels alike."""
        share = len(frequency_t) // 8
        axis = (T,) * 2 * share + (H,) * 3 * share + (W,) * 3 * share
        own = PairTable(axis, tuple(frequency_t))
        return own + own


def text_inputs(tables: tuple[Tensor, Tensor], attend: Attend) -> BlockInputs:
    """What a block reads beside x where all tokens are words."""
    none = torch.full(tables[0].shape[:2], NO_IMAGE)
    return BlockInputs(tables, attend, none, kinds_of(none))


def weights_of(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder's model.safetensors."""
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def same_outputs(one: NEO, other: NEO) -> bool:
    """Whether two models give the same logits, bit for bit, on text and images."""
    batch, _ = random_batch(one.input_spec, seed=1, images=1)
    with torch.no_grad():
        return torch.equal(one(batch).logits, other(batch).logits)


def same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def edit_config(folder: Path, edit: Edit) -> None:
    """Changes a folder's config.json."""
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


def llm_folder(folder: Path) -> Path:
    return Path(shutil.copytree(Path(__file__).parent / "data" / "init_from_llm" / "untied" / "llm", folder))
