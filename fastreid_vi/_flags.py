"""Recipes on the command line: their names, and the flags of `train` that argparse leaves over."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastreid_vi.config import Recipe


class UsageError(Exception):
    """The command line itself is wrong: exit code 2."""


def published(name: str) -> Recipe:
    """A recipe by its name in `methods.RECIPES`, or a method's recipe for SYSU-MM01.

    Raises:
        ValueError: there is none; the message lists those that there are.
    """
    from fastreid_vi import methods

    method, dash, dataset = name.partition("-")
    return methods.recipe(method, dataset if dash else "sysu")


def take_name(rest: Sequence[str]) -> tuple[str | None, list[str]]:
    """The recipe's name out of what argparse left over, and the recipe flags."""
    from fastreid_vi.methods import METHODS, RECIPES

    for i, word in enumerate(rest):
        if not word.startswith("-") and (i == 0 or word in RECIPES or word in METHODS):
            return word, [*rest[:i], *rest[i + 1 :]]
    return None, list(rest)


def with_flags(recipe: Recipe, flags: list[str], program: str, debug: bool) -> Recipe:
    """The recipe with the changes that flags such as `--optim.lr 1e-3` ask for."""
    if not flags:
        return recipe
    try:
        import tyro
    except ImportError as error:
        raise UsageError("recipe flags need tyro: pip install tyro") from error
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(sys.stderr if debug else said):
            changed: Recipe = tyro.cli(type(recipe), default=recipe, args=flags, prog=program)
    except SystemExit as stop:
        if stop.code in (0, None):  # --help
            raise
        raise UsageError(_boxed(said.getvalue())) from None
    return changed


def packed(pack: str) -> str:
    """`--pack` as `DataConfig.packed` has it: a path that holds from everywhere."""
    if pack in ("agw", "none", ""):
        return pack.removeprefix("none")
    return os.path.abspath(pack)


def pack_flags(pack: str | None) -> list[str]:
    """The recipe flags that `--pack` stands for."""
    return [] if pack is None else ["--data.packed", packed(pack)]


def _boxed(said: str) -> str:
    """The message between the first two rules of tyro's box, on one line."""
    lines = [line.strip(" │") for line in said.splitlines()]
    # A frame on terminals that can draw one, dashes elsewhere.
    rules = [
        i
        for i, line in enumerate(lines)
        if line[:1] in ("╭", "╰") or (line and set(line) <= set("-─"))
    ]
    inside = lines[rules[0] + 1 : rules[1]] if len(rules) > 1 else lines
    return " ".join(" ".join(inside).split()) or "wrong recipe flag"
