"""docs/vector-databases.md: what needs no server runs; the rest is Python that reads its files."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastreid_vi.evaluation import Embeddings, save_embeddings, search

PAGE = Path(__file__).parent.parent.parent / "docs" / "vector-databases.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
SERVERS = {"psycopg", "qdrant_client", "pymilvus"}


def imports(block: str) -> set[str]:
    nodes = list(ast.walk(ast.parse(block)))
    froms = {node.module.split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
    return froms | {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names}


def of_client(name: str) -> str:
    (block,) = (block for block in BLOCKS if name in imports(block))
    return block


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """The page's first block has run in a folder of embeddings."""
    generator = np.random.default_rng(0)
    query, gallery = generator.standard_normal((5, 8)), generator.standard_normal((60, 8))
    gallery[7] = 0
    ids = np.arange(60) % 9
    monkeypatch.chdir(tmp_path)
    save_embeddings(
        "embeddings",
        query=Embeddings(query, ids[:5], ids[:5] + 1, [f"q/{i}.jpg" for i in range(5)]),
        gallery=Embeddings(gallery, ids, ids + 1, [f"g/{i}.jpg" for i in range(60)]),
    )
    exec(BLOCKS[0], {})
    return query.astype(np.float32), gallery.astype(np.float32)


def test_the_arrays(written: tuple[Any, Any]) -> None:
    query, gallery = written
    features = np.load("vectors/features.npy")
    assert features.dtype == np.float32
    lengths = np.linalg.norm(features, axis=1)
    np.testing.assert_allclose(np.delete(lengths, 7), 1, rtol=1e-6)
    assert lengths[7] == 0
    rows = [json.loads(line) for line in Path("vectors/rows.jsonl").read_text().splitlines()]
    assert len(rows) == 60
    assert rows[11] == {"image": 11, "path": "g/11.jpg", "person": 2, "camera": 3}
    same = search(query, features, 5, metric="inner").indices
    assert np.array_equal(same, search(query, gallery, 5).indices)


def test_recall_is_measured(written: tuple[Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = (block for block in BLOCKS if "def recall" in block)
    scope: dict[str, Any] = {}
    exec(block, scope)
    assert capsys.readouterr().out == "1.0\n"
    wrong = np.where(np.arange(10) < 3, -1, scope["found"])
    assert scope["recall"](wrong, scope["query"], scope["gallery"]) == pytest.approx(0.7)


@pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="needs the extra faiss")
def test_the_index_in_a_file(written: tuple[Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = (block for block in BLOCKS if "build_index" in block)
    exec(block, {})
    assert float(capsys.readouterr().out) > 0.9
    assert Path("gallery.index").is_file()


@pytest.mark.parametrize("client", sorted(SERVERS))
def test_clients_read_what_is_written(client: str) -> None:
    block = of_client(client)
    names = re.findall(r'"(vectors/[^"]+)"', block)
    assert set(names) == {"vectors/features.npy", "vectors/rows.jsonl"}
    assert imports(block) == {"json", "numpy", client}
    keys = set(re.findall(r'row\["(\w+)"\]', block))
    assert keys <= {"image", "path", "person", "camera"}
    assert all(len(line) <= 100 for line in block.splitlines())


def test_every_block_is_checked() -> None:
    free = [block for block in BLOCKS if not imports(block) & SERVERS]
    assert len(free) == 3
    assert len(BLOCKS) == 6
