"""Typed, frozen configuration shared by every recipe, and the batch that a method is given.

A run is one `Recipe`. A variant is `dataclasses.replace` on another. No global, no registry, no
YAML.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

VISIBLE, INFRARED = 0, 1

DatasetName = Literal["sysu", "regdb", "llcm"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
SamplerName = Literal[
    "paired_identity",
    "identity_random",
    "norm_triplet",
    "uniform",
    "identity_uniform",
    "cross_modality_identity",
    "random",
]
Spectrum = Literal["hue", "gray", "cutmix", "jitter", "none"]


class Batch(NamedTuple):
    """One training or evaluation batch of B images."""

    images: Tensor  # [B, 3, H, W] float32, normalised
    labels: Tensor  # [B] int64, contiguous training label
    modality: Tensor  # [B] int64, VISIBLE or INFRARED
    cams: Tensor  # [B] int64, camera number on disk
    paired: int = 0
    """k > 0 promises rows [visible | infrared], both halves identity by identity with k images each
    and the same labels in the same order: a method may then split them without asking the device.
    0 promises nothing."""

    def rows(self, start: int, stop: int, paired: int = 0) -> Batch:
        """The rows from `start` up to `stop`, with a promise of their own."""
        part = slice(start, stop)
        images, labels = self.images[part], self.labels[part]
        return Batch(images, labels, self.modality[part], self.cams[part], paired)


def _positive(**fields: float) -> None:
    for name, value in fields.items():
        if value <= 0:
            raise ValueError(f"{name}: expected > 0, got {value}")


def check_choices(config: Any) -> None:
    """Check every `Literal` field of a configuration dataclass; for `__post_init__`.

    Raises:
        ValueError: a value that its field does not list.
    """
    for name, hint in typing.get_type_hints(type(config)).items():
        value, allowed = getattr(config, name), typing.get_args(hint)
        if typing.get_origin(hint) is Literal and value not in allowed:
            listed = ", ".join(map(repr, allowed))
            raise ValueError(f"{name}: expected one of {listed}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, how it is transformed and how batches are drawn."""

    height: int
    """Image height after resizing, pixels."""
    width: int
    """Image width after resizing, pixels."""
    identities: int
    """P: identities in a batch."""
    images: int
    """K: images of each identity in a batch, both modalities together."""
    sampler: SamplerName
    """Batch sampler, named as in the data set specification, section 5."""
    pixel_identities: int = 0
    """Identities of a second, smaller batch that follows the first in every iteration (AlignGAN's
    pixel batch, official: 4); 0 for none."""
    trial: int = 1
    """RegDB: which of the ten halvings is trained on and tested, 1 to 10."""
    splits: tuple[str, ...] = ("train", "val")
    """Identity lists that are trained on; the field trains on train + val."""
    label_order: Literal["sorted", "file"] = "sorted"
    """Training labels: rank of the pid, or as the data set's lists have them. MPANet and MCJA have
    "file" on SYSU-MM01 and "sorted" on RegDB, AGW and LbA the other way round; matters for training
    on from a converted checkpoint only."""
    resize: Literal["bilinear", "bicubic", "lanczos"] = "bilinear"
    """Pillow filter of the resize step."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    pad: int = 10
    """Border in pixels added on every side before the random crop; 0 turns both off."""
    pad_value: int = 127
    """Value of the border, 0 to 255."""
    erase: float = 0.0
    """Probability of random erasing (after normalisation)."""
    erase_area: tuple[float, float] = (0.02, 0.33)
    """Smallest and largest erased fraction of the image area."""
    erase_aspect: tuple[float, float] = (0.3, 3.3)
    """Smallest and largest height / width of the erased box."""
    channel_mix: float = 0.0
    """Probability of replacing an image by a random mixture of its channels with random tone, so
    that neither colour nor polarity helps. In no published recipe; small networks trained from
    scratch profit."""
    visible_spectra: tuple[Spectrum, ...] = ()
    """Changes of a visible image's channels; one of them is chosen with equal probability for every
    image ("none" keeps its share but does nothing). MCJA: hue, gray, cutmix, jitter."""
    spectrum_probability: float = 0.5
    """Probability that the chosen one acts; official MCJA: 0.5."""
    cutmix_axes: Literal["official", "fixed"] = "official"
    """Channel cutmix reads (width, height) as (height, width), as MCJA's code does, or not (Q1)."""
    gray_rounding: Literal["trunc", "nearest"] = "trunc"
    """Weighted grayscale and spectrum jitter cut the fraction off, as MCJA's code does, or round
    (Q3)."""
    normalize: Literal["imagenet", "symmetric"] = "imagenet"
    """Pixel values after the transform: ImageNet's mean and deviation, or -1 to 1 (AlignGAN)."""
    workers: int = 2
    """Loader processes, or threads with `packed`; 0 loads in the training process's own thread.
    Batches do not depend on it."""
    cache: bool = False
    """Keep decoded and resized uint8 images in memory; of no use with `packed`."""
    packed: str = ""
    """Folder of a pack (`fastreid-vi data pack`) that images are taken from instead of their files;
    "agw" for AGW's .npy arrays in the data set's folder. Batches are the same, bit for bit."""
    resident: Literal["auto", "always", "never"] = "auto"
    """Whether the training images of a pack lie on the device that trains: "auto" puts them on a
    CUDA device whose memory suffices for them beside a training step."""
    validation: int = 0
    """Training identities held out for choosing the best epoch; 0 keeps all for training."""
    skip_broken: bool = False
    """Leave unreadable images out, with a count, instead of stopping."""

    def __post_init__(self) -> None:
        check_choices(self)
        for spectrum in self.visible_spectra:
            if spectrum not in typing.get_args(Spectrum):
                listed = ", ".join(map(repr, typing.get_args(Spectrum)))
                raise ValueError(f"visible_spectra: expected of {listed}, got {spectrum!r}")
        _positive(
            height=self.height, width=self.width, identities=self.identities, images=self.images
        )
        for name in ("flip", "erase", "channel_mix", "spectrum_probability"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}: expected a probability, got {getattr(self, name)}")
        if self.images % 2:
            raise ValueError(
                f"images: expected an even number (half of each modality), got {self.images}"
            )
        if self.pixel_identities < 0:
            raise ValueError(f"pixel_identities: expected >= 0, got {self.pixel_identities}")
        if not 1 <= self.trial <= 10:
            raise ValueError(f"trial: expected 1 to 10, got {self.trial}")
        if self.pad < 0 or self.workers < 0 or self.validation < 0:
            raise ValueError("pad, workers, validation: expected >= 0")
        if not 0 <= self.pad_value <= 255:
            raise ValueError(f"pad_value: expected 0 to 255, got {self.pad_value}")
        for name, top in (("erase_area", 1.0), ("erase_aspect", float("inf"))):
            low, high = getattr(self, name)
            if not 0.0 < low <= high <= top:
                raise ValueError(f"{name}: expected 0 < smallest <= largest, got {low}, {high}")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimiser."""

    name: Literal["adam", "sgd"] = "adam"
    """Adam couples weight decay into the gradient (not AdamW), as all four papers do."""
    lr: float = 3.5e-4
    """Base learning rate."""
    weight_decay: float = 5e-4
    """L2 penalty added to the gradient."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's moments."""
    momentum: float = 0.9
    """SGD momentum."""
    nesterov: bool = False
    """SGD with Nesterov momentum."""
    backbone_lr_scale: float = 1.0
    """Factor on the learning rate of the backbone's parameters (AGW uses 0.1)."""
    clip_norm: float = 0.0
    """Largest gradient norm; 0 turns clipping off."""

    def __post_init__(self) -> None:
        _positive(lr=self.lr)
        if self.weight_decay < 0 or self.clip_norm < 0:
            raise ValueError("weight_decay, clip_norm: expected >= 0")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning rate over epochs (1-based)."""

    epochs: int
    """Length of the run."""
    iterations: int = 0
    """Batches of an epoch; 0 for one pass of the sampler. AlignGAN, whose code knows no epochs,
    counts steps of 100."""
    milestones: tuple[int, ...] = ()
    """The rate is multiplied by `gamma` after each of these epochs."""
    gamma: float = 0.1
    """Factor at a milestone."""
    warmup_epochs: int = 0
    """Epochs of linear warm-up; 0 for none."""
    warmup_start: float = 0.1
    """Fraction of the base rate at the first warm-up epoch."""

    def __post_init__(self) -> None:
        _positive(epochs=self.epochs, gamma=self.gamma)
        if self.iterations < 0:
            raise ValueError(f"iterations: expected >= 0, got {self.iterations}")
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones: expected rising epochs, got {self.milestones}")
        if self.warmup_epochs < 0:
            raise ValueError(f"warmup_epochs: expected >= 0, got {self.warmup_epochs}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Seed, precision, evaluation and checkpoints."""

    seed: int = 1
    """Seeds weights, sampler and augmentation."""
    precision: Precision = "auto"
    """Autocast dtype; "auto" is bf16 on CUDA devices that support it, fp32 elsewhere."""
    channels_last: bool = True
    """Memory format of the network."""
    compile: bool = False
    """Compile the backbone with torch.compile."""
    accumulate: int = 1
    """Batches whose gradients are averaged before the optimiser moves."""
    bn: Literal["local", "sync"] = "local"
    """Batch statistics of each process alone, or of all processes together (torchrun)."""
    skip_nonfinite: bool = False
    """Leave a step out whose loss or gradient is not finite, with a warning, instead of stopping;
    waits for the device in every step."""
    eval_every: int = 10
    """Epochs between evaluations; 0 evaluates only after the last."""
    checkpoint_every: int = 1
    """Epochs between checkpoints."""
    checkpoint_steps: int = 0
    """Also checkpoint every so many steps inside an epoch; 0 for never."""
    keep: int = 2
    """Checkpoints kept beside the best."""
    log_every: int = 10
    """Steps between two step records in metrics.jsonl."""

    def __post_init__(self) -> None:
        _positive(checkpoint_every=self.checkpoint_every, keep=self.keep, log_every=self.log_every)
        _positive(accumulate=self.accumulate)
        if self.eval_every < 0 or self.checkpoint_steps < 0:
            raise ValueError("eval_every, checkpoint_steps: expected >= 0")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run. Methods subclass it and add `model`, their own options."""

    method: str
    """Name for `methods.create`."""
    dataset: DatasetName
    """Layout that is read."""
    data: DataConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig
    run: RunConfig = field(default_factory=RunConfig)

    def optim_of(self, player: str) -> OptimConfig:
        """The optimiser of a player (`Method.player`): the same for all unless a recipe says so."""
        return self.optim


T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """Plain, JSON-ready form of a configuration dataclass; tuples become lists."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    return list(value) if isinstance(value, tuple) else value


