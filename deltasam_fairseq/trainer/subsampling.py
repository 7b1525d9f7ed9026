"""Take a subset of a mini-batch's sentences for the ascent (--sam-ascent-fraction).

Bahri et al. 2021 ("Sharpness-Aware Minimization Improves Language Model Generalization") use the
gradient of a random quarter of the batch. delta-SAM selects the sentences with the largest weights.
"""

import math
from typing import Any, Callable, Dict, List, Sequence, Set, Tuple

import numpy as np
import torch
from torch import Tensor

OPTION = "--sam-ascent-fraction"
_REMEDY = {OPTION: f"use {OPTION} 1", "--sam-micro": "drop --sam-micro"}

# Tensors of tokens with padding.
_TOKENS = ("src_tokens", "prev_output_tokens")

# Keys that lead to a tensor in a mini-batch.
Path = Tuple[str, ...]


def kept_count(n: int, fraction: float) -> int:
    """Return ``ceil(fraction n)``, the number of n sentences in the ascent, 1 to n."""
    return max(1, math.ceil(fraction * n - 1e-9))  # 0.1 * 30 is 3.0000000000000004


def draw_sentences(n: int, fraction: float, generator: torch.Generator) -> Tensor:
    """Draw `kept_count` of n sentences uniformly; return sorted indices, shape (kept,)."""
    shuffled = torch.randperm(n, generator=generator)
    return shuffled[: kept_count(n, fraction)].sort().values


def most_unguarded(weights: Tensor, fraction: float) -> Tensor:
    """Return the indices of the sentences with the largest ``|a_j|``.

    Args:
        weights: ``g'_j``, shape (B,). They rise with ``|a_j|`` (Eq. 4 to 6, ``r >= 0``); if they
            are uniform, take the first sentences.
        fraction: above 0, at most 1.

    Returns:
        sorted, shape (kept,).
    """
    order = torch.sort(weights, descending=True, stable=True).indices
    return order[: kept_count(len(weights), fraction)].sort().values


def number_of_sentences(sample: Dict[str, Any], option: str = OPTION) -> int:
    """Return B of a fairseq mini-batch.

    Args:
        sample: the mini-batch.
        option: that asks for it, for the error.

    Raises:
        ValueError: if it cannot be found.
    """
    if "nsentences" in sample:
        return int(sample["nsentences"])
    inputs = sample.get("net_input", {})
    for tensor in (sample.get("target"), *(inputs.get(key) for key in _TOKENS)):
        if torch.is_tensor(tensor) and tensor.dim():
            return len(tensor)
    raise ValueError(
        f"{option}: the mini-batches of this task do not give their number of sentences (no "
        f"nsentences, target or src_tokens); {_REMEDY[option]}"
    )


def take_sentences(
    sample: Dict[str, Any],
    kept: Tensor,
    padding: int,
    multiple: int = 1,
    option: str = OPTION,
) -> Dict[str, Any]:
    """Return the mini-batch of some sentences of ``sample``, which is not changed.

    Cut columns at either end that are padding for all of them, as fairseq's collater would, and
    recount ntokens.

    Args:
        sample: fairseq's mini-batch: nested dictionaries and lists of tensors whose first
            dimension is sentences.
        kept: indices of the sentences, shape (kept,).
        padding: index of the padding token.
        multiple: keep lengths a multiple of it, --required-seq-len-multiple.
        option: that asks for it, for the error.

    Raises:
        ValueError: the rows of a tensor are not one a sentence.
    """
    n = number_of_sentences(sample, option)
    part = _select(sample, kept, n, "sample", option)
    part = _without_padding(part, len(kept), padding, multiple)
    if "nsentences" in sample:
        part["nsentences"] = len(kept)
    if "ntokens" in sample:
        part["ntokens"] = _count_tokens(sample, part, n, padding)
    return part


def _select(node: Any, kept: Tensor, n: int, path: str, option: str) -> Any:
    if isinstance(node, dict):
        return {k: _select(v, kept, n, f"{path}.{k}", option) for k, v in node.items()}
    if isinstance(node, (list, tuple)):
        if len(node) == n and not _are_batched(node, n):
            return type(node)(node[i] for i in kept.tolist())
        parts = (_select(v, kept, n, f"{path}[{i}]", option) for i, v in enumerate(node))
        return type(node)(parts)
    shape = tuple(node.shape) if isinstance(node, (Tensor, np.ndarray)) else ()
    if not shape:
        return node
    if shape[0] != n:
        raise ValueError(
            f"{option}: {path} has shape {shape} in a mini-batch of {n} sentences, so that its "
            f"rows cannot be matched to sentences; {_REMEDY[option]}"
        )
    if isinstance(node, np.ndarray):
        return node[kept.cpu().numpy()]
    return node.index_select(0, kept.to(node.device))


