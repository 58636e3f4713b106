"""The offline page: what it holds, that it fetches nothing, and that its rank lists are right."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from fastreid_vi import _reported, figures
from fastreid_vi.config import Batch
from fastreid_vi.evaluation import Embeddings, Evaluation, RankMetrics
from fastreid_vi.figures import Curve, MissingExtra
from fastreid_vi.ranklists import distances, location, pick_queries, rank_list
from fastreid_vi.report import (
    PatternMaps,
    ReportedRun,
    Translations,
    build_report,
    pattern_map_tiles,
    translation_tiles,
)

PERSONS = (3, 5, 9, 14)
SETTINGS = ("all/1", "all/10", "indoor/1", "indoor/10")


class Page(HTMLParser):
    """Collects what a test asks about."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def embeddings(root: Path, cams: tuple[int, ...], seed: int) -> Embeddings:
    """Two images of every person in every camera; features near the person's own direction."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(20, 16))
    paths, ids, columns = [], [], []
    for cam in cams:
        for person in PERSONS:
            for number in (1, 2):
                path = root / f"cam{cam}/{person:04d}/{number:04d}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = np.full((24, 12, 3), 10 * person + cam, dtype=np.uint8)
                Image.fromarray(pixels).save(path)
                paths.append(path.relative_to(root).as_posix())
                ids.append(person)
                columns.append(cam)
    features = centres[ids] + 1.5 * random.normal(size=(len(ids), 16))
    return Embeddings(features.astype(np.float32), np.array(ids), np.array(columns), tuple(paths))


def metrics(first: float) -> RankMetrics:
    cmc = 1 - (1 - first) * np.exp(-np.arange(20) / 5)
    return RankMetrics(cmc, first - 0.05, first - 0.2, np.ones(8, dtype=bool))


def run(root: Path, name: str = "mpanet", first: float = 0.724, **changes: Any) -> ReportedRun:
    epochs = np.arange(1.0, 6.0)
    values: dict[str, Any] = {
        "name": name,
        "facts": {"Method": "mpanet, ResNet-18", "Protocol": "sysu-official: 10 trials"},
        "commands": ("fastreid-vi train --recipe runs/x/run.json",),
        "results": {s: Evaluation(metrics(first), metrics(0.21), []) for s in SETTINGS},
        "chance": {s: metrics(0.231) for s in SETTINGS},
        "losses": {"total": Curve(epochs, 5 / epochs), "identity": Curve(epochs, 2 / epochs)},
        "validation": {"R1": Curve(epochs[::2], epochs[::2] / 10)},
        "query": embeddings(root, (3, 6), 1),
        "gallery": embeddings(root, (1, 2, 4, 5), 2),
        "shown_name": "all-search, single shot, trial 1",
        "image_root": root,
        "maps": PatternMaps(
            [np.zeros((24, 12, 3), np.uint8)],
            np.linspace(0, 1, 72).reshape(1, 6, 4, 3),
            ["IR, id 3"],
        ),
    }
    return ReportedRun(**{**values, **changes})


# Nothing that is drawn as a chart: such pages are made in no time.
LISTS_ONLY: dict[str, Any] = {
    "results": {},
    "chance": {},
    "losses": {},
    "validation": {},
    "maps": None,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("report")
    runs = [run(folder, "baseline", 0.5), run(folder)]
    return build_report(runs, folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(source: str) -> Page:
    return Page(source)


def test_nothing_is_fetched(page: Page, source: str) -> None:
    for tag, attrs in page.tags:
        for name in ("src", "href", "srcset", "xlink:href", "data", "action"):
            target = attrs.get(name) or ""
            assert target.startswith(("data:", "#")) or not target, (tag, name, target)
    assert not {"link", "script", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert "@import" not in source
    assert not re.search(r"url\((?!#)", source)


def test_every_picture_has_a_description(page: Page) -> None:
    images, drawings = page.of("img"), page.of("svg")
    assert len(images) > 50
    assert len(drawings) == 4  # losses, validation, CMC, distances
    assert all(len(image["alt"] or "") > 5 for image in images)
    assert all(drawing["role"] == "img" and drawing["aria-label"] for drawing in drawings)


def test_drawings_share_the_page_without_clashing_ids(page: Page, source: str) -> None:
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r"url\(#([^)]+)\)", source)) | set(re.findall(r'href="#([^"]+)"', source))
    assert used
    assert used <= set(ids)


def test_the_table_shows_every_number(page: Page) -> None:
    text = " ".join(" ".join(page.text).split())
    for mode in ("all", "indoor"):
        for shots in ("single shot", "10 shots"):
            assert f"{mode}-search, {shots}" in text
    for column in ("R1", "R5", "R10", "R20", "mAP", "mINP"):
        assert column in text
    assert text.count("72.4 ± 21.0") == 4  # R1 of mpanet, four settings
    assert text.count("67.4 ± 16.0") == 4  # its mAP
    assert text.count("chance 23.1") == 4
    assert "fastreid-vi train --recipe runs/x/run.json" in text


def test_the_best_number_is_marked(source: str) -> None:
    assert "<b>72.4 <small>" in source
    assert "<b>50.0 <small>" not in source


def test_names_are_escaped(tmp_path: Path) -> None:
    runs = [run(tmp_path, "<script>&", facts={"<i>": '"<u>'})]
    text = build_report(runs, tmp_path / "r.html", title="<b>").read_text(encoding="utf-8")
    assert "<script>" not in text
    assert "<i>" not in text
    assert "&lt;script&gt;&amp;" in text


def test_missing_parts_leave_their_section_out(tmp_path: Path) -> None:
    path = build_report([ReportedRun(name="bare")], tmp_path / "r.html")
    assert "<section>" not in path.read_text(encoding="utf-8")
    only = ReportedRun(name="curves", losses={"total": Curve(np.ones(1), np.ones(1))})
    page = Page(build_report([only], path).read_text(encoding="utf-8"))
    assert len(page.of("section")) == 1


def test_same_records_same_page(tmp_path: Path) -> None:
    first = build_report([run(tmp_path)], tmp_path / "a.html").read_bytes()
    assert build_report([run(tmp_path)], tmp_path / "b.html").read_bytes() == first


def test_a_failed_page_leaves_the_earlier_one(tmp_path: Path) -> None:
    damaged = run(tmp_path, **LISTS_ONLY)
    path = build_report([damaged], tmp_path / "r.html")
    before = path.read_bytes()
    (tmp_path / "cam6/0003/0001.jpg").write_bytes(b"not an image")
    (tmp_path / "cam3/0003/0001.jpg").unlink()
    with pytest.raises(OSError, match=r"0001\.jpg"):
        build_report([damaged], path, queries=100)
    assert path.read_bytes() == before
    assert not list(tmp_path.glob("*.part"))


def test_names_must_differ(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="runs: expected at least one"):
        build_report([], tmp_path / "r.html")
    with pytest.raises(ValueError, match="distinct"):
        build_report([ReportedRun(name="a"), ReportedRun(name="a")], tmp_path / "r.html")


def test_without_matplotlib_the_message_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match=r"pip install 'fastreid-vi\[report\]'"):
        build_report([run(tmp_path)], tmp_path / "r.html")


@pytest.mark.parametrize("row", range(16))
def test_rank_lists_follow_the_distances(tmp_path: Path, row: int) -> None:
    shown = np.arange(0, 32, 2)
    record = run(tmp_path, shown=shown)
    query, gallery = record.query, record.gallery
    assert query is not None
    assert gallery is not None
    tiles = rank_list(record, row, top=10)
    assert tiles[0].correct is None
    assert f"id {query.ids[row]}" in tiles[0].lines
    rank = distances(query.features[row : row + 1], gallery.features[shown])[0]
    # Camera 2 hangs in the room of camera 3.
    kept = [i for i in range(16) if not (query.cams[row] == 3 and gallery.cams[shown[i]] == 2)]
    order = sorted(kept, key=lambda i: (rank[i], i))[:10]
    assert len(tiles) == 11
    for tile, i in zip(tiles[1:], order, strict=True):
        found = gallery.ids[shown[i]]
        assert tile.correct == (found == query.ids[row])
        assert tile.lines[1:] == (
            f"VIS cam {gallery.cams[shown[i]]}",
            f"id {found}",
            f"{rank[i]:.3f}",
        )
        assert (tile.image == 10 * found + gallery.cams[shown[i]]).mean() > 0.9


def test_a_short_gallery_gives_a_short_list(tmp_path: Path) -> None:
    record = run(tmp_path, shown=np.array([0, 8, 9]))  # one image of camera 1, two of camera 2
    assert len(rank_list(record, 0)) == 2  # query of camera 3: camera 2 is left out
    assert len(rank_list(record, 8)) == 4


def test_rank_lists_need_the_images_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="image_root"):
        rank_list(run(tmp_path, image_root=None), 0)


def test_locations() -> None:
    assert location(np.array([1, 2, 3, 4, 5, 6])).tolist() == [1, 2, 2, 4, 5, 6]


def test_picked_queries() -> None:
    score = np.linspace(0, 1, 30)
    valid = np.ones(30, dtype=bool)
    valid[29] = False
    picked = pick_queries(score, valid, 3, seed=0)
    assert picked == {"best": [28, 27, 26], "median": [15, 14, 13], "worst": [2, 1, 0]}
    two_runs = pick_queries(np.stack([score, 1 - score]), valid, 3, seed=0)
    assert two_runs == pick_queries(np.zeros(30), valid, 3, seed=0)  # ties everywhere
    assert two_runs != pick_queries(np.zeros(30), valid, 3, seed=1)


@pytest.mark.parametrize("count", range(8))
def test_few_queries_are_shown_once(count: int) -> None:
    picked = pick_queries(np.zeros(count), np.ones(count, dtype=bool), 3, seed=0)
    rows = [row for kind in picked.values() for row in kind]
    assert len(rows) == len(set(rows))
    assert bool(rows) == bool(count)


def test_runs_on_other_images_get_their_own_lists(tmp_path: Path) -> None:
    other = tmp_path / "other"
    first, second = run(tmp_path, "one", **LISTS_ONLY), run(other, "two", **LISTS_ONLY)
    assert first.query is not None
    moved = first.query._replace(paths=tuple(reversed(first.query.paths)))
    third = run(tmp_path, "two", **{**LISTS_ONLY, "query": moved})
    text = build_report([first, third], tmp_path / "r.html").read_text()
    assert text.count("<h3>Best queries</h3>") == 2
    text = build_report([first, second], tmp_path / "r.html").read_text()
    assert text.count("<h3>Best queries</h3>") == 1


def test_choosing_on_the_test_is_said(tmp_path: Path, source: str) -> None:
    assert "TEST split" not in source
    text = build_report([run(tmp_path, validation_split="test")], tmp_path / "r.html").read_text()
    assert "for mpanet on the TEST split" in text


def test_figures_are_for_papers_too(tmp_path: Path) -> None:
    curves = {
        "a": {
            "x": Curve(np.arange(3), np.ones(3), np.ones(3)),
            "y": Curve(np.arange(3), np.ones(3)),
        }
    }
    drawn = figures.small_multiples(curves, percent=True)
    assert isinstance(drawn, Figure)
    assert [axis.get_title(loc="left") for axis in drawn.axes[:2]] == ["x, %", "y, %"]
    record = run(tmp_path)
    rows = [rank_list(record, row) for row in (0, 9)]
    assert len(figures.tile_rows(rows).axes) == 22
    assert len(figures.tile_rows(pattern_map_tiles(record.maps)).axes) == 7  # type: ignore[arg-type]
    figures.tile_rows(rows).savefig(tmp_path / "ranks.png")
    assert Image.open(tmp_path / "ranks.png").width > 500
    with pytest.raises(ValueError, match="at least one panel"):
        figures.small_multiples({})


def test_overlay_is_hot_where_the_map_is() -> None:
    image = np.full((40, 20, 3), 90, dtype=np.uint8)
    attention = np.zeros((4, 2))
    attention[3, 1] = 5.0
    shown = figures.overlay(image, attention)
    assert shown.shape == image.shape
    assert shown.dtype == np.uint8
    assert shown[38, 18].astype(int).sum() > shown[2, 2].astype(int).sum() + 100
    assert np.array_equal(shown[0, 0], image[0, 0])
    flat = figures.overlay(image, np.full((4, 2), 0.3))
    assert np.array_equal(flat, image)


def test_translations_have_rows_of_their_own(tmp_path: Path) -> None:
    pictures = np.arange(6, dtype=np.uint8).reshape(2, 3, 1, 1, 1) * np.ones((24, 12, 3), np.uint8)
    translations = Translations(pictures, ["IR cam 3, id 5", "VIS cam 1, id 5"])
    rows = translation_tiles(translations)
    assert [[int(tile.image[0, 0, 0]) for tile in row] for row in rows] == [[0, 1, 2], [3, 4, 5]]
    assert rows[1][0].lines == ("VIS cam 1", "id 5")
    assert rows[0][2].alt == "IR cam 3, id 5, and back"
    record = run(tmp_path, **{**LISTS_ONLY, "translations": translations})
    page = Page(build_report([record], tmp_path / "r.html").read_text(encoding="utf-8"))
    assert page.text.count("Translations") == 1
    alts = [image["alt"] for image in page.of("img")]
    assert [a for a in alts if a and a.endswith("and back")] == [row[2].alt for row in rows]


def test_a_method_that_translates_is_shown(tmp_path: Path) -> None:
    Image.new("RGB", (12, 24)).save(tmp_path / "a.png")

    class Translates:
        def preview(self, images: torch.Tensor, modality: torch.Tensor) -> torch.Tensor:
            return torch.stack([images, -images, 0 * images + modality[0]], dim=1)

    images = torch.linspace(-1, 1, 3)[None, :, None, None].expand(1, 3, 4, 2)
    one = torch.ones(1, dtype=torch.int64)
    shown = [_reported.Shown(Batch(images, one, one, one), tmp_path / "a.png", "IR cam 3, id 5")]
    found = _reported.translations(Translates(), shown)  # type: ignore[arg-type]
    assert found is not None
    assert found.pictures.shape == (1, 3, 4, 2, 3)
    assert found.pictures.dtype == np.uint8
    assert found.pictures[0, :, 0, 0].tolist() == [[0, 128, 255], [255, 128, 0], [255] * 3]
    assert found.captions == ["IR cam 3, id 5"]
    assert _reported.translations(torch.nn.Identity(), shown) is None  # type: ignore[arg-type]
    assert _reported.pattern_maps(Translates(), shown) is None  # type: ignore[arg-type]


def test_ink_takes_the_colour_of_the_page() -> None:
    drawn = figures.cmc_curves({"all/1": {"a": Curve(np.arange(1, 21), np.linspace(0, 1, 20))}})
    svg = figures.to_svg(drawn, identifier="x", alt='"quoted"')
    assert svg.startswith('<svg role="img" aria-label="&quot;quoted&quot;"')
    assert "currentColor" in svg
    assert figures.INK not in svg
