"""Files of the data programs: cached downloads, checksums, atomic writes; their one error."""

from __future__ import annotations

import hashlib
import http.client
import os
from pathlib import Path
from typing import Union

import torch

NOT_DATA = {
    rb'\s*(<\?xml|<!doctype|<html|\{\s*"error")': "an error page, not data: download it again",
    rb"PK\x03\x04|\x1f\x8b": "a packed archive: unpack it",
    rb"version https://git-lfs": "a Git LFS pointer: run git lfs pull",
}
PIN = "#sha256="  # what a URL may end in, as pip's do


class DataError(ValueError):
    """Something is wrong with the data or the options; the message says what and what to do."""


def atomic_write(path: Path, content: Union[str, bytes]) -> None:
    """Write a file in one step: it is there as a whole, or as it was before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(partial, path)


def sha256(path: Path) -> str:
    """Return the checksum of a file's content, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def cache_folder() -> Path:
    """Return where fetched files are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "deltasam_fairseq"


def cached_path(where: str, option: str, remedy: str = "") -> Path:
    """Return the absolute path of a file; one that is given as a URL is fetched first, once.

    The SHA-256 that a URL ends in (``https://...#sha256=HEX``), else the one that was seen at the
    first fetch (kept beside the file, for ``sha256sum -c``), is checked every time.

    Args:
        where: path or URL.
        option: of the command line, for the errors.
        remedy: options that do without the network, for the errors; default: that option.

    Raises:
        DataError: no such file, or it cannot be fetched, or has another checksum.
    """
    if "://" not in where:
        path = Path(where).expanduser().absolute()
        if not path.is_file():
            raise DataError(f"{option} {where}: no such file")
        return path
    url, _, expected = where.partition(PIN)
    name = hashlib.sha256(url.encode()).hexdigest()[:12] + "-" + url.rsplit("/", 1)[-1]
    path = cache_folder() / name
    record = path.with_name(name + ".sha256")
    if not expected and record.is_file():
        expected = record.read_text(encoding="utf-8").split()[0]
    if path.is_file() and sha256(path) == expected:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    remedy = remedy or f"{option} FILE"
    try:  # writes a temporary file first
        torch.hub.download_url_to_file(url, str(path), hash_prefix=expected or None, progress=False)
    except RuntimeError as error:
        raise DataError(
            f"{option}: {url}: {error}; it was cut short or changed: run this again, or give a "
            f"file that you trust with {remedy}"
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise DataError(
            f"{option}: {url} cannot be fetched ({error}); without it, give {remedy}"
        ) from error
    atomic_write(record, f"{sha256(path)}  {name}\n")
    return path
