"""The same dropout masks in several forwards."""

import torch


class SameMasks:
    """Puts torch's random generators back to where they are now.

    Calling the object before each of several forwards gives them the same dropout masks.

    Args:
        device: of the model.
        wanted: False makes the object do nothing: every forward draws masks of its own.
    """

    def __init__(self, device: torch.device, wanted: bool = True) -> None:
        self._device = device
        self._wanted = wanted
        if wanted:
            self._host = torch.get_rng_state()
            if device.type == "cuda":
                self._cuda = torch.cuda.get_rng_state(device)

    def __call__(self) -> None:
        if self._wanted:
            torch.set_rng_state(self._host)
            if self._device.type == "cuda":
                torch.cuda.set_rng_state(self._cuda, self._device)
