"""The unpickler for torch < 2.6, by itself."""

import argparse
import collections
import io
import pickle

import pytest
import torch

from deltasam_fairseq import checkpoints


def test_restricted_unpickler_alone():
    """As torch < 2.6 uses it: passed as pickle_module to torch.load."""
    tensors = {
        "w": torch.arange(6.0).view(2, 3),
        "h": torch.ones(2, dtype=torch.bfloat16),
        "n": collections.OrderedDict(a=1),
    }
    for zipped in (True, False):
        data = io.BytesIO()
        torch.save(
            {**tensors, "p": torch.nn.Parameter(torch.ones(1))},
            data,
            _use_new_zipfile_serialization=zipped,
        )
        data.seek(0)
        loaded = torch.load(data, pickle_module=checkpoints.restricted_pickle, weights_only=False)
        torch.testing.assert_close(loaded["w"], tensors["w"])
        assert loaded["h"].dtype == torch.bfloat16 and isinstance(loaded["p"], torch.nn.Parameter)
    with pytest.raises(pickle.UnpicklingError, match=r"builtins\.eval"):
        checkpoints.restricted_pickle.loads(b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.")
    value = argparse.Namespace(a=[1, {"b": (2.0, None)}])
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        data = pickle.dumps(value, protocol)
        if protocol < 2:  # needs copyreg._reconstructor, which creates any class
            with pytest.raises(pickle.UnpicklingError):
                checkpoints.restricted_pickle.loads(data)
        else:
            assert checkpoints.restricted_pickle.loads(data) == value
