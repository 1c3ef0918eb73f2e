"""Camera frames as numbers in [0, 1], whatever they came as."""

import torch
from torch import Tensor

from vla_dist.core.errors import DataError


def unit_pixels(images: Tensor, dtype: torch.dtype) -> Tensor:
    """(..., 3, H, W) uint8 or float in [0, 1], to the same shape in [0, 1].

    Raises:
        DataError: another type, or floats outside [0, 1]. The range is not checked on a GPU, where looking would wait
            for it.
    """
    if images.dtype == torch.uint8:
        return images.to(dtype) / 255.0
    if not images.is_floating_point():
        raise DataError(f"images are {images.dtype}; give uint8, or floats within [0, 1]")
    if images.device.type == "cpu" and images.numel() and not torch.compiler.is_compiling():
        low, high = (float(end) for end in images.detach().aminmax())
        if not (low >= 0.0 and high <= 1.0):
            raise DataError(f"images of floats lie within [{low:g}, {high:g}], expected [0, 1]; divide 0..255 by 255")
    return images.to(dtype)
