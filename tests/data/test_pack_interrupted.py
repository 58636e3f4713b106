"""Packing that is killed, stopped or runs out of disk: what is left, and how it goes on."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from fastreid_vi.data import DataError, Pack, SysuMM01, packing, write_pack
from fastreid_vi.data.transform import read_image
from tests.cli.runs import ENVIRONMENT
from tests.data.conftest import jpeg
from tests.data.test_pack import CONFIG, IMAGE, leftovers, written


class Stop(Exception):
    pass


def stopped_after(root: Path, count: int, config=CONFIG, **options) -> None:
    """An unfinished pack, as Ctrl-C leaves it."""

    def stop(done: int, total: int) -> None:
        if done == count:
            raise Stop

    with pytest.raises(Stop):
        write_pack(SysuMM01(root), config, root.parent / "pack", progress=stop, **options)


class TestResume:
    @pytest.fixture
    def decoded(self, monkeypatch):
        """Names of the files that are decoded."""
        names, lock = [], threading.Lock()

        def counted(path, *size):
            with lock:
                names.append(path.name)
            return read_image(path, *size)

        monkeypatch.setattr(packing, "read_image", counted)
        return names

    @pytest.mark.parametrize("count", [1, 6, 7, 8, 30])
    def test_finished_images_are_not_decoded_again(self, sysu, decoded, count):
        whole = Pack(written(sysu, shard_bytes=7 * IMAGE))
        expected = [image.copy() for image in whole.shards]
        whole.path.rename(sysu.parent / "other")
        stopped_after(sysu, count, workers=1, shard_bytes=7 * IMAGE)
        assert leftovers(sysu.parent) == [".packing-pack"]
        decoded.clear()
        done = write_pack(SysuMM01(sysu), CONFIG, sysu.parent / "pack", shard_bytes=7 * IMAGE)
        assert len(decoded) == done.decoded == done.images - count
        for found, shard in zip(Pack(done.path).shards, expected, strict=True):
            np.testing.assert_array_equal(found, shard)
        assert Pack(done.path).damaged() == []
        assert leftovers(sysu.parent) == []

    @pytest.mark.parametrize("damage", ["cut pixels", "wrong pixels", "cut journal", "no journal"])
    def test_a_torn_tail_is_decoded_again(self, sysu, decoded, damage):
        stopped_after(sysu, 20, workers=1)
        folder = sysu.parent / ".packing-pack"
        pixels, journal = folder / "pixels-00000.npy", folder / "journal"
        start = 128 + 15 * IMAGE
        if damage == "cut pixels":
            os.truncate(pixels, start + 7)
        elif damage == "wrong pixels":
            content = bytearray(pixels.read_bytes())
            content[start + 50] ^= 1
            pixels.write_bytes(content)
        elif damage == "cut journal":
            os.truncate(journal, 15 * 8 + 5)
        else:
            journal.unlink()
        decoded.clear()
        done = write_pack(SysuMM01(sysu), CONFIG, sysu.parent / "pack", workers=1)
        assert len(decoded) == done.images - (0 if damage == "no journal" else 15)
        assert Pack(done.path).damaged() == []

    def test_another_recipe(self, sysu):
        stopped_after(sysu, 20)
        taller = dataclasses.replace(CONFIG, height=48)
        with pytest.raises(DataError, match="unfinished pack of another recipe"):
            write_pack(SysuMM01(sysu), taller, sysu.parent / "pack")
        path = write_pack(SysuMM01(sysu), taller, sysu.parent / "pack", overwrite=True).path
        assert Pack(path).damaged() == []
        assert Pack(path).shards[0].shape[1] == 48

    def test_an_image_that_has_changed_meanwhile(self, sysu, decoded):
        stopped_after(sysu, 20, workers=1)
        SysuMM01(sysu).train.file(11).write_bytes(jpeg(12345, height=64))
        decoded.clear()
        done = write_pack(SysuMM01(sysu), CONFIG, sysu.parent / "pack", workers=1)
        assert len(decoded) == done.images - 11
        assert Pack(done.path).damaged() == []

    def test_two_processes_at_once(self, sysu):
        def second(done: int, total: int) -> None:
            if done == 3:
                with pytest.raises(DataError, match="another process is packing there"):
                    written(sysu)
                seen.append(done)

        seen: list[int] = []
        written(sysu, progress=second)
        assert seen == [3]


PACK = """
import os, resource, signal, sys
from pathlib import Path
from fastreid_vi.config import DataConfig
from fastreid_vi.data import DataError, SysuMM01, write_pack
from tests.train.small import die_before_operation
root, kind, n = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
config = DataConfig(height=40, width=20, identities=2, images=4, sampler="identity_random")
if kind == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, n))
elif kind == "operation":
    die_before_operation(n)
def kill(done, total):
    if kind == "image" and done == n:
        os.kill(os.getpid(), signal.SIGKILL)
try:
    done = write_pack(SysuMM01(root), config, root.parent / "pack", workers=2, progress=kill,
                      shard_bytes=9 * 40 * 20 * 3)
except DataError as error:
    sys.exit(str(error))
print(done.decoded)
"""


def packing_process(root: Path, kind: str, n: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PACK, str(root), kind, str(n)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, env=ENVIRONMENT
    )


def test_a_chain_of_sigkills(sysu):
    """Before its n-th image, or before its n-th disk operation, whichever process comes."""
    total = len(Pack(written(sysu)))
    (sysu.parent / "pack").rename(sysu.parent / "whole")
    reached = 0
    for n in (5, 9, 23, 31):
        found = packing_process(sysu, "image", n)
        assert found.returncode == -signal.SIGKILL, found.stderr
    for n in (1, 2, 3, 5):
        found = packing_process(sysu, "operation", n)
        assert found.returncode in (0, -signal.SIGKILL), found.stderr
        reached += found.returncode == 0
    done = packing_process(sysu, "", 0)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= total - 30
    pack, whole = Pack(sysu.parent / "pack"), Pack(sysu.parent / "whole")
    assert pack.damaged() == []
    assert pack.rows.crc32.tolist() == whole.rows.crc32.tolist()
    assert leftovers(sysu.parent) == []


def test_a_disk_that_fills(sysu):
    full = packing_process(sysu, "full", 5 * IMAGE)
    assert full.returncode == 1
    message = full.stderr.strip()
    assert "\n" not in message
    assert "cannot be written: File too large; the pack needs" in message
    assert "make room and run the same command again, it continues" in message
    assert not (sysu.parent / "pack").exists()
    done = packing_process(sysu, "", 0)
    assert done.returncode == 0, done.stderr
    pack = Pack(sysu.parent / "pack")
    assert int(done.stdout) == len(pack) - 4  # the fifth was written in part
    assert pack.damaged() == []
