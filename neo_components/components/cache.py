"""The key/value cache of generation: prefill once, then one token per document and step.

Every buffer is allocated once, for the prompts and all new tokens. A step writes by index and never reads anything back
from the device, so that the host can run ahead of a GPU, and the same step can be captured as a CUDA graph or compiled.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from neo_components.components.document_attention import HALF, Bucket, make_buckets, sdpa
from neo_components.components.masks import LayerRule, Tokens, rule_of
from neo_components.token_indices import TokenIndices, sent
from neo_components.types import NO_IMAGE, TokenKind

CHUNK = 256
"""A fixed room is a multiple of so many tokens. Values are summed chunk by chunk, so that a GPU computes them in
parallel (split-KV, as in Flash-Decoding, Dao et al. 2023)."""


class KVCache:
    """Keys and values of S documents for generation.

    Keys are twice as wide as values, as they hold T, H and W channels.

    Args:
        document_ids: [1, L] one packed sequence of S prompts, without padding.
        image_ids: [1, L].
        rules: mask rule and window of each layer. What is cached has attended already, so a token after the prompt
            attends as its rule states and changes no token before it.
        room: new tokens per document to make room for.
        token_kinds: [1, L]; ``None``: visual tokens and text, as ``image_ids`` has them.
        fixed: every step reads the full room under a mask, so that all steps have the same shapes (CUDA graphs,
            ``torch.compile``). Otherwise a step reads the tokens so far: their number is known on the host.
        known: what the CPU knows of the tokens, so that a device is not asked for it.

    Attributes:
        lengths: [S] int64, on the device: tokens of each document so far.
        layers: the attention of each layer; :class:`CachedLayer`.
        room: tokens that each document has room for, prompt and new.
        used: how much of the room a step reads.
    """

    def __init__(
        self,
        document_ids: Tensor,
        image_ids: Tensor,
        rules: Sequence[LayerRule],
        room: int,
        token_kinds: Tensor | None = None,
        fixed: bool = False,
        known: TokenIndices | None = None,
    ) -> None:
        device = document_ids.device
        if known is not None:
            document_ids, image_ids, token_kinds = (
                known.ids[name] for name in ("document_ids", "image_ids", "token_kinds")
            )
        found = {
            rule: make_buckets(document_ids, image_ids, *rule, one=True, token_kinds=token_kinds)[0]
            for rule in dict.fromkeys([*rules, LayerRule("causal")])
        }
        self._host_lengths: list[int] = found[LayerRule("causal")].lengths.tolist()
        buckets = {rule: bucket.to(device) for rule, bucket in found.items()}
        prompt = buckets[LayerRule("causal")]  # all are alike but for their masks
        self.fixed = fixed
        self.lengths = prompt.lengths.clone()
        self.documents = torch.arange(len(self.lengths), device=device)
        self.room = max(self._host_lengths) + room
        if fixed:
            self.room = fixed_room(self.room)
        self.used = self.room if fixed else max(self._host_lengths)
        self._tokens = _with_room(prompt, self.room)
        self._packed = prompt.index, sent(_packed_order(self._host_lengths), device)
        self._masks = {rule: LayerMask(rule) for rule in dict.fromkeys(rules)}
        self.layers = [CachedLayer(self, buckets[rule], self._masks[rule]) for rule in rules]

    def open(self) -> None:
        """Begins a step: computes which keys the token that each document gets now attends to."""
        if not self.fixed:
            self.used = max(self._host_lengths) + 1
        newest = self._tokens.map(lambda x: x.gather(1, self.lengths[:, None])[..., None])
        keys = self._tokens.map(lambda x: x[:, None, : self.used])
        later = keys.position > newest.position
        for mask in self._masks.values():
            mask.hidden = ~mask.attends(newest, keys) | later

    def advance(self) -> None:
        """Ends a step: every document is one token longer."""
        self.lengths.add_(1)
        if not self.fixed:
            self._host_lengths = [length + 1 for length in self._host_lengths]

    def keep(self, documents: Sequence[int]) -> None:
        """Drops all documents but these. Shapes change, so not for a fixed room."""
        index = torch.tensor(documents, device=self.lengths.device)
        self._host_lengths = [self._host_lengths[document] for document in documents]
        self.lengths, self.documents = self.lengths[index], self.documents[: len(index)]
        self._tokens = self._tokens.map(lambda x: x[index])
        for layer in self.layers:
            if layer.filled:
                layer.k, layer.v = layer.k[index], layer.v[index]

    def ends(self) -> Tensor:
        """[S]: index of the last token of each prompt in the packed sequence."""
        return self.lengths.cumsum(0) - 1

    def by_document(self, x: Tensor) -> Tensor:
        """[1, L, ...] of the packed prompts -> [S, m, ...], one document to a row."""
        index, _ = self._packed
        return x[0].index_select(0, index.flatten()).unflatten(0, index.shape)

    def packed(self, x: Tensor) -> Tensor:
        """The reverse of :meth:`by_document`."""
        return x.flatten(0, 1).index_select(0, self._packed[1])[None]

    def with_room(self, x: Tensor) -> Tensor:
        """Keys or values [S, m, K, C] of the prompts -> [S, K, room, C]."""
        kept = x.new_zeros(len(x), x.shape[2], self.room, x.shape[3])
        kept[:, :, : x.shape[1]] = x.transpose(1, 2)
        return kept


class LayerMask:
    """Whom the newest token of each document does not attend to; shared by the layers of one rule.

    Attributes:
        attends: the rule.
        hidden: [S, 1, used] bool, of the present step.
    """

    hidden: Tensor

    def __init__(self, rule: LayerRule) -> None:
        self.attends = rule_of(*rule)


class CachedLayer:
    """One layer's part of the cache; an :class:`~neo_components.components.block_inputs.Attend`.

    Attributes:
        k: [S, K, room, 2E], once the prompts were read.
        v: [S, K, room, E].
    """

    k: Tensor
    v: Tensor

    def __init__(self, cache: KVCache, bucket: Bucket, mask: LayerMask) -> None:
        self.cache, self.bucket, self.mask = cache, bucket, mask
        self.filled = False

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return self._decode(q, k, v, scale) if self.filled else self._prefill(q, k, v, scale)

    def _prefill(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        cache = self.cache
        q, k, v = (cache.by_document(x) for x in (q, k, v))
        self.k, self.v = cache.with_room(k), cache.with_room(v)
        self.filled = True
        return cache.packed(sdpa(q, k, v, self.bucket.mask, scale))

    def _decode(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        cache = self.cache
        self.k[cache.documents, :, cache.lengths] = k[:, 0]
        self.v[cache.documents, :, cache.lengths] = v[:, 0]
        if cache.fixed:
            return attend_to_one(q, self.k, self.v, self.mask.hidden, scale, cache.room // CHUNK)
        keys, values = self.k[:, :, : cache.used], self.v[:, :, : cache.used]
        return attend_to_one(q, keys, values, self.mask.hidden, scale)


def fixed_room(tokens: int) -> int:
    """The next size at which a fixed room ends: ``CHUNK`` times a power of two, or three times one. Few sizes, as
    ``torch.compile`` compiles for each."""
    chunks = -(-tokens // CHUNK)
    octave = 1 << (chunks - 1).bit_length()
    return CHUNK * (3 * octave // 4 if octave > 2 and 4 * chunks <= 3 * octave else octave)


def attend_to_one(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, scale: float, chunks: int = 1) -> Tensor:
    """Attention of one query per document; every key and value is read once, whatever the number of query heads.

    Scores and softmax are float32 for half precision, as in the fused kernels.

    Args:
        q: [S, 1, N, 2E].
        k: [S, K, n, 2E].
        v: [S, K, n, E].
        hidden: [S, 1, n] bool, keys that the query does not attend to.
        scale: factor of the scores.
        chunks: sum the values in so many parts, which must divide n.

    Returns:
        [S, 1, N, E].
    """
    documents, groups, keys = k.shape[:3]
    queries = q.reshape(documents * groups, -1, q.shape[-1])
    scores = product(queries, k.flatten(0, 1).transpose(1, 2)).view(documents, -1, keys) * scale
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1).to(v.dtype)
    # [S * K, G, chunks, n / chunks] -> [S * K * chunks, G, n / chunks]
    weights = weights.view(documents * groups, -1, chunks, keys // chunks).transpose(1, 2).flatten(0, 1)
    values = v.reshape(documents * groups * chunks, keys // chunks, -1) if chunks > 1 else v.flatten(0, 1)
    out = product(weights, values)
    if chunks > 1:
        out = out.unflatten(0, (-1, chunks)).sum(1)
    return out.view(documents, 1, -1, v.shape[-1]).to(v.dtype)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Batched matrix product [n, i, j] x [n, j, k] -> [n, i, k], of float32 for factors of half precision."""
    if torch.compiler.is_compiling():
        # One reduction that scale, mask and rounding are fused with. For few rows i no matrix kernel is faster.
        a, b = (x.float() if x.dtype in HALF else x for x in (a, b))
        return (a[..., None] * b[:, None]).sum(2)
    if a.dtype not in HALF:
        return torch.bmm(a, b)
    if a.is_cuda:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


def _packed_order(lengths: Sequence[int]) -> Tensor:
    """[L]: index in a flattened [S, m] of each token of the packed sequence; m is the largest length."""
    row = max(lengths)
    return torch.cat([torch.arange(length) + number * row for number, length in enumerate(lengths)])


def _with_room(bucket: Bucket, room: int) -> Tokens:
    """[S, room]: the tokens of prompts, and words behind each."""
    prompt = bucket.tokens
    index = torch.arange(room, device=prompt.position.device).expand(len(bucket.lengths), -1)
    new = index >= bucket.lengths[:, None]
    behind = (0, room - prompt.position.shape[1])
    image, kind = (torch.nn.functional.pad(x, behind) for x in (prompt.image, prompt.kind))
    return Tokens(
        torch.zeros_like(index), image.masked_fill(new, NO_IMAGE), kind.masked_fill(new, TokenKind.TEXT), index
    )
