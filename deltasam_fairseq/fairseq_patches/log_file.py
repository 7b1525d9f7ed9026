"""Write a line to ``--log-file`` once: fairseq opens the file again for every epoch's progress bar.

In epoch n every line would be there n times, and n files open.
"""

import logging
import os
from typing import Any, Callable

from fairseq.logging import progress_bar

from deltasam_fairseq.fairseq_patches.patching import patch


def _open_once(bar: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    path = kwargs.get("log_file")
    if path is not None:
        handlers = progress_bar.logger.handlers
        files = {h.baseFilename for h in handlers if isinstance(h, logging.FileHandler)}
        kwargs["log_file"] = None if os.path.abspath(path) in files else path
    return bar(*args, **kwargs)


def install() -> None:
    """Let progress bars share the file; again, it changes nothing."""
    patch(progress_bar, "progress_bar", _open_once)
