"""Files that are given as a path or as a URL; a URL is fetched once and checked on every use."""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import tempfile
import urllib.request
from pathlib import Path

from deltasam_fairseq.glue.tasks import GlueError

PIN = "#sha256="  # what a URL may end in, as pip's do


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


def local_file(where: str, option: str, remedy: str = "") -> Path:
    """Return the absolute path of a file; one that is given as a URL is fetched first, once.

    The checksum that a URL ends in (``https://...#sha256=HEX``), else the one that was seen at the
    first fetch (kept beside the file, for ``sha256sum -c``), is checked every time.

    Args:
        where: path or URL.
        option: of the command line, for the errors.
        remedy: options that do without the network, for the errors; default: that option.

    Raises:
        GlueError: no such file, or it cannot be fetched, or has another checksum.
    """
    if "://" not in where:
        path = Path(where).expanduser().absolute()
        if not path.is_file():
            raise GlueError(f"{option} {where}: no such file")
        return path
    url, _, expected = where.partition(PIN)
    name = hashlib.sha256(url.encode()).hexdigest()[:12] + "-" + url.rsplit("/", 1)[-1]
    path = cache_folder() / name
    record = path.with_name(name + ".sha256")
    if not expected and record.is_file():
        expected = record.read_text(encoding="utf-8").split()[0]
    if not (path.is_file() and sha256(path) == expected):
        fetch(url, path, expected, option, remedy or f"{option} FILE")
    return path


def fetch(url: str, path: Path, expected: str, option: str, remedy: str) -> None:
    """Write ``path``, in one step at the end, and its ``.sha256``; ``expected`` may be empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=str(path.parent), suffix=".partial")
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            try:
                with urllib.request.urlopen(url, timeout=60) as response:
                    shutil.copyfileobj(response, file)
            except (OSError, http.client.HTTPException) as error:
                raise GlueError(
                    f"{option}: {url} cannot be fetched ({error}); without it, give {remedy}"
                ) from error
        found = sha256(partial)
        if found != expected and expected:
            raise GlueError(
                f"{option}: {url} has the checksum {found}, expected {expected}; it was cut short "
                f"or changed: run this again, or give a file that you trust with {remedy}"
            )
        path.with_name(path.name + ".sha256").write_text(f"{found}  {path.name}\n", "utf-8")
        os.replace(partial, path)
    finally:
        if partial.exists():
            partial.unlink()
