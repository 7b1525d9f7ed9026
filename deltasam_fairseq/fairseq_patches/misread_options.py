"""Options that fairseq misreads: --bf16 means a TPU to it, --mask-whole-words finds no BPE."""

import importlib.util
from typing import Any

from fairseq import options
from fairseq.tasks.masked_lm import MaskedLMTask

from deltasam_fairseq.fairseq_patches.patching import patch


def _no_tpu_without_xla(parse_args_and_arch: Any, *args: Any, **kwargs: Any) -> Any:
    parsed = parse_args_and_arch(*args, **kwargs)
    namespace = parsed[0] if isinstance(parsed, tuple) else parsed
    if getattr(namespace, "bf16", False) and importlib.util.find_spec("torch_xla") is None:
        namespace.tpu = False
    return parsed


def set_bpe_of_whole_words(add_defaults: Any, cfg: Any) -> None:
    """``add_defaults``, what fairseq's main calls first after importing a plugin."""
    add_defaults(cfg)
    MaskedLMTask.args = cfg.bpe  # read there, set nowhere


def install() -> None:
    """Patch the parser; ``add_defaults`` is looked up in the program that runs."""
    patch(options, "parse_args_and_arch", _no_tpu_without_xla)
