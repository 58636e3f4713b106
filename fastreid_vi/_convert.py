"""Official checkpoints in and out: what `fastreid-vi convert` does."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from fastreid_vi import methods
from fastreid_vi._flags import published
from fastreid_vi.config import Recipe

if TYPE_CHECKING:
    from torch import Size, Tensor

    from fastreid_vi.train.checkpoint import Header
    from fastreid_vi.train.convert import Official

Direction = Literal["ours", "official"]


class ConvertError(ValueError):
    """A checkpoint cannot be converted; one line that says why."""


class KeysError(ConvertError):
    """Keys that are missing or unknown; all of them beside the one line."""

    def __init__(self, line: str, error: Any) -> None:
        super().__init__(line)
        self.missing, self.unknown = list(error.missing), list(error.unknown)

    def listing(self) -> str:
        """The keys that did not fit; the first ones where there are many."""
        lines = []
        for what, keys in (("missing", self.missing), ("unmapped", self.unknown)):
            lines += [f"  {what} {key}" for key in keys[:LISTED]]
            if len(keys) > LISTED:
                lines.append(f"  {what}: {len(keys) - LISTED} more")
        return "\n".join(lines)


class Form(NamedTuple):
    """How a method's released checkpoints are stored."""

    wrapper: str | None = None
    """Entry of the file that holds the state dict; None for a bare one."""
    parts: int = 0
    """Numbered files in a folder; 0 for one file."""


