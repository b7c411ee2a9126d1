"""The pre-Buffer asset: take it out of a trained model, attach it to another language model.

Two bridges join the two widths: one maps word embeddings to the pre-Buffer, the other maps its output to the language
model. Both are fitted on the tokens that the two vocabularies share. Where text goes around the pre-Buffer there is
only the second. Alone, a pre-Buffer is a vision tower: :func:`image_features`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neo_components.components.bridge import make_bridges
from neo_components.components.post_llm import PostLLM
from neo_components.components.pre_buffer import Anchors, AssetInfo, PreBuffer
from neo_components.components.text_route import BYPASS, SHARED, TEXT
from neo_components.data.packing import pack
from neo_components.devices import has_float64
from neo_components.errors import one_of
from neo_components.model.neo import NEO
from neo_components.model.vocabulary import token_strings
from neo_components.registry import BRIDGES, Choice
from neo_components.storage.deferred import deferred, filled
from neo_components.storage.weights import read_json
from neo_components.types import InputSpec, Sample, TokenKind

AUTO = "auto"
"""The bridge that ``attach`` chooses: none if the word embeddings are the same, else least squares."""
WHERE = re.compile(r"(?<![\w.:/-])(/[\w.@+ -]+)*/([\w.@+-]+)")
"""A local path from the root on, in the text of a recipe; its name is the second group."""
MOST_LOST = 0.1
"""Fraction of the variance of left-out tokens that a bridge may lose for ``text="auto"`` to lead words through it. With
noise of this variance on its word embeddings SmolLM2-135M's perplexity rises from 14 to 18, with twice as much to
30."""
MIN_SHARED = 16
"""Fewest shared tokens that a bridge is fitted from."""

log = logging.getLogger(__name__)


def export_pre_buffer(
    model: NEO, folder: str | Path, tokenizer: str | Path, anchors: int = 4096, info: AssetInfo | None = None
) -> Path:
    """Writes a model's pre-Buffer, with patch embedding, boundary vectors and anchors, as a standalone folder.

    Args:
        model: a trained model.
        folder: made if absent.
        tokenizer: folder or hub id of the tokenizer of its language model.
        anchors: most tokens in the anchor table; the first ids of a BPE vocabulary are the most used.
        info: normalization, provenance, license and card to keep with it.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: if there is no tokenizer.
        ValueError: if ``anchors`` is not positive.
    """
    if anchors < 1:
        raise ValueError(
            f"anchors must be positive, got {anchors}; {MIN_SHARED} shared ones are needed to fit a bridge"
        )
    strings = token_strings(tokenizer)
    rows = [(text, row) for text, row in strings.items() if row < model.post_llm.hparams.vocab_size][:anchors]
    if model.text == "shared" or model.bridge_out is None:
        vectors = model.post_llm.embed(model.post_llm.word_ids([row for _, row in rows])).detach()
        if model.bridge_in is not None:
            vectors = model.bridge_in(vectors).detach()
        model.pre_buffer.anchors = Anchors([text for text, _ in rows], vectors.float().cpu())
    # Else no word of this language model has a vector on the pre-Buffer's side: the asset's own anchors stay.
    model.pre_buffer.info = info or AssetInfo()
    return model.pre_buffer.save_pretrained(folder)


def provenance_of(folder: Path) -> dict[str, Any]:
    """What a model's folder records of its training, recipes included, without local paths.

    Args:
        folder: of a trained model; without ``provenance.json`` the result is empty.
    """
    path = folder / "provenance.json"
    recorded = read_json(path) if path.is_file() else {}
    for stage in recorded.get("stages", []):
        stage["data"] = [Path(name).name for name in stage.get("data", [])]
        if "recipe" in stage:
            stage["recipe"] = WHERE.sub(r"\2", stage["recipe"])
    return recorded


def attach(
    pre_buffer: PreBuffer | str | Path,
    llm: PostLLM | str | Path,
    bridge: Choice = AUTO,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype | str = "float32",
    text: str = AUTO,
    device: torch.device | str | None = None,
) -> NEO:
    """Joins a pre-Buffer to a language model.

    Args:
        pre_buffer: an asset, or its name (``pretrained:NAME``), folder or hub id. The module becomes part of the
            returned model.
        llm: folder or hub id of a language model, or a ``PostLLM``.
        bridge: registered name of a bridge, or a mapping of ``kind`` and its options: ``identity`` (no bridges, equal
            widths), ``least_squares`` or ``orthogonal`` (fitted on shared tokens), ``random``; or ``auto``: identity if
            widths and word embeddings are those that the pre-Buffer was trained with, else least squares.
        tokenizer: folder or hub id of the language model's tokenizer; by default where the model came from.
        dtype: of the weights that are read from a folder or hub id; a module stays as it is.
        text: ``shared``: words pass the pre-Buffer too, as in the paper; ``bypass``: they reach the language model
            untouched, and only images pass it; or ``auto``: shared if words come through unharmed, because there is no
            bridge or because both bridges fit tokens that were left out of the fit, else bypass. The choice is logged,
            and saved with the model.
        device: of the model; ``None``: the two parts stay where they are. Bridges are fitted in float64 on the device
            of the language model, or on the CPU if that has no float64 (mps).

    Returns:
        A model ready for tuning. What each fitted bridge leaves unexplained is logged, and kept as its ``unexplained``.

    Raises:
        ValueError: if the two cannot be joined that way; the message states why and what to do.
    """
    one_of("text", text, (*TEXT, AUTO))
    if bridge != AUTO:
        bridge = BRIDGES.complete(bridge)
    pre = pre_buffer if isinstance(pre_buffer, PreBuffer) else PreBuffer.from_pretrained(pre_buffer, dtype=dtype)
    if pre.patch_embedding is None:
        raise ValueError("this pre-Buffer has no patch embedding; load an asset, or adopt(PatchEmbedding(...)) first")
    h = pre.hparams
    if not isinstance(llm, PostLLM):
        llm = PostLLM.from_pretrained(
            llm, rope=h.rope, base_h=h.base_h, base_w=h.base_w, attention=h.attention, experts=h.experts,
            backend=pre.backend, dtype=dtype,
        )  # fmt: skip
    if device is not None:
        pre.to(device)
        llm.to(device)
    if h.rope != llm.hparams.rope:
        raise ValueError(
            f"the pre-Buffer was trained with rope {h.rope!r}, and this PostLLM has {llm.hparams.rope!r}, which counts "
            "positions by another rule; give attach the language model's folder or hub id, which is then read with "
            f"the pre-Buffer's rope, or build it with rope={h.rope!r}"
        )
    same_width = h.hidden_size == llm.hparams.hidden_size
    if bridge == AUTO:
        bridge = "identity" if same_width and _same_embeddings(pre, llm, tokenizer) else "least_squares"
    bridge_in, bridge_out = make_bridges(bridge, h.hidden_size, llm.hparams.hidden_size, text != BYPASS)
    if any(hasattr(part, "fit") for part in (bridge_in, bridge_out)):
        _fit(bridge_in, bridge_out, *shared_embeddings(pre, llm, tokenizer))
    if text == AUTO:
        text = chosen_route(bridge_in, bridge_out)
        bridge_in = bridge_in if text == SHARED else None
    # Fitted in full precision, then cast to the type of the modules that they join. Where weights are deferred theirs
    # are on the meta device still, and the bridges follow when the model is allocated.
    weight = llm.head_weight
    for part in (bridge_in, bridge_out):
        if part is not None:
            part.to(device=weight.device if deferred() is None else None, dtype=weight.dtype)
    return NEO(pre.patch_embedding, pre, llm, bridge_in, bridge_out, text)


def _fit(bridge_in: Any, bridge_out: Any, ours: Tensor, theirs: Tensor) -> None:
    """Fits the bridges and logs how well they fit."""
    reported = []
    for name, bridge, source, target in (("in", bridge_in, theirs, ours), ("out", bridge_out, ours, theirs)):
        if bridge is not None:
            bridge.to(source.device).fit(source, target)
            if getattr(bridge, "unexplained", None) is None:
                bridge.unexplained = _unexplained(bridge, source, target)
            left_out = getattr(bridge, "unexplained_left_out", None)
            missed = "" if left_out is None else f" (of tokens left out {left_out:.3f})"
            reported.append(f"{name} {bridge.unexplained:.3f}{missed}")
    log.info("bridges fitted on %d shared tokens; variance left unexplained: %s", len(ours), ", ".join(reported))
    if bridge_in is not None and (lost := lost_words(bridge_in, bridge_out)) > MOST_LOST:
        log.info(
            "a bridge loses %.2f of the variance of words left out of the fit; text='bypass' leads words around the "
            "pre-Buffer",
            lost,
        )


def lost_words(*bridges: Any) -> float:
    """The largest fraction of variance that a bridge loses of words that it was not fitted on: 0 without bridges, and
    infinite if one of them was not fitted at all.

    Of a fit that measures no left-out words, that of its own words.
    """
    lost = [0.0]
    for bridge in bridges:
        if bridge is not None:
            known = [getattr(bridge, name, None) for name in ("unexplained_left_out", "unexplained")]
            lost.append(next((value for value in known if value is not None), float("inf")))
    return max(lost)


def chosen_route(bridge_in: Any, bridge_out: Any) -> str:
    """The path of text that ``text="auto"`` takes with these bridges; it is logged."""
    lost = lost_words(bridge_in, bridge_out)
    route = SHARED if lost <= MOST_LOST else BYPASS
    if bridge_in is None and bridge_out is None:
        why = "there are no bridges"
    elif lost == float("inf"):
        why = "the bridges are not fitted"
    else:
        why = f"the bridges lose {lost:.2f} of the variance of words left out of the fit, {MOST_LOST} is allowed"
    log.info("text auto: %s, as %s", route, why)
    return route


@torch.no_grad()
def _unexplained(bridge: Any, source: Tensor, target: Tensor) -> float:
    """The fraction of the variance of target [n, out_width] that a bridge over source [n, in_width] misses."""
    with filled(bridge):
        missed = target - bridge(source)
    return float(missed.square().sum() / (target - target.mean(0)).square().sum())


def _same_embeddings(pre: PreBuffer, llm: PostLLM, tokenizer: str | Path | None) -> bool:
    """Whether the language model's word embeddings are the anchors, up to the rounding of their float16."""
    if pre.anchors is None:
        log.warning("the pre-Buffer has no anchors to compare; equal widths are taken as the same language model")
        return True
    ours, theirs = shared_embeddings(pre, llm, tokenizer)
    return bool(torch.allclose(ours, theirs, rtol=2e-3, atol=1e-4))


