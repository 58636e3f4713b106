"""`data pack`: making a pack, and holding one against its checksums."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fastreid_vi._console import Console
from fastreid_vi._flags import UsageError, published, with_flags
from fastreid_vi._parsers import PROGRAM
from fastreid_vi.data.images import DataError
from fastreid_vi.data.pack import Pack
from fastreid_vi.data.pack_format import PACK_AGAIN, size_of
from fastreid_vi.data.packing import Packed, write_pack

if TYPE_CHECKING:
    from fastreid_vi.config import Recipe


def run(args: argparse.Namespace, console: Console) -> bool:
    """Make a pack, or check one; whether it is good."""
    if args.check is not None:
        if args.out is not None or args.recipe is not None or args.rest:
            raise UsageError("--check PACK stands alone, or with the data set it was made from")
        return _check(args.check, args.root, console)
    for name, value in (("DIR", args.root), ("--out", args.out), ("--recipe", args.recipe)):
        if value is None:
            raise UsageError(f"{name} is missing: {PROGRAM} data pack DIR --out PACK --recipe R")
    return _make(args, console)


def _make(args: argparse.Namespace, console: Console) -> bool:
    from fastreid_vi._evaluate import open_dataset

    recipe = _recipe(args)
    dataset = open_dataset(recipe, args.root)
    try:
        with console.progress("packing", "images") as show:
            done = write_pack(
                dataset,
                recipe.data,
                args.out,
                workers=args.workers,
                shard_bytes=args.shard_mib << 20,
                overwrite=args.overwrite,
                progress=show,
            )
    except KeyboardInterrupt:
        console.note(f"{PROGRAM}: what is done is kept; the same command continues")
        raise
    _say(done, args.recipe, args.root, console)
    return True


def _recipe(args: argparse.Namespace) -> Recipe:
    flags = [*args.rest, *(["--data.skip-broken"] if args.skip_broken else [])]
    if Path(args.recipe).exists():
        from fastreid_vi._evaluate import read_record

        found: Recipe = read_record(Path(args.recipe)).recipe
    else:
        try:
            found = published(args.recipe)
        except ValueError as error:
            raise UsageError(str(error)) from error
    return with_flags(found, flags, f"{PROGRAM} data pack", args.debug)


def _say(done: Packed, name: str, root: Path, console: Console) -> None:
    recipe, rate = done.recipe, done.decoded / done.seconds if done.seconds else 0.0
    console.say(
        f"{done.path}: {done.images} images of {recipe.height} x {recipe.width} ({recipe.resize}), "
        f"{done.bytes / 2**30:.2f} GiB in {done.shards} files, recipe hash {recipe.digest()}"
    )
    if done.decoded:
        known = done.images - done.decoded
        rest = f"; {known} were there already" if known else ""
        console.say(
            f"decoded {done.decoded} images in {done.seconds:.1f} s, {rate:.0f} images/s{rest}"
        )
    else:
        console.say("nothing to do: this pack was there already")
    console.say(f"next: {PROGRAM} train {name} --data-root {root} --pack {done.path}")
    console.result(
        {
            "path": str(done.path),
            "images": done.images,
            "bytes": done.bytes,
            "files": done.shards,
            "recipe_hash": recipe.digest(),
            "decoded": done.decoded,
            "seconds": round(done.seconds, 3),
            "images_per_second": round(rate, 1),
        }
    )


def _check(path: Path, root: Path | None, console: Console) -> bool:
    pack = Pack(path)
    with console.progress("checking", "images") as show:
        damaged = pack.damaged(show)
    changed = [] if root is None else _changed(pack, root)
    for what, names in (("damaged", damaged), ("changed since", changed)):
        if names:
            console.say(f"{path}: {len(names)} images are {what}, first {names[0]}: {PACK_AGAIN}")
    if not damaged and not changed:
        console.say(f"{path}: {len(pack)} images, recipe hash {pack.recipe.digest()}: good")
    console.result(
        {
            "path": str(path),
            "ok": not damaged and not changed,
            "images": len(pack),
            "recipe_hash": pack.recipe.digest(),
            "damaged": damaged,
            "changed": changed,
        }
    )
    return not damaged and not changed


def _changed(pack: Pack, root: Path) -> list[str]:
    """Images whose file is gone or has another size than when it was packed."""
    found = []
    for name, size in zip(pack.rows.paths, pack.rows.sizes.tolist(), strict=True):
        try:
            now = size_of(root / name)
        except DataError:
            now = -1
        if now != size:
            found.append(name)
    return found