def from_dict(kind: type[T], values: dict[str, Any], *, where: str = "recipe") -> T:
    """Build the dataclass `kind` from `to_dict`'s form.

    Raises:
        ValueError: an unknown or missing field, a value of the wrong type, named with its path.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected an object, got {type(values).__name__}")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - set(fields)):
        raise ValueError(f"{where}: unknown field {unknown[0]!r} for {kind.__name__}")
    required = {
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - set(values)):
        raise ValueError(f"{where}: missing field {missing[0]!r} of {kind.__name__}")
    return kind(**{k: _typed(hints[k], v, f"{where}.{k}") for k, v in values.items()})


def _typed(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast("type[Any]", hint), value, where=where)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        ok = value in args
    elif origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where}: expected a list, got {value!r}")
        if args[-1] is not Ellipsis and len(value) != len(args):
            raise ValueError(f"{where}: expected {len(args)} values, got {len(value)}")
        return tuple(_typed(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    elif origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _typed(next(a for a in args if a is not type(None)), value, where)
    elif hint is float:
        ok = isinstance(value, (int, float)) and not isinstance(value, bool)
        value = float(value) if ok else value
    else:
        ok = type(value) is hint
    if not ok:
        raise ValueError(f"{where}: expected {hint}, got {value!r}")
    return value
