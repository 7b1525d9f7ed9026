"""Strings of a checkpoint's configuration, which fairseq evaluates."""

import ast
import builtins
from typing import Any

_ARITHMETIC = (
    *(ast.Expression, ast.Constant, ast.Tuple, ast.List, ast.Dict, ast.Set, ast.Load),
    *(ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.UnaryOp, ast.UAdd, ast.USub),
)


def literal_eval(source: str) -> Any:
    """``eval`` for options such as "(0.9, 0.98)" or "[(512, 3)] * 20": no names, no calls.

    fairseq passes strings of a checkpoint's configuration to ``eval`` when it builds the
    model (decoder_attention, encoder_layers, adaptive_softmax_cutoff, ...), so a file could
    run code from there, after a perfectly safe load.

    Args:
        source: an expression of literals, lists, tuples, dicts and + - * /.

    Returns:
        Its value.

    Raises:
        TypeError: not a string (fairseq relies on it).
        ValueError: the expression names, calls or indexes something.
    """
    if not isinstance(source, str):
        raise TypeError(f"eval() arg 1 must be a string, not {type(source).__name__}")
    tree = ast.parse(source.strip(), mode="eval")
    if not all(isinstance(node, _ARITHMETIC) for node in ast.walk(tree)):
        raise ValueError(
            f"refused to evaluate the option value {source!r}: only literals, lists, tuples, dicts "
            f"and + - * / are allowed. If it comes from a checkpoint, treat the file as hostile."
        )
    return builtins.eval(compile(tree, "<option>", "eval"), {"__builtins__": {}})
