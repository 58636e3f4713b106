"""Views of a visible image for multi-spectral test features (MSER).

Spec: mcja 3.5 (test spectra), 3.6. Golden: mcja/augment (sel).
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from fastreid_vi import _checks

Spectrum = Literal["original", "r", "g", "b"]
SPECTRA: tuple[Spectrum, ...] = get_args(Spectrum)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, of values from 0 to 1


def spectral_view(images: Tensor, spectrum: Spectrum) -> Tensor:
    """One view of normalised images.

    A channel is taken back to its values, put in place of all three, and normalised anew.

    Args:
        images: [B, 3, H, W], floating, normalised with ImageNet's mean and deviation.
        spectrum: "original" gives the images themselves.
    Returns:
        [B, 3, H, W].
    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or value.
    """
    _checks.choice("spectrum", spectrum, Spectrum)
    _checks.feature_map("images", images)
    if images.shape[1] != 3:
        raise ValueError(f"images: expected [B, 3, H, W], got {list(images.shape)}")
    if spectrum == "original":
        return images
    channel = "rgb".index(spectrum)
    values = images[:, channel, None] * STD[channel] + MEAN[channel]  # [B, 1, H, W]
    mean, std = (images.new_tensor(numbers)[:, None, None] for numbers in (MEAN, STD))
    return (values - mean) / std
