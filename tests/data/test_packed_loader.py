"""A pack gives the batches that the files give, to the bit: every recipe, every way to read it."""

from __future__ import annotations

import dataclasses
import pickle
import shutil
import threading
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from fastreid_vi.config import DataConfig
from fastreid_vi.data import (
    DataError,
    ImageList,
    SysuMM01,
    eval_loader,
    make_sampler,
    train_loader,
    write_pack,
)
from fastreid_vi.data import packed as packed_module
from fastreid_vi.data.loader import TrainLoader
from fastreid_vi.data.pack import Pack
from fastreid_vi.data.packed import STRETCH, Resident, Streamed
from fastreid_vi.data.slabs import Slabs
from fastreid_vi.data.spectrum import VIEWS
from fastreid_vi.methods import recipe
from tests.data.test_loader import same

SMALL = {"height": 40, "width": 20, "identities": 2, "images": 4, "workers": 0}
# Everything that a recipe can ask for at once.
ALL = DataConfig(
    sampler="norm_triplet", erase=0.9, visible_spectra=("hue", "gray", "cutmix", "jitter", "none"),
    spectrum_probability=0.9, channel_mix=0.3, **SMALL,
)  # fmt: skip
METHODS = ("baseline", "lba", "mpanet", "mcja", "aligngan")


def of(name: str) -> DataConfig:
    if name == "all":
        return ALL
    data = recipe(name, "sysu").data
    return dataclasses.replace(data, pixel_identities=min(data.pixel_identities, 1), **SMALL)


def packed(root: Path, config: DataConfig, **options: int) -> DataConfig:
    """The configuration with a pack for it."""
    dataset = SysuMM01(root, splits=config.splits, label_order=config.label_order)
    out = root.parent / f"pack-{config.resize}-{config.label_order}"
    write_pack(dataset, config, out, workers=1, **{"shard_bytes": 40 * 20 * 3 * 17, **options})
    return dataclasses.replace(config, packed=str(out))


def loader(
    images: ImageList, config: DataConfig, *, seed=3, epoch=1, batches=4, state=None, share=(0, 1)
) -> TrainLoader:
    sampler = make_sampler(
        config.sampler, images.labels, images.modality, identities=config.identities,
        images=config.images, seed=seed, pids=images.pids, batches=batches,
        pixel_identities=config.pixel_identities,
    )  # fmt: skip
    sampler.shard(*share)
    if state is not None:
        sampler.load_state_dict(state)
    sampler.set_epoch(epoch)
    return train_loader(images, sampler, config, seed=seed)


@pytest.mark.parametrize("name", [*METHODS, "all"])
def test_the_batches_of_every_recipe(sysu, name):
    config = of(name)
    train = SysuMM01(sysu, label_order=config.label_order).train
    pack = packed(sysu, config)
    for epoch in (1, 2):
        expected = list(loader(train, config, epoch=epoch))
        for resident in ("never", "always"):
            for workers in (0, 1, 3):
                change = {"resident": resident, "workers": workers}
                found = loader(train, dataclasses.replace(pack, **change), epoch=epoch)
                assert isinstance(found._source, Resident if resident == "always" else Streamed)
                assert same(list(found), expected)
    assert not same(expected, list(loader(train, config, epoch=1)))


@pytest.mark.parametrize("resident", ["never", "always"])
@pytest.mark.parametrize("workers", [0, 2])
def test_resume_in_mid_epoch_with_the_other_source(sysu, workers, resident):
    train = SysuMM01(sysu).train
    pack = dataclasses.replace(packed(sysu, ALL), workers=workers, resident=resident)
    whole = list(loader(train, ALL, epoch=2))
    for first, second in ((ALL, pack), (pack, ALL), (pack, pack)):
        begun = loader(train, first, epoch=2)
        head = list(islice(begun, 3))
        state = begun.sampler.state_dict()
        assert (state["epoch"], state["batch"]) == (2, 3)
        tail = list(loader(train, second, epoch=2, state=state))
        assert same(head + tail, whole)