def shared_embeddings(pre: PreBuffer, llm: PostLLM, tokenizer: str | Path | None = None) -> tuple[Tensor, Tensor]:
    """Word embeddings of the shared tokens: [n, D of the pre-Buffer] and [n, D of the language model], float32 on the
    language model's device, or on the CPU if that has no float64.

    Raises:
        ValueError: if the pre-Buffer has no anchors, the tokenizer is unknown, or too few tokens are shared.
    """
    way_out = "; use bridge='random' (--bridge random, model.bridge=random) and train the bridges"
    if pre.anchors is None:
        raise ValueError(
            "this pre-Buffer has no anchors (word embeddings to fit a bridge from): export it with its "
            f"tokenizer{way_out}"
        )
    source = tokenizer or llm.hparams.source
    if not source:
        raise ValueError(f"the language model's tokenizer is not known: give tokenizer=folder_or_hub_id{way_out}")
    strings = token_strings(source)
    pairs = [(index, strings[text]) for index, text in enumerate(pre.anchors.tokens) if text in strings]
    pairs = [(index, row) for index, row in pairs if row < llm.hparams.vocab_size]
    if len(pairs) < MIN_SHARED:
        asset = pre.source or "given"
        raise ValueError(
            f"the pre-Buffer {asset} has {len(pre.anchors.tokens)} anchors, and the tokenizer of {source} shares only "
            f"{len(pairs)} of these tokens; {MIN_SHARED} are needed to fit a bridge{way_out}"
        )
    ours = pre.anchors.vectors[[index for index, _ in pairs]]
    with filled(llm.word_embedding):
        theirs = llm.embed(llm.word_ids([row for _, row in pairs])).detach().float()
    device = theirs.device if has_float64(theirs.device) else torch.device("cpu")
    return ours.to(device), theirs.to(device)


