"""Write lines of tokens as a fairseq dataset; shared by the scripts that prepare data."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Iterable

from fairseq.data import Dictionary, encoders, indexed_dataset
from omegaconf import OmegaConf


def bpe_encoder(name: str, **options: Any) -> Callable[[str], str]:
    """Return the ``encode`` of one of fairseq's BPEs: a sentence in, tokens joined by spaces out.

    Args:
        name: as fairseq registers it: ``sentencepiece``, ``gpt2``, ``bytes``, ...
        options: the options of that BPE, such as ``sentencepiece_model``.
    """
    return encoders.build_bpe(OmegaConf.create({"_name": name, **options})).encode


def write_dataset(
    lines: Iterable[str], dictionary: Dictionary, prefix: Path, append_eos: bool = True
) -> None:
    """Write ``prefix.bin`` and ``prefix.idx``, one item a line; tokens not known become <unk>."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    binary = indexed_dataset.data_file_path(str(prefix))
    builder = indexed_dataset.make_builder(binary, impl="mmap", vocab_size=len(dictionary))
    for line in lines:
        tokens = dictionary.encode_line(line, add_if_not_exist=False, append_eos=append_eos)
        builder.add_item(tokens)
    builder.finalize(indexed_dataset.index_file_path(str(prefix)))


__all__ = ["Dictionary", "bpe_encoder", "write_dataset"]