@pytest.mark.parametrize("resident", ["never", "always"])
def test_more_batches_than_a_stretch(sysu, resident):
    train = SysuMM01(sysu).train
    pack = dataclasses.replace(packed(sysu, ALL), workers=1, resident=resident)
    count = 2 * STRETCH + 3
    expected = list(loader(train, ALL, batches=count))
    assert len(expected) == count
    assert same(list(loader(train, pack, batches=count)), expected)


@pytest.mark.parametrize("resident", ["never", "always"])
def test_shares_and_batches_read_again(sysu, resident):
    train = SysuMM01(sysu).train
    pack = dataclasses.replace(packed(sysu, ALL), workers=1, resident=resident)
    for rank in (0, 1):
        expected = list(loader(train, ALL, share=(rank, 2)))
        found = loader(train, pack, share=(rank, 2))
        assert same(list(found), expected)
        cursor = found.sampler.cursor
        assert same([found.batch(1, number) for number in range(4)], expected)
        assert found.sampler.cursor == cursor


def test_batches_that_are_kept_stay_as_they_are(sysu):
    """Threads use their buffers again; a batch must not lie in one."""
    train = SysuMM01(sysu).train
    for resident in ("never", "always"):
        pack = dataclasses.replace(packed(sysu, ALL), workers=2, resident=resident)
        batches = iter(loader(train, pack, batches=20))
        first = next(batches)
        before = [column.clone() for column in first[:4]]
        list(batches)
        assert all(map(torch.equal, first[:4], before))


def test_held_out_identities_come_from_the_pack_too(sysu):
    train, validation = SysuMM01(sysu).hold_out(1, 5)
    pack = packed(sysu, ALL)
    assert same(list(loader(train, pack)), list(loader(train, ALL)))
    pair = [list(eval_loader(validation, config, batch_size=4)) for config in (pack, ALL)]
    assert same(*pair)


@pytest.mark.parametrize("spectrum", VIEWS)
@pytest.mark.parametrize("name", ["lba", "aligngan", "all"])
def test_evaluation(sysu, name, spectrum):
    config = of(name)
    dataset, pack = SysuMM01(sysu), packed(sysu, config)
    for images in (dataset.query, dataset.gallery, dataset.train.select([])):
        for size in (1, 7, 1000):
            options = {"batch_size": size, "spectrum": spectrum}
            expected = list(eval_loader(images, config, **options))
            for workers in (0, 2):
                change = dataclasses.replace(pack, workers=workers)
                assert same(list(eval_loader(images, change, **options)), expected)


def test_a_pack_deleted_while_it_is_read(sysu):
    train = SysuMM01(sysu).train
    pack = packed(sysu, ALL)
    expected = list(loader(train, ALL))
    batches = loader(train, dataclasses.replace(pack, workers=1))
    shutil.rmtree(pack.packed)
    assert same(list(batches), expected)
    with pytest.raises(DataError, match="no pack here"):
        loader(train, pack)


def test_files_are_not_read(sysu):
    train = SysuMM01(sysu).train
    pack = packed(sysu, ALL)
    expected = list(loader(train, ALL))
    for path in sysu.glob("cam*/*/*.jpg"):
        path.unlink()
    assert same(list(loader(train, pack)), expected)


def test_leaving_early_ends_the_threads(sysu):
    train = SysuMM01(sysu).train
    for resident in ("never", "always"):
        pack = dataclasses.replace(packed(sysu, ALL), workers=3, resident=resident)
        batches = iter(loader(train, pack, batches=100))
        next(batches)
        assert any("fastreid-vi-data" in thread.name for thread in threading.enumerate())
        batches.close()
        assert not any("fastreid-vi-data" in thread.name for thread in threading.enumerate())


def test_global_generators_are_left_alone(sysu):
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(loader(SysuMM01(sysu).train, dataclasses.replace(packed(sysu, ALL), workers=2)))
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])


def test_residence_is_chosen_by_what_the_device_can_spare(sysu):
    images = SysuMM01(sysu).train
    pack = packed(sysu, ALL)
    sampler = loader(images, ALL).sampler
    for resident, kind in (("auto", Streamed), ("never", Streamed), ("always", Resident)):
        change = dataclasses.replace(pack, resident=resident)
        # The CPU has the pack in its page cache: "auto" is for devices with memory of their own.
        found = train_loader(images, sampler, change, seed=1, spare=1 << 40)
        assert isinstance(found._source, kind)


