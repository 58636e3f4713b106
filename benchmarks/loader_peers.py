"""Images a second without ours: a torch DataLoader with the transforms that everybody writes.

Pillow reads and resizes, torch flips, pads, crops, normalises and erases, image by image in worker
processes; written out, for torchvision is not a dependency.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastreid_vi.augment.draws import IMAGENET_MEAN, IMAGENET_STD
from fastreid_vi.config import DataConfig
from fastreid_vi.data import ImageList
from fastreid_vi.data.transform import RESIZE


class Usual(Dataset[tuple[Tensor, int]]):
    """One image at a time: the common transforms of the four methods, without MCJA's spectra."""

    def __init__(self, images: ImageList, config: DataConfig) -> None:
        self.images, self.config = images, config
        self.mean = torch.tensor(IMAGENET_MEAN)[:, None, None]
        self.std = torch.tensor(IMAGENET_STD)[:, None, None]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        config = self.config
        image = Image.open(self.images.file(index)).convert("RGB")
        image = image.resize((config.width, config.height), RESIZE[config.resize])
        content = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        pixels = content.view(config.height, config.width, 3).permute(2, 0, 1).contiguous()
        if torch.rand(()) < config.flip:
            pixels = pixels.flip(2)
        if config.pad:
            border = (config.pad,) * 4
            padded = torch.nn.functional.pad(pixels, border, value=config.pad_value)
            top, left = torch.randint(2 * config.pad + 1, (2,)).tolist()
            pixels = padded[:, top : top + config.height, left : left + config.width]
        out = (pixels.float() / 255 - self.mean) / self.std
        if torch.rand(()) < config.erase:
            self.erase(out)
        return out, int(self.images.labels[index])

    def erase(self, image: Tensor) -> None:
        config = self.config
        for _ in range(10):
            share = torch.empty(()).uniform_(*config.erase_area).item()
            area = config.height * config.width * share
            low, high = map(math.log, config.erase_aspect)
            aspect = math.exp(torch.empty(()).uniform_(low, high).item())
            tall, wide = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if tall < config.height and wide < config.width:
                top = int(torch.randint(config.height - tall + 1, ()))
                left = int(torch.randint(config.width - wide + 1, ()))
                image[:, top : top + tall, left : left + wide] = 0
                return


def usual_batches(
    images: ImageList, config: DataConfig, batches: list[list[int]], workers: int
) -> Iterator[Any]:
    """What the DataLoader gives for these positions."""
    loader: DataLoader[Any] = DataLoader(
        Usual(images, config), batch_sampler=batches, num_workers=workers
    )
    yield from loader
