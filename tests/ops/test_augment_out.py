"""`augment(out=...)`: the same bits, in memory that is given."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastreid_vi
from fastreid_vi.augment import augment
from fastreid_vi.augment.sampling import batch_plan
from fastreid_vi.config import DataConfig

CONFIG = DataConfig(
    height=21, width=13, identities=2, images=4, sampler="norm_triplet", erase=0.5,
    channel_mix=0.3, visible_spectra=("hue", "gray", "cutmix", "jitter"), spectrum_probability=0.9,
)  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.uint8]
LAYOUTS = [torch.channels_last, torch.contiguous_format]


@pytest.fixture
def work():
    images = torch.randint(0, 256, (9, 21, 13, 3), dtype=torch.uint8)
    rows = np.arange(8)
    modality = np.tile([0, 1], 4)
    return images, batch_plan(rows, modality, CONFIG, rows=8, seed=1, epoch=1, batch=0)


@pytest.mark.parametrize("room", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_same_bits(work, room, dtype, layout):
    options = {"dtype": dtype, "memory_format": layout}
    expected = augment(*work, **options)
    out = torch.ones(8, 3, 21, 13).to(dtype).contiguous(memory_format=layout)
    with fastreid_vi.backend(room):
        found = augment(*work, **options, out=out)
    assert found is out
    assert torch.equal(out, expected)
    assert out.stride() == expected.stride()


@pytest.mark.parametrize(
    ("out", "error", "needle"),
    [
        (torch.ones(8, 3, 21, 13, dtype=torch.bfloat16), TypeError, "out: expected torch.float32"),
        (torch.ones(7, 3, 21, 13), ValueError, r"out: expected \[8, 3, 21, 13\] on cpu"),
        (torch.ones(8, 3, 21, 13, device="meta"), ValueError, "on cpu, got .* on meta"),
        (torch.ones(8, 3, 21, 13), ValueError, "out: expected torch.channels_last, got strides"),
        (torch.ones(8, 3, 21, 26)[..., ::2], ValueError, "got strides"),
    ],
)
def test_memory_that_does_not_fit(work, out, error, needle):
    with pytest.raises(error, match=needle):
        augment(*work, out=out)


def test_a_plan_that_reads_outside_is_still_refused(work):
    images, plan = work
    out = torch.ones(8, 3, 21, 13).contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=r"plan\.source: expected 0 to 8"):
        augment(images, plan._replace(source=plan.source + 5), out=out)
