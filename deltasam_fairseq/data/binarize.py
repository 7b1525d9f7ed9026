"""Write lines of tokens as a fairseq dataset; shared by the programs that prepare data."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import itertools
import multiprocessing
import os
import threading
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, List, NamedTuple, Sequence, Tuple

import numpy as np
import torch
from fairseq.data import Dictionary, encoders, indexed_dataset
from omegaconf import OmegaConf

from deltasam_fairseq.data.files import DataError

CHUNK = 1000  # lines that go to a process at a time


def build_bpe(name: str, **options: Any) -> Any:
    """Return one of fairseq's BPEs.

    Args:
        name: as fairseq registers it: ``sentencepiece``, ``gpt2``, ``bytes``, ...; ``wordpiece``
            is the plugin's.
        options: the options of that BPE, such as ``sentencepiece_model``.
    """
    return encoders.build_bpe(OmegaConf.create({"_name": name, **options}))


def bpe_encoder(name: str, **options: Any) -> Callable[[str], str]:
    """Return the ``encode`` of `build_bpe`: a sentence in, tokens joined by spaces out."""
    return build_bpe(name, **options).encode


class Encoding(NamedTuple):
    """What makes numbers of sentences; small, so that it can be sent to a process."""

    bpe: str
    options: Tuple[Tuple[str, Any], ...]  # names and values, as for bpe_encoder
    dictionary: str  # path of the dict.txt


@functools.lru_cache(maxsize=1)
def tools(encoding: Encoding) -> Tuple[Callable[[str], str], Dictionary]:
    """Return the BPE's ``encode`` and the dictionary; made once in a process."""
    encode = bpe_encoder(encoding.bpe, **dict(encoding.options))
    return encode, Dictionary.load(encoding.dictionary)


def numbers(encoding: Encoding, lines: Sequence[str]) -> List[np.ndarray]:
    """Return each line's token numbers, with the end mark; tokens not known become <unk>."""
    encode, dictionary = tools(encoding)
    return [dictionary.encode_line(encode(line), add_if_not_exist=False).numpy() for line in lines]


Map = Callable[..., Iterator[Any]]  # as the built-in map


@contextlib.contextmanager
def processes(count: int) -> Iterator[Map]:
    """Give a ``map`` that works in ``count`` processes, in order; 1 is this process."""
    if count == 1:
        yield map
        return
    with concurrent.futures.ProcessPoolExecutor(
        count, multiprocessing.get_context("spawn"), _end_with_parent
    ) as pool:
        yield pool.map


def _end_with_parent() -> None:
    """End this process when the one that started it is gone, killed for example."""

    def wait() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def in_chunks(work: Callable[[Sequence[str]], List[Any]], lines: Sequence[str], run: Map) -> List:
    """Return what ``work`` makes of the lines, which ``run`` (from `processes`) shares out."""
    chunks = [lines[i : i + CHUNK] for i in range(0, len(lines), CHUNK)]
    return list(itertools.chain.from_iterable(run(work, chunks)))


def encode_lines(encoding: Encoding, lines: Sequence[str], run: Map) -> List[np.ndarray]:
    """Return each line's token numbers; ``run`` is from `processes`, any number gives the same."""
    return in_chunks(functools.partial(numbers, encoding), lines, run)


def unknown_share(source: object, encoding: Encoding, texts: Sequence[np.ndarray]) -> float:
    """Return the share of tokens that the dictionary lacks.

    Args:
        source: the file that they come from, for the error.
        texts: token numbers, without end marks.

    Raises:
        DataError: it is more than half: the dict.txt does not belong to the BPE.
    """
    unk = tools(encoding)[1].unk()
    total = sum(len(tokens) for tokens in texts)
    unknown = sum(int((tokens == unk).sum()) for tokens in texts)
    if 2 * unknown > total:
        raise DataError(
            f"{source}: {unknown} of {total} tokens are not in --dict {encoding.dictionary}; give "
            "the dict.txt that belongs to the BPE's files"
        )
    return unknown / max(total, 1)


def write_items(items: Iterable[np.ndarray], vocab_size: int, prefix: Path) -> None:
    """Write ``prefix.bin`` and ``prefix.idx`` from arrays of token numbers, each in one step."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    partial = f"{prefix}.partial"
    binary, index = indexed_dataset.data_file_path, indexed_dataset.index_file_path
    builder = indexed_dataset.make_builder(binary(partial), impl="mmap", vocab_size=vocab_size)
    for item in items:
        builder.add_item(torch.from_numpy(item))
    builder.finalize(index(partial))
    os.replace(binary(partial), binary(str(prefix)))
    os.replace(index(partial), index(str(prefix)))


def write_dataset(
    lines: Iterable[str], dictionary: Dictionary, prefix: Path, append_eos: bool = True
) -> None:
    """Write ``prefix.bin`` and ``prefix.idx``, one item a line; tokens not known become <unk>."""
    items = (
        dictionary.encode_line(line, add_if_not_exist=False, append_eos=append_eos).numpy()
        for line in lines
    )
    write_items(items, len(dictionary), prefix)
