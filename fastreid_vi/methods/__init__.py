"""Published methods: `create` builds a network, `recipe` gives a published training recipe.

Importing this package, or asking for a recipe, does not load torch.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import TYPE_CHECKING, Any, Final

from fastreid_vi.config import Recipe, from_dict, to_dict

if TYPE_CHECKING:
    from fastreid_vi.methods.base import Losses, Method

# Name -> package, class of the network, of its options, of its recipes.
METHODS: Final = {
    "baseline": ("fastreid_vi.methods.baseline", "Baseline", "BaselineOptions", "BaselineRecipe"),
    "aligngan": ("fastreid_vi.methods.aligngan", "AlignGAN", "AlignGANOptions", "AlignGANRecipe"),
    "lba": ("fastreid_vi.methods.lba", "LbA", "LbAOptions", "LbARecipe"),
    "mpanet": ("fastreid_vi.methods.mpanet", "MPANet", "MPANetOptions", "MPANetRecipe"),
    "mcja": ("fastreid_vi.methods.mcja", "MCJA", "MCJAOptions", "MCJARecipe"),
}
# Recipe -> module, function.
RECIPES: Final = {
    "baseline-sysu": ("fastreid_vi.methods.baseline.recipe", "sysu"),
    "baseline-regdb": ("fastreid_vi.methods.baseline.recipe", "regdb"),
    "baseline-llcm": ("fastreid_vi.methods.baseline.recipe", "llcm"),
    "aligngan-sysu": ("fastreid_vi.methods.aligngan.recipe", "sysu"),
    "aligngan-regdb": ("fastreid_vi.methods.aligngan.recipe", "regdb"),
    "aligngan-llcm": ("fastreid_vi.methods.aligngan.recipe", "llcm"),
    "lba-sysu": ("fastreid_vi.methods.lba.recipe", "sysu"),
    "lba-regdb": ("fastreid_vi.methods.lba.recipe", "regdb"),
    "lba-llcm": ("fastreid_vi.methods.lba.recipe", "llcm"),
    "mpanet-sysu": ("fastreid_vi.methods.mpanet.recipe", "sysu"),
    "mpanet-regdb": ("fastreid_vi.methods.mpanet.recipe", "regdb"),
    "mpanet-llcm": ("fastreid_vi.methods.mpanet.recipe", "llcm"),
    "mcja-sysu": ("fastreid_vi.methods.mcja.recipe", "sysu"),
    "mcja-regdb": ("fastreid_vi.methods.mcja.recipe", "regdb"),
    "mcja-llcm": ("fastreid_vi.methods.mcja.recipe", "llcm"),
    "mcja-arxiv": ("fastreid_vi.methods.mcja.recipe", "sysu_arxiv"),
}

__all__ = [
    "METHODS",
    "RECIPES",
    "Losses",
    "Method",
    "create",
    "from_recipe",
    "recipe",
    "recipe_type",
]


def create(name: str, num_ids: int, **options: Any) -> Method:
    """Build a method.

    Args:
        name: a key of `METHODS`.
        num_ids: training identities, the size of the classifiers.
        options: fields of the method's options dataclass, for example `weights="none"`; the others
            keep the official defaults.
    Returns:
        The network, on the CPU, in training mode.
    Raises:
        ValueError: an unknown method or option, a value that does not fit, or pretrained weights
            that cannot be read.

    >>> from fastreid_vi import methods
    >>> methods.create("mpanet", 10, depth=18, weights="none").embed_dim
    3584
    """
    package, network, kind, _ = _method(name)
    module = importlib.import_module(package)
    chosen = from_dict(getattr(module, kind), options, where=name)
    method: Method = getattr(module, network)(num_ids, chosen)
    return method


def recipe(name: str, dataset: str) -> Recipe:
    """Give the published training recipe of a method for a data set.

    Args:
        name: method, a key of `METHODS`.
        dataset: "sysu", "regdb" or "llcm", or the name of a variant, as in `RECIPES`.
    Returns:
        A `Recipe` with the method's options in `model`.
    Raises:
        ValueError: there is no such recipe; the message lists those that there are.

    >>> from fastreid_vi import methods
    >>> methods.recipe("mpanet", "sysu").optim.lr
    0.00035
    """
    key = f"{name}-{dataset}"
    if key not in RECIPES:
        raise ValueError(f"recipe: expected one of {', '.join(RECIPES)}, got {key!r}")
    module, function = RECIPES[key]
    found: Recipe = getattr(importlib.import_module(module), function)()
    return found


def recipe_type(name: str) -> type[Recipe]:
    """Give a method's recipe dataclass, to read a saved recipe with `config.from_dict`.

    Raises:
        ValueError: an unknown method.
    """
    package, _, _, kind = _method(name)
    found: type[Recipe] = getattr(importlib.import_module(package), kind)
    return found


def from_recipe(recipe: Recipe, num_ids: int, **changes: Any) -> Method:
    """Build the method that a recipe describes.

    Args:
        recipe: with the method's options in `model`.
        num_ids: training identities.
        changes: options that differ, for example `weights="none"` before a checkpoint is loaded.
    Raises:
        ValueError: as for `create`, or a recipe of another method's class.
    """
    kind = recipe_type(recipe.method)
    if not isinstance(recipe, kind):
        raise ValueError(f"recipe: expected {kind.__name__}, got {type(recipe).__name__}")
    model = next(getattr(recipe, f.name) for f in dataclasses.fields(recipe) if f.name == "model")
    return create(recipe.method, num_ids, **{**to_dict(model), **changes})


def _method(name: str) -> tuple[str, str, str, str]:
    if name not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]


def __getattr__(name: str) -> Any:
    if name in ("Losses", "Method"):  # loads torch
        return getattr(importlib.import_module("fastreid_vi.methods.base"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
