"""Which re-ranking belongs to which embeddings, what it takes and what is said beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple

import numpy as np

from fastreid_vi import evaluation
from fastreid_vi.evaluation import Embeddings, llcm_galleries, sysu_galleries

Asked = Literal["auto", "none", "k-reciprocal", "mser"]

K_RECIPROCAL: Final[Mapping[str, Any]] = {"k1": 20, "k2": 6, "weight": 0.3, "neighbors": "all"}
MSER: Final[Mapping[str, Any]] = {"k1": 40, "k2": 20, "weight": 0.3, "neighbors": "queries"}
# (method, data set) -> what the released code of a method does there.
OFFICIAL: Final[Mapping[tuple[str, str], tuple[str, Mapping[str, Any]]]] = {
    ("mpanet", "sysu"): ("k-reciprocal", {**K_RECIPROCAL, "neighbors": "queries"}),
    ("mpanet", "regdb"): ("k-reciprocal", K_RECIPROCAL),
    ("mcja", "sysu"): ("mser", MSER),
    ("mcja", "regdb"): ("mser", {"k1": 50, "k2": 10, "weight": 0.2, "neighbors": "all"}),
}
SHARED = (
    "the neighbours of an image are looked for among the other queries: the result of one query "
    "depends on all of them, which single queries do not have"
)
WHOLE = (
    "queries and gallery together are searched for neighbours: the result of one query depends on "
    "the other queries"
)


class RerankError(ValueError):
    """Embeddings cannot be re-ranked so; one line that says why."""


class Reranking(NamedTuple):
    """A procedure, and what is said about it."""

    name: str
    """"k-reciprocal" or "mser"."""
    parameters: Mapping[str, Any]
    """k1, k2, weight, neighbors."""
    spectra: tuple[str, ...]
    """Feature sets of the visible side; empty for k-reciprocal."""
    source: str
    """Whose choice this is."""
    procedure: Any
    """For `rerank=` of the protocols."""
    memory: int
    """Bytes it takes, stated before it starts."""

    @property
    def note(self) -> str:
        """What must be said beside its numbers."""
        return SHARED if self.parameters["neighbors"] == "queries" else WHOLE

    def facts(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "method": self.name,
            **self.parameters,
            "expand": self.name == "k-reciprocal",
            "spectra": list(self.spectra),
            "source": self.source,
            "memory_bytes": self.memory,
            "note": self.note,
        }

    def text(self) -> str:
        """Name and parameters for people."""
        p = self.parameters
        mode = "masked" if p["neighbors"] == "queries" else "full"
        spectra = f", spectra {', '.join(self.spectra)}" if self.spectra else ", local expansion"
        return (
            f"re-ranked by {self.name} ({self.source}): k1 {p['k1']}, k2 {p['k2']}, "
            f"weight {p['weight']}{spectra}, {mode}:\n{self.note}"
        )


def choose(
    asked: Asked,
    query: Embeddings,
    gallery: Embeddings,
    *,
    changes: Mapping[str, Any] | None = None,
    images: int | None = None,
) -> Reranking | None:
    """The re-ranking of query and gallery.

    Args:
        asked: "auto" takes what the method's authors do on this data set, k-reciprocal encoding for
            the other methods.
        query, gallery: infrared and visible embeddings.
        changes: other values of k1, k2, weight, neighbors.
        images: largest gallery that is searched at once; found out from the protocol by default.
    Returns:
        None for "none".
    Raises:
        RerankError: MSER without further spectra, a value out of range.
    """
    if asked == "none":
        return None
    name, parameters, source = _chosen(asked, gallery)
    parameters = {**parameters, **(changes or {})}
    if changes:
        source = "as asked for"
    further = dict(gallery.spectra or {})
    if name == "mser" and not further:
        raise RerankError(
            "mser: needs further spectra of the visible images; fastreid-vi embed --spectra keeps "
            "them, --rerank k-reciprocal does without"
        )
    spectra = ("original", *further) if name == "mser" else ()
    if name == "mser":
        procedure = evaluation.MultiSpectral(spectra=list(further.values()), **parameters)
    else:
        procedure = evaluation.KReciprocal(**parameters)
    most = images if images is not None else largest_gallery(query, gallery)
    memory = memory_of(name, parameters, query, gallery, most, max(1, len(spectra)))
    return Reranking(name, parameters, spectra, source, procedure, memory)


def _chosen(asked: str, gallery: Embeddings) -> tuple[str, Mapping[str, Any], str]:
    official = OFFICIAL.get((gallery.method or "", gallery.dataset or ""))
    if official is not None and asked in ("auto", official[0]):
        return (*official, f"as {gallery.method}'s authors do on {gallery.dataset}")
    if asked == "mser" or (asked == "auto" and gallery.method == "mcja" and gallery.spectra):
        return "mser", MSER, "as MCJA's authors do on sysu"
    return "k-reciprocal", K_RECIPROCAL, "as published"


def largest_gallery(query: Embeddings, gallery: Embeddings) -> int:
    """Images of the largest gallery that the protocol searches at once."""
    if gallery.dataset == "sysu" and gallery.permutations is not None:
        rows = sysu_galleries(gallery, gallery.permutations, mode="all", shots=10, trials=1)[0]
        return len(rows)
    return max(len(query.ids), len(gallery.ids))


def memory_of(
    name: str,
    parameters: Mapping[str, Any],
    query: Embeddings,
    gallery: Embeddings,
    images: int,
    spectra: int,
) -> int:
    """Bytes that a procedure takes beside the features."""
    dim = int(np.shape(gallery.features)[1])
    return int(
        evaluation.rerank_memory(
            len(query.ids), images, dim, spectra=spectra, neighbors=parameters["neighbors"]
        )
    )


def size_text(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{max(1, round(count / 2**20))} MiB"


def changes_of(args: Any) -> dict[str, Any]:
    """The parameters that flags change."""
    names = ("k1", "k2", "weight", "neighbors")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def gallery_rows(gallery: Embeddings, setting: str, trial: int) -> Sequence[int] | Any:
    """Rows of the gallery that a setting searches in a trial, from 1.

    Raises:
        RerankError: the data set has no such setting.
    """
    mode, _, shots = setting.partition("/")
    if gallery.dataset == "sysu" and gallery.permutations is not None and shots in ("1", "10"):
        if mode in ("all", "indoor"):
            of: Any = {"mode": mode, "shots": int(shots), "trials": trial}
            return sysu_galleries(gallery, gallery.permutations, **of)[-1]
    elif gallery.dataset == "llcm" and setting == "drawn":
        return llcm_galleries(gallery, trial)[-1]
    raise RerankError(
        f"--setting {setting}: expected all/1, all/10, indoor/1 or indoor/10 of SYSU-MM01, or "
        f"drawn of LLCM, got embeddings of {gallery.dataset!r}"
    )
