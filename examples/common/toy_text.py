"""Collect English sentences from what every Python installation carries.

The text is the language reference behind ``help()`` (``pydoc_data.topics``) and the docstrings
of the standard library and of the packages that PyTorch and fairseq bring along.  It is stripped
of code, tables and reST markup, split into sentences, freed of duplicates and shuffled.  Nothing
is downloaded and nothing is imported: docstrings are read from the source files.

    python -m examples.common.toy_text --out text.txt
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import multiprocessing
import random
import re
import sysconfig
from pathlib import Path
from typing import Dict, Iterable, Iterator, List

# Folders that hold tests or other people's packages.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
# Installed packages whose docstrings are read as well; one that is missing is passed over.
PACKAGES = ("matplotlib", "networkx", "numpy", "scipy", "sklearn", "sympy", "torch")

MARKUP = [  # (pattern, replacement), applied in this order
    (re.compile(r":[\w:]+:`~?([^`<]+)(?:<[^`]*>)?`"), r"\1"),  # :role:`text`
    (re.compile(r"``?([^`]+)``?_?"), r"\1"),  # ``code``, `name`_
    (re.compile(r"\*\*?([^*\s][^*]*)\*\*?"), r"\1"),  # *emphasis*, **strong**
    (re.compile(r"\[\d+\]_?|\|\w+\|"), ""),  # footnotes, substitutions
    (re.compile(r"[\u2018\u2019]"), "'"),
    (re.compile(r"[\u201c\u201d]"), '"'),
    (re.compile(r"\s+"), " "),
]
# A line like these is code, a table, a list of options or a heading: its paragraph is dropped.
NOT_PROSE = re.compile(
    r"^\s*(>>>|\.\.\.|\.\. |\||\+[-=]|[-=~*^#]{3,}|:\w+|@\w)"
    r"|^\s*(def|class|import|from|return)\b.*[:\w]$|::=|  +\S+  +\S"
)
SENTENCE_END = re.compile(r"(?<=[.!?])[\"')]*\s+(?=[A-Z\"'(])")
ABBREVIATION = re.compile(r"\b(e\.g|i\.e|etc|cf|vs|Mr|Dr|St|[A-Z])\.$")
WORD = re.compile(r"[A-Za-z]+(?:[-'][A-Za-z]+)*")
CODE_LIKE = re.compile(r"[<>{}\[\]=_\\|@#^~/%$&+*`]|\w\(|\w\.\w|--|[a-z][A-Z]")


def source_files() -> Iterator[Path]:
    """Yield the Python files of the standard library and of ``PACKAGES``, in a fixed order."""
    folders = [Path(sysconfig.get_paths()["stdlib"])]
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)  # finds the package, does not import it
        folders += map(Path, spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            if not SKIPPED_FOLDERS.intersection(path.relative_to(folder).parts):
                yield path


def docstrings(path: Path) -> List[str]:
    """Return the docstrings of one file; none where it is not valid Python."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]


def paragraphs(text: str) -> Iterator[str]:
    """Yield the paragraphs of prose in ``text``, one line each, without markup."""
    for block in re.split(r"\n\s*\n", text):
        if any(NOT_PROSE.search(line) for line in block.splitlines()):
            continue
        block = re.sub(r"^\s*([*-]|\d+[.)]|\(?[a-z]\))\s+", "", block)  # the mark of a list item
        for pattern, replacement in MARKUP:
            block = pattern.sub(replacement, block)
        yield block.strip()


def sentences(paragraph: str) -> Iterator[str]:
    """Split ``paragraph`` into sentences; an abbreviation does not end one."""
    start = ""
    for piece in SENTENCE_END.split(paragraph):
        start = (start + " " + piece).strip()
        if not ABBREVIATION.search(start):
            yield start
            start = ""
    if start:
        yield start


def is_english(sentence: str, min_words: int = 6, max_words: int = 12) -> bool:
    """Tell whether ``sentence`` is a short whole sentence of plain words."""
    words = sentence.split()
    plain = sum(1 for word in words if WORD.fullmatch(word.strip(".,;:!?()\"'")))
    return (
        min_words <= len(words) <= max_words
        and sentence[0].isupper()
        and sentence[-1] in ".!?"
        and sentence.isascii()
        and not CODE_LIKE.search(sentence)
        and plain >= 0.9 * len(words)
    )


def english(texts: Iterable[str]) -> List[str]:
    """Return the English sentences of ``texts``."""
    return [
        sentence
        for text in texts
        for paragraph in paragraphs(text)
        for sentence in sentences(paragraph)
        if is_english(sentence)
    ]


def english_docstrings(path: Path) -> List[str]:
    """Return the English sentences of the docstrings of one file."""
    return english(docstrings(path))


def collect(workers: int) -> List[str]:
    """Return all distinct sentences in the order in which they are found."""
    from pydoc_data.topics import topics

    found = english(topics[name] for name in sorted(topics))
    with multiprocessing.Pool(workers) as pool:
        for lines in pool.imap(english_docstrings, source_files(), chunksize=64):
            found += lines
    distinct: Dict[str, str] = {}
    for line in found:
        distinct.setdefault(line.lower(), line)
    return list(distinct.values())


def main() -> None:
    """Write one sentence a line, shuffled by ``--seed``."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.common.toy_text", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="text file to write")
    parser.add_argument("--seed", type=int, default=1, help="seed of the shuffle")
    parser.add_argument("--workers", type=int, default=2, help="processes that read the files")
    args = parser.parse_args()
    lines = collect(args.workers)
    random.Random(args.seed).shuffle(lines)
    args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} sentences, {sum(len(line.split()) for line in lines)} words -> {args.out}")


if __name__ == "__main__":
    main()
