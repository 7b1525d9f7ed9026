"""Numbers of numpy in a checkpoint (best scores), without numpy's own unpickling.

That is C code that trusts its input; a number needs little of it.
"""

import pickle
import re
from typing import Any, Tuple

import numpy as np


class ScalarType:
    """Stands for ``numpy.dtype`` while a file is read: plain numbers only.

    ``numpy.dtype.__setstate__`` takes field offsets and object flags on trust, and
    with them ``scalar`` reads bytes as pointers. This takes a code such as "f8".
    """

    def __init__(self, code: str, align: bool = False, copy: bool = True) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[biufc](1|2|4|8|16|32)", code):
            raise pickle.UnpicklingError(
                f"only plain numpy numbers can be loaded, not dtype {code!r}"
            )
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Tuple[Any, ...]) -> None:
        order, subtype, names, fields = state[1:5]
        if order not in ("<", ">", "=", "|") or (subtype, names, fields) != (None, None, None):
            raise pickle.UnpicklingError(
                "only plain numpy numbers can be loaded, not structured ones"
            )
        self.dtype = self.dtype.newbyteorder(order)


def scalar(kind: Any, data: bytes) -> Any:
    """One numpy number from its bytes, instead of ``numpy.core.multiarray.scalar``."""
    dtype = kind.dtype if isinstance(kind, ScalarType) else kind
    if not isinstance(dtype, np.dtype) or dtype.kind not in "biufc" or len(data) != dtype.itemsize:
        raise pickle.UnpicklingError("only plain numpy numbers can be loaded")
    return np.frombuffer(data, dtype=dtype)[0]
