"""A mini-batch with fewer of its sentences, for an ascent that is made from a fraction of them.

Bahri et al. 2021 ("Sharpness-Aware Minimization Improves Language Model Generalization") climb
along the gradient of a quarter of the batch, drawn at random. delta-SAM knows better ones: the
sentences that it weighs most.
"""

import math
from typing import Any, Callable, Dict, List, Tuple

import numpy as np
import torch
from torch import Tensor

# Tensors of tokens with padding, beside which others of their shape may stand.
_TOKENS = ("src_tokens", "prev_output_tokens")


def kept_count(n: int, fraction: float) -> int:
    """``ceil(fraction n)``: how many of n sentences the ascent is made from, 1 to n."""
    return max(1, math.ceil(fraction * n - 1e-9))  # 0.1 * 30 is 3.0000000000000004


def draw_sentences(n: int, fraction: float, generator: torch.Generator) -> Tensor:
    """Numbers of `kept_count` of n sentences, any subset as likely; ascending, shape (kept,)."""
    shuffled = torch.randperm(n, generator=generator)
    return shuffled[: kept_count(n, fraction)].sort().values


def most_unguarded(weights: Tensor, fraction: float) -> Tensor:
    """Numbers of the sentences with the largest ``|a_j|``.

    Args:
        weights: ``g'_j``, shape (B,). They rise with ``|a_j|`` (Eq. 4 to 6, ``r >= 0``); where
            they are uniform, the first sentences are taken.
        fraction: above 0, at most 1.

    Returns:
        ascending, shape (kept,).
    """
    order = torch.sort(weights, descending=True, stable=True).indices
    return order[: kept_count(len(weights), fraction)].sort().values


def number_of_sentences(sample: Dict[str, Any]) -> int:
    """B of a mini-batch of fairseq's.

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
        "--sam-ascent-fraction: the mini-batches of this task do not say how many sentences they "
        "have (no nsentences, target or src_tokens); use --sam-ascent-fraction 1"
    )


def take_sentences(sample: Dict[str, Any], kept: Tensor, padding: int) -> Dict[str, Any]:
    """The mini-batch of some sentences of ``sample``, which is not changed.

    Columns at either end that are padding for all of them go, as if they had been put together
    alone; ntokens is counted again.

    Args:
        sample: fairseq's mini-batch: nested dictionaries and lists of tensors, with the sentences
            in their first dimension.
        kept: numbers of the sentences, shape (kept,).
        padding: what stands for padding in tokens.

    Raises:
        ValueError: for a tensor in which the sentences cannot be told apart.
    """
    n = number_of_sentences(sample)
    part = _select(sample, kept, n, "sample")
    part = _without_padding(part, len(kept), padding)
    if "nsentences" in sample:
        part["nsentences"] = len(kept)
    if "ntokens" in sample:
        part["ntokens"] = _count_tokens(sample, part, n, padding)
    return part


def _select(node: Any, kept: Tensor, n: int, path: str) -> Any:
    if isinstance(node, dict):
        return {k: _select(v, kept, n, f"{path}.{k}") for k, v in node.items()}
    if isinstance(node, (list, tuple)):
        if len(node) == n:
            return type(node)(node[i] for i in kept.tolist())
        return type(node)(_select(v, kept, n, f"{path}[{i}]") for i, v in enumerate(node))
    shape = tuple(node.shape) if isinstance(node, (Tensor, np.ndarray)) else ()
    if not shape:
        return node
    if shape[0] != n:
        raise ValueError(
            f"--sam-ascent-fraction: {path} has shape {shape} in a mini-batch of {n} sentences, "
            "and which rows belong to which sentence is not known; use --sam-ascent-fraction 1"
        )
    if isinstance(node, np.ndarray):
        return node[kept.cpu().numpy()]
    return node.index_select(0, kept.to(node.device))


def _map(node: Any, change: Callable[[str, Tensor], Tensor], key: str = "") -> Any:
    """The same nest with every tensor changed; ``change`` gets its key and itself."""
    if isinstance(node, dict):
        return {k: _map(v, change, k) for k, v in node.items()}
    if isinstance(node, (list, tuple)):
        return type(node)(_map(v, change, key) for v in node)
    return change(key, node) if torch.is_tensor(node) else node


def _by_width(sample: Dict[str, Any], n: int) -> Dict[int, List[Tuple[str, Tensor]]]:
    """Tensors of n rows, by their number of columns, where tokens are among them."""
    found: Dict[int, List[Tuple[str, Tensor]]] = {}

    def note(key: str, tensor: Tensor) -> Tensor:
        if tensor.dim() > 1 and len(tensor) == n:
            found.setdefault(tensor.size(1), []).append((key, tensor))
        return tensor

    _map(sample, note)
    return {w: some for w, some in found.items() if any(key in _TOKENS for key, _ in some)}


def _are_tokens(tensor: Tensor) -> bool:
    return tensor.dim() == 2 and tensor.dtype in (torch.int64, torch.int32)


def _without_padding(part: Dict[str, Any], n: int, padding: int) -> Dict[str, Any]:
    """Cut off columns at the ends that are padding in all tensors of that many columns."""
    spans: Dict[int, slice] = {}
    for width, tensors in _by_width(part, n).items():
        if all(_are_tokens(tensor) for _, tensor in tensors):
            filled = torch.stack([tensor.ne(padding).any(dim=0) for _, tensor in tensors])
            columns = filled.any(dim=0).nonzero().flatten().tolist()
            if columns:
                spans[width] = slice(columns[0], columns[-1] + 1)

    def cut(_: str, tensor: Tensor) -> Tensor:
        if tensor.dim() == 2 and len(tensor) == n and tensor.size(1) in spans:
            return tensor[:, spans[tensor.size(1)]].contiguous()
        return tensor

    return _map(part, cut) if spans else part


def _count_tokens(sample: Dict[str, Any], part: Dict[str, Any], n: int, padding: int) -> Any:
    """ntokens of ``part``: what is not padding, in the tensor whose count is the sample's ntokens.

    Where there is none, the share of ``sample``'s that is the sentences'.
    """
    counted: Dict[str, List[int]] = {}
    for some, size in ((sample, n), (part, number_of_sentences(part))):
        for tensors in _by_width(some, size).values():
            for key, tensor in filter(lambda item: _are_tokens(item[1]), tensors):
                counted.setdefault(key, []).append(int(tensor.ne(padding).sum()))
    for key in sorted(counted, key=lambda k: k != "target"):
        if len(counted[key]) == 2 and counted[key][0] == int(sample["ntokens"]):
            return counted[key][1]
    return round(int(sample["ntokens"]) * number_of_sentences(part) / n)