def test_a_pack_that_does_not_fit_on_the_device(sysu, monkeypatch):
    images = SysuMM01(sysu).train
    pack = dataclasses.replace(packed(sysu, ALL), resident="always")

    def full(*_, **__):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(packed_module.torch, "empty", full)
    with pytest.raises(DataError, match=r"0\.00 GiB of images do not fit on cpu: --data"):
        loader(images, pack)


def test_processes_that_are_not_forked_map_the_files_again(sysu):
    pack = Pack(packed(sysu, ALL).packed)
    content = pickle.dumps(pack)
    assert len(content) < 1000
    again = pickle.loads(content)
    assert len(again) == len(pack)
    np.testing.assert_array_equal(again[5], pack[5])


def test_shards_are_mapped_read_only(sysu):
    pack = Pack(packed(sysu, ALL).packed)
    assert len(pack.shards) > 3
    assert all(isinstance(shard, np.memmap) and shard.mode == "r" for shard in pack.shards)
    with pytest.raises(ValueError, match="read-only"):
        pack[0][0] = 0


class TestOnDevice:
    pytestmark = pytest.mark.gpu

    @pytest.mark.parametrize("name", [*METHODS, "all"])
    @pytest.mark.parametrize("resident", ["never", "always"])
    @pytest.mark.parametrize("workers", [0, 2])
    def test_the_same_bits(self, sysu, name, resident, workers):
        config, device = of(name), torch.device("cuda")
        images = SysuMM01(sysu, label_order=config.label_order).train
        change = {"resident": resident, "workers": workers}
        pack = dataclasses.replace(packed(sysu, config), **change)
        sampler = loader(images, config, batches=40).sampler
        expected = list(loader(images, config, batches=40))
        for _ in range(2):
            found = list(train_loader(images, sampler, pack, seed=3, device=device))
            assert all(column.device.type == "cuda" for batch in found for column in batch[:4])
            assert same([type(b)(*(c.cpu() for c in b[:4]), b.paired) for b in found], expected)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_resident_pack_never_waits_for_the_device(self, sysu, workers):
        images, device = SysuMM01(sysu).train, torch.device("cuda")
        pack = dataclasses.replace(packed(sysu, ALL), resident="always", workers=workers)
        sampler = loader(images, ALL, batches=40).sampler
        batches = iter(train_loader(images, sampler, pack, seed=3, device=device))
        next(batches)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            assert len(list(batches)) == 39
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_auto(self, sysu):
        images, device = SysuMM01(sysu).train, torch.device("cuda")
        pack = packed(sysu, ALL)
        need = len(images) * 40 * 20 * 3
        for spare, kind in ((need, Resident), (need - 1, Streamed), (0, Streamed)):
            sampler = loader(images, ALL).sampler
            found = train_loader(images, sampler, pack, seed=3, device=device, spare=spare)
            assert isinstance(found._source, kind)


class TestSlabs:
    def test_memory_is_used_again_when_nobody_holds_it(self):
        slabs = Slabs(2)
        first = slabs.take(4, 8, 6)
        assert (first.shape, first.dtype) == ((4, 3, 8, 6), torch.float32)
        assert first.is_contiguous(memory_format=torch.channels_last)
        place = first.data_ptr()
        part = first[1:, :2].detach()
        del first
        assert slabs.take(4, 8, 6).data_ptr() != place  # a view holds it
        kept = slabs.take(2, 8, 6)
        del part
        assert slabs.take(3, 8, 6).data_ptr() == place  # a smaller one fits
        assert kept.data_ptr() != place

    def test_only_a_few_blocks_are_kept(self):
        slabs = Slabs(2)
        many = [slabs.take(1, 4, 4) for _ in range(5)]
        places = {images.data_ptr() for images in many}
        assert len(places) == 5
        del many
        assert len(slabs._free) == 2

    def test_autograd_holds_it(self):
        slabs = Slabs(2)
        images = slabs.take(1, 4, 4).fill_(3.0)
        weight = torch.ones(3, 1, 1, requires_grad=True)
        loss = (images * weight).sum()
        del images
        slabs.take(1, 4, 4).fill_(7.0)
        loss.backward()
        assert weight.grad.flatten().tolist() == [48.0] * 3
