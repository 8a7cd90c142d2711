"""Which device the work runs on."""

from __future__ import annotations

import torch

from basiscli.errors import ResourceError


def choose_device(wish: str) -> torch.device:
    """Return the device for 'auto' or a device's name.

    Raises:
        ResourceError: if there is no such device.
    """
    if wish == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wish)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ResourceError(f"no device '{wish}': {str(error).splitlines()[0]}", remedy="--device cpu") from error
    return device