@torch.no_grad()
def image_features(pre_buffer: PreBuffer, images: Sequence[Tensor], pooled: bool = False) -> list[Tensor]:
    """The features of a pre-Buffer used as a vision tower: each image passes it alone, between its boundary vectors.

    Args:
        pre_buffer: with its patch embedding, as an asset has it.
        images: [C, H, W] each, normalized (``data.load_image``), sides multiples of patch_size * fold.
        pooled: give the mean over all visual tokens.

    Returns:
        For each image [h, w, D], one vector for each visual token; [D] if pooled.

    Raises:
        ValueError: if there is no patch embedding, or an image's shape does not fit.
    """
    embedding = pre_buffer.patch_embedding
    if embedding is None:
        raise ValueError("this pre-Buffer has no patch embedding; load an asset, or adopt(PatchEmbedding(...)) first")
    spec = InputSpec(
        0, 1, 2, vocab_size=3, patch_size=embedding.patch_size, fold=embedding.fold, channels=embedding.channels,
        index_rule=pre_buffer.rotary.variant.positions, image_layout=embedding.image_layout,
    )  # fmt: skip
    found = []
    for image in images:
        rows, columns = image.shape[-2] // spec.factor, image.shape[-1] // spec.factor
        tokens = spec.image_tokens(*image.shape[-2:])
        token_ids = torch.tensor([1, *[0] * tokens, 2], device="cpu")
        batch = pack([Sample(token_ids, None, [image.cpu()])], spec)
        visual = (batch.token_kinds[0] == TokenKind.VISUAL).nonzero()[:, 0]
        batch = batch.to(pre_buffer.boundary.device)
        embedded = embedding(batch.patches, batch.patch_positions, batch.indices.ids["image_grids"])
        x = torch.cat([pre_buffer.boundary[:1], embedded, pre_buffer.boundary[1:]])[None]
        where = (batch.positions, batch.document_ids, batch.image_ids, batch.token_kinds)
        x = pre_buffer(x, *where, known=batch.known)[0].index_select(0, visual.to(x.device))
        found.append(x.mean(0) if pooled else x.unflatten(0, (rows, columns)))
    return found