LISTED = 25
"""Keys of a kind that an error lists."""
IDENTITIES = {395: "sysu", 206: "regdb", 713: "llcm"}
"""Training identities -> data set: which recipe to name when several have the same network."""
FORMS = {"baseline": Form("net"), "lba": Form("net"), "aligngan": Form(parts=8)}


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was converted."""

    source: Path
    out: Path
    to: Direction
    method: str
    num_ids: int
    mapped: list[str]
    """Official keys whose tensors went over."""
    unused: list[str]
    """Official keys that carry nothing for us."""
    beside: list[str]
    """Entries beside the state dict that were left out."""
    recipe: str | None
    """Recipe that the shapes fit."""
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**vars(self), "source": str(self.source), "out": str(self.out)}


def convert(
    source: Path,
    out: Path,
    *,
    method: str | None = None,
    to: Direction | None = None,
    num_ids: int | None = None,
    base: Path | None = None,
    step: int | None = None,
    recipe: str | None = None,
    overwrite: bool = False,
) -> Report:
    """Write `source` in the other form.

    Args:
        source: an official file (AlignGAN: the folder of its eight), our safetensors file, or a run
            or checkpoint folder.
        out: what to write; a folder for AlignGAN's official form.
        method: whose checkpoint it is; by default found out from its header or keys.
        to: by default the form that `source` does not have.
        num_ids: what the classifier is expected to have.
        base: an official checkpoint that fills the official keys that carry nothing for us.
        step: AlignGAN's step to read, the newest by default, or to write.
        recipe: name or run.json of the recipe the shapes must fit; by default the method's own.
        overwrite: replace what is at `out`.
    Raises:
        ConvertError, TrainError: nothing there, damaged, another method, keys or shapes that do not
            fit; `out` is untouched.
    """
    from fastreid_vi.train.convert import is_parts

    if not source.exists():
        raise ConvertError(f"{source}: no such file or folder")
    if out.exists() and not overwrite:
        raise ConvertError(f"{out}: exists; name another place or add --overwrite")
    if not out.parent.is_dir():
        raise ConvertError(f"{out.parent}: no such folder")
    if method is not None and method not in methods.METHODS:
        known = ", ".join(methods.METHODS)
        raise ConvertError(f"--method: expected one of {known}, got {method!r}")
    ours = None if is_parts(source) else _ours(source)
    direction = to or ("ours" if ours is None else "official")
    if direction == "official":
        if ours is None:
            raise ConvertError(f"{source}: has no fastreid_vi header: not one of our checkpoints")
        return _to_official(
            source, out, *ours, method=method, num_ids=num_ids, base=base, step=step
        )
    if ours is not None:
        raise ConvertError(f"{source}: already in our form (method {ours[1].method!r})")
    if base is not None:
        raise ConvertError("--base: only fills official checkpoints (--to official)")
    if out.is_dir():
        raise ConvertError(f"{out}: is a folder; expected the name of a safetensors file")
    official = _read(source, method, step)
    return _to_ours(source, out, official, method=method, num_ids=num_ids, recipe=recipe)


def text(report: Report) -> str:
    """A report for people."""
    lines = [
        f"{report.out}: {report.method}, {report.num_ids} identities, "
        f"{len(report.mapped)} keys mapped"
    ]
    if report.unused:
        lines.append(f"{len(report.unused)} official keys carry nothing for us:")
        lines += [f"  {key}" for key in report.unused]
    if report.beside:
        lines.append(f"left out beside the weights: {', '.join(report.beside)}")
    return "\n".join([*lines, *report.notes])


def _to_ours(
    source: Path,
    out: Path,
    official: Official,
    *,
    method: str | None,
    num_ids: int | None,
    recipe: str | None,
) -> Report:
    from fastreid_vi.methods.base import OfficialKeyError
    from fastreid_vi.train.checkpoint import Header
    from fastreid_vi.train.convert import write_weights

    if method is None:
        fitting = [name for name in methods.METHODS if _fits(name, official.state)]
        if len(fitting) != 1:
            found = f"those of {' and '.join(fitting)}" if fitting else "those of no method"
            raise ConvertError(f"{source}: its keys are {found}; name the method: --method M")
        method = fitting[0]
    try:
        weights, unused = _mapping(method).from_official(official.state)
    except OfficialKeyError as error:
        others = [m for m in methods.METHODS if m != method and _fits(m, official.state)]
        hint = f"; its keys are those of {others[0]!r}: --method {others[0]}" if others else ""
        raise KeysError(
            f"{source}: not a checkpoint of {method!r}: {error}{hint}", error
        ) from error
    except ValueError as error:
        raise ConvertError(f"{source}: {error}") from error
    candidates = [recipe] if recipe is not None else _recipes(method)
    name, count = _fitting(weights, candidates, source)
    if num_ids is not None and num_ids != count:
        raise ConvertError(f"{source}: its classifier has {count} identities, expected {num_ids}")
    write_weights(out, weights, Header(method, count, official.epoch, official.step))
    return Report(
        source=source,
        out=out,
        to="ours",
        method=method,
        num_ids=count,
        mapped=[key for key in official.state if key not in set(unused)],
        unused=list(unused),
        beside=list(official.beside),
        recipe=name,
        notes=list(_notes(out, name)),
    )


def _to_official(
    source: Path,
    out: Path,
    weights: dict[str, Tensor],
    header: Header,
    *,
    method: str | None,
    num_ids: int | None,
    base: Path | None,
    step: int | None,
) -> Report:
    from fastreid_vi.train.convert import write_official, write_parts

    for what, given, own in (
        ("method", method, header.method),
        ("class count", num_ids, header.num_ids),
    ):
        if given not in (None, own):
            raise ConvertError(f"{source}: expected {what} {given}, its header says {own}")
    form, mapping = _form(header.method), _mapping(header.method)
    weights = _in_order(weights, header)
    filling = _read(base, header.method, None).state if base is not None else None
    try:
        state = mapping.to_official(weights, filling)
        unused = mapping.from_official(state)[1]
    except ValueError as error:
        raise ConvertError(f"{source}: {error}") from error
    if filling is not None and set(filling) == set(state):
        state = {key: state[key] for key in filling}
    if form.parts:
        write_parts(out, state, header.step if step is None else step)
    else:
        write_official(out, state, wrapper=form.wrapper, epoch=header.epoch)
    notes = []
    if unused and base is None:
        notes.append(
            f"the {len(unused)} keys that carry nothing for us are filled without --base: "
            "the official code can test with this file, but not go on training from it"
        )
    return Report(
        source=source,
        out=out,
        to="official",
        method=header.method,
        num_ids=header.num_ids,
        mapped=[key for key in state if key not in set(unused)],
        unused=list(unused),
        beside=[],
        recipe=None,
        notes=notes,
    )


def _ours(source: Path) -> tuple[dict[str, Tensor], Header] | None:
    """Weights and header where `source` is ours."""
    from fastreid_vi.train.checkpoint import find, load_safetensors

    if source.is_file() and source.suffix != ".safetensors":
        return None
    weights, header = load_safetensors(find(source))
    return (weights, header) if header is not None else None


def _read(path: Path, method: str | None, step: int | None) -> Official:
    from fastreid_vi.train.convert import is_parts, read_official, read_parts

    if is_parts(path):
        return read_parts(path, next(form.parts for form in FORMS.values() if form.parts), step)
    parts = _form(method).parts if method is not None else 0
    if parts:
        raise ConvertError(f"{path}: expected the folder of {parts} files model-<index>_<step>.pkl")
    return read_official(path)


def _form(method: str) -> Form:
    return FORMS.get(method, Form())


def _mapping(method: str) -> Any:
    """The method's `official` module."""
    name = f"{methods.METHODS[method][0]}.official"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ConvertError(f"method {method!r}: no official checkpoints are known") from None