def _are_batched(nodes: Sequence[Any], n: int) -> bool:
    """Whether each node has one row a sentence; their count then equals n by chance."""
    return all(
        isinstance(node, (Tensor, np.ndarray)) and node.ndim > 0 and len(node) == n
        for node in nodes
    )


def _map(node: Any, change: Callable[[Path, Tensor], Tensor], path: Path = ()) -> Any:
    """Rebuild the nest with ``change(path, tensor)`` in place of every tensor."""
    if isinstance(node, dict):
        return {k: _map(v, change, (*path, str(k))) for k, v in node.items()}
    if isinstance(node, (list, tuple)):
        return type(node)(_map(v, change, (*path, str(i))) for i, v in enumerate(node))
    return change(path, node) if torch.is_tensor(node) else node


def _aligned(sample: Dict[str, Any], n: int) -> List[Dict[Path, Tensor]]:
    """Group the tensors that have a column a token: one group for every tensor of tokens.

    A target belongs to prev_output_tokens, or else to src_tokens. If a tensor could belong to two
    tensors of tokens, drop both groups.
    """
    found: Dict[Path, Tensor] = {}

    def note(path: Path, tensor: Tensor) -> Tensor:
        if tensor.dim() > 1 and len(tensor) == n:
            found[path] = tensor
        return tensor

    _map(sample, note)
    groups = {path: {path: tensor} for path, tensor in found.items() if path[-1] in _TOKENS}
    ambiguous: Set[Path] = set()
    for path, tensor in found.items():
        tokens = [
            root
            for root in groups
            if found[root].size(1) == tensor.size(1) and path[:-1] in (root[:-1], ())
        ]
        if path in groups:
            continue
        if path[-1] == "target" and any(root[-1] == _TOKENS[1] for root in tokens):
            tokens = [root for root in tokens if root[-1] == _TOKENS[1]]
        if len(tokens) == 1:
            groups[tokens[0]][path] = tensor
        else:
            ambiguous.update(tokens)
    return [group for root, group in groups.items() if root not in ambiguous]


def _are_tokens(tensor: Tensor) -> bool:
    return tensor.dim() == 2 and tensor.dtype in (torch.int64, torch.int32)


def _without_padding(part: Dict[str, Any], n: int, padding: int, multiple: int) -> Dict[str, Any]:
    """Cut columns at the ends that are padding in all tensors of a group.

    Keep enough of them to make the length a multiple of ``multiple``, if there are enough.
    """
    spans: Dict[Path, slice] = {}
    for group in _aligned(part, n):
        if all(map(_are_tokens, group.values())):
            filled = torch.stack([tensor.ne(padding).any(dim=0) for tensor in group.values()])
            columns = filled.any(dim=0).nonzero().flatten().tolist()
            if columns:
                first, end, width = columns[0], columns[-1] + 1, len(filled[0])
                wanted = min(-(-(end - first) // multiple) * multiple, width)
                first = min(first, width - wanted)
                spans.update(dict.fromkeys(group, slice(first, first + wanted)))
    return _map(part, lambda path, t: t[:, spans[path]].contiguous() if path in spans else t)


def _count_tokens(sample: Dict[str, Any], part: Dict[str, Any], n: int, padding: int) -> Any:
    """Return ntokens of ``part``: the tokens that are not padding.

    Count them in the tensor whose count in ``sample`` is ntokens; without one, scale ``sample``'s
    ntokens by the share of sentences.
    """
    kept = number_of_sentences(part)

    def counts(some: Dict[str, Any], size: int) -> Dict[Path, int]:
        groups = [group.items() for group in _aligned(some, size)]
        tokens = [(path, t) for group in groups for path, t in group if _are_tokens(t)]
        tokens.sort(key=lambda item: item[0] != ("target",))
        return {path: int(tensor.ne(padding).sum()) for path, tensor in tokens}

    own = counts(part, kept)
    for path, count in counts(sample, n).items():
        if count == int(sample["ntokens"]) and path in own:
            return own[path]
    return round(int(sample["ntokens"]) * kept / n)
