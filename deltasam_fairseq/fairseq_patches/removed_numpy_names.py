"""Names of numpy that fairseq uses and newer versions of numpy do not have.

As fairseq is: --sample-break-mode eos is an AttributeError (np.compat.long, numpy 2), and so is
--num-batch-buckets, after a TypeError (np.percentile(interpolation=), numpy 2.4).
"""

import types
from typing import Any

import numpy as np
from fairseq.data import data_utils, language_pair_dataset, token_block_dataset


def _percentile(*args: Any, interpolation: str = "linear", **kwargs: Any) -> Any:
    return np.percentile(*args, **{"method": interpolation, **kwargs})


class _NumpyWithRemovedNames(types.ModuleType):
    """Stands for numpy in a module of fairseq."""

    compat = types.SimpleNamespace(long=int)
    int = int
    percentile = staticmethod(_percentile)

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


def install() -> None:
    """Let three modules of fairseq see numpy with these names; numpy itself stays as it is."""
    if np.lib.NumpyVersion(np.__version__) >= "1.24.0":  # np.int went with it; method= is older
        for module in (data_utils, language_pair_dataset, token_block_dataset):
            setattr(module, "np", _NumpyWithRemovedNames("numpy"))  # noqa: B010  mypy knows np