def _fits(method: str, state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has the keys of a method."""
    try:
        _mapping(method).from_official(state)
    except ValueError:
        return False
    return True


def _recipes(method: str) -> list[str]:
    return [name for name in methods.RECIPES if published(name).method == method]


def _recipe(name: str) -> Recipe:
    from fastreid_vi._evaluate import read_record

    found: Recipe = read_record(Path(name)).recipe if Path(name).is_file() else published(name)
    return found


def _in_order(weights: dict[str, Tensor], header: Header) -> dict[str, Tensor]:
    """In the network's order, where it is a recipe's: our files keep no order of their own."""
    for name in _recipes(header.method):
        shapes = _shapes(published(name), header.num_ids)
        if set(shapes) == set(weights):
            return {key: weights[key] for key in shapes}
    return weights


def _class_axis(recipe: Recipe) -> tuple[str, int]:
    """Key and axis of the first entry whose size is the class count."""
    two, three = _shapes(recipe, 2), _shapes(recipe, 3)
    return next(
        (key, axis)
        for key, shape in two.items()
        for axis, size in enumerate(shape)
        if size != three[key][axis]
    )


def _shapes(recipe: Recipe, num_ids: int) -> dict[str, Size]:
    """Keys and shapes of a recipe's network; no storage behind them."""
    import torch

    with torch.device("meta"):
        network = methods.from_recipe(recipe, num_ids, weights="none")
    return {key: value.shape for key, value in network.state_dict().items()}


def _fitting(
    weights: Mapping[str, Tensor], candidates: Iterable[str], source: Path
) -> tuple[str, int]:
    """The recipe whose network has these keys and shapes, and the class count.

    Raises:
        ConvertError: none has; names what is wrong with the nearest.
    """
    from fastreid_vi.config import to_dict
    from fastreid_vi.train.convert import unfit

    fitting: dict[str, str] = {}  # data set -> recipe
    count, faults, seen = 0, list[tuple[int, str]](), dict[str, list[str]]()
    for name in candidates:
        recipe = _recipe(name)
        network = json.dumps(to_dict(recipe)["model"], default=str, sort_keys=True)
        if network not in seen:  # the recipes of a method often share their network
            key, axis = _class_axis(recipe)
            if key in weights and weights[key].dim() > axis:
                count = weights[key].shape[axis]
            seen[network] = unfit(weights, _shapes(recipe, max(count, 1)))
        wrong = seen[network]
        if not wrong:
            fitting.setdefault(recipe.dataset, name)
            continue
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        faults.append((len(wrong), f"{source}: does not fit {name}: {wrong[0]}{more}"))
    if not fitting:
        raise ConvertError(min(faults)[1])
    return fitting.get(IDENTITIES.get(count, ""), next(iter(fitting.values()))), count


def _notes(out: Path, recipe: str) -> Iterator[str]:
    if _recipe(recipe).data.label_order == "file":
        yield (
            "label order: `file`: class k is the k-th identity of the data set's list files, not "
            'of their sorted ids; keep data.label_order "file" to train on'
        )
    yield f"next: fastreid-vi eval {out} --recipe {recipe} --data-root DIR"
