"""Checkpoints that load on every torch, and that cannot run code.

fairseq reads checkpoints with a bare ``torch.load``. Up to torch 2.5 this runs
whatever the file asks for; from torch 2.6 it refuses fairseq's own files. Here
``torch.load`` is replaced, only while fairseq reads a checkpoint, by a reader with
``weights_only=True`` and a list of the classes that fairseq checkpoints really hold.

    import deltasam_fairseq.checkpoints as checkpoints
    checkpoints.install()                  # done by importing the plugin
    checkpoints.allow("my_task.MyState")   # a class of your own in extra_state

Nothing of fairseq is copied or changed on disk. docs/checkpoints.md says what was
measured, and why no class on the list is a way in.
"""

from deltasam_fairseq.checkpoints.allow_list import allow, allowed_globals
from deltasam_fairseq.checkpoints.data_record import DataRecord
from deltasam_fairseq.checkpoints.errors import CheckpointDamagedError, CheckpointRefusedError
from deltasam_fairseq.checkpoints.fit_to_data import (
    DataMismatchError,
    Loaded,
    fit_start,
    fit_to_data,
    load_on_data,
    require_same_tokens,
)
from deltasam_fairseq.checkpoints.install import install
from deltasam_fairseq.checkpoints.literal import literal_eval
from deltasam_fairseq.checkpoints.unpickler import RestrictedUnpickler, restricted_pickle

__all__ = [
    "CheckpointDamagedError",
    "CheckpointRefusedError",
    "DataMismatchError",
    "DataRecord",
    "Loaded",
    "RestrictedUnpickler",
    "allow",
    "allowed_globals",
    "fit_start",
    "fit_to_data",
    "install",
    "literal_eval",
    "load_on_data",
    "require_same_tokens",
    "restricted_pickle",
]
