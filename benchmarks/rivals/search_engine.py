"""One engine of benchmarks/search.py, in the engine's own environment: `search_engine.py ENGINE build|search FOLDER`.

FOLDER holds `vectors.npy`, `columns.npz`, `questions.npz` and, of each engine, a folder by its name. `search` prints
what was measured as JSON. Only numpy and the engine itself are imported.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

K, ENOUGH = 10, 0.95


class Engine:
    """What all engines can do. A condition is {} or {"mag_r": limit} or {"cone": [...], "box": [...]}."""

    package = ""
    knobs: Sequence[int | None] = (None,)

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.place = folder, folder / name
        self.knob: int | None = None

    def vectors(self, mode: Any = "r") -> Any:
        return np.load(self.folder / "vectors.npy", mmap_mode=mode)

    def columns(self) -> Any:
        return np.load(self.folder / "columns.npz")

    def passing(self, condition: dict[str, Any]) -> Any:
        """Return which rows pass, by the columns in memory."""
        if "mag_r" in condition:
            return np.flatnonzero(self.mag_r < condition["mag_r"])
        ra, dec, radius = np.radians(condition["cone"])
        up, across = (self.dec - dec) / 2, (self.ra - ra) / 2
        near = np.sin(up) ** 2 + np.cos(dec) * np.cos(self.dec) * np.sin(across) ** 2
        return np.flatnonzero(near <= np.sin(radius / 2) ** 2)

    def load_columns(self) -> None:
        columns = self.columns()
        self.mag_r = columns["mag_r"]
        self.ra, self.dec = np.radians(columns["ra"]), np.radians(columns["dec"])

    def build(self) -> None:
        """Put all rows in, and save."""

    def open(self) -> None:
        """Make ready for searches."""

    def search(self, queries: Any, condition: dict[str, Any]) -> list[list[int]]:
        """Return the numbers of the nearest rows to each query, in one call of the engine's for all of them."""
        raise NotImplementedError


class Numpy(Engine):
    package = "numpy"

    def open(self) -> None:
        self.rows = self.vectors(None)
        self.load_columns()

    def search(self, queries: Any, condition: dict[str, Any]) -> list[list[int]]:
        some = self.passing(condition) if condition else None
        rows = self.rows if some is None else self.rows[some]
        found = []
        for start in range(0, len(queries), 16):
            alike = queries[start : start + 16] @ rows.T
            best = np.argpartition(-alike, min(K, alike.shape[1]) - 1, axis=1)[:, :K]
            best = np.take_along_axis(best, np.argsort(-np.take_along_axis(alike, best, 1), axis=1), 1)
            found += (best if some is None else some[best]).tolist()
        return found


class Faiss(Engine):
    package = "faiss-cpu"

    def index(self, dim: int) -> Any:
        import faiss

        return faiss.IndexFlatIP(dim)

    def build(self) -> None:
        import faiss

        vectors = self.vectors()
        index = self.index(vectors.shape[1])
        if not index.is_trained:
            index.train(np.ascontiguousarray(vectors[:: max(1, len(vectors) // 50_000)]))
        for start in range(0, len(vectors), 50_000):
            index.add(np.ascontiguousarray(vectors[start : start + 50_000]))
        self.place.mkdir()
        faiss.write_index(index, str(self.place / "index"))

    def open(self) -> None:
        import faiss

        self.found = faiss.read_index(str(self.place / "index"))
        self.load_columns()

    def parameters(self, selector: Any) -> Any:
        import faiss

        return faiss.SearchParameters(sel=selector)

    def search(self, queries: Any, condition: dict[str, Any]) -> list[list[int]]:
        import faiss

        selector = None
        if condition:
            marks = np.zeros(len(self.mag_r), bool)
            marks[self.passing(condition)] = True
            selector = faiss.IDSelectorBitmap(np.packbits(marks, bitorder="little"))
        return list(self.found.search(queries, K, params=self.parameters(selector))[1].tolist())


class FaissHnsw(Faiss):
    knobs = (32, 64, 128, 256, 512, 1024)

    def index(self, dim: int) -> Any:
        import faiss

        index = faiss.IndexHNSWFlat(dim, 16, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = 80
        return index

    def parameters(self, selector: Any) -> Any:
        import faiss

        return faiss.SearchParametersHNSW(sel=selector, efSearch=self.knob)


class Chroma(Engine):
    package = "chromadb"
    knobs = (100, 200, 400, 800)  # the first is its default

    def client(self) -> Any:
        import chromadb

        return chromadb.PersistentClient(str(self.place), chromadb.Settings(anonymized_telemetry=False))

    def build(self) -> None:
        client = self.client()
        rows = client.create_collection("rows", configuration={"hnsw": {"space": "cosine"}}, embedding_function=None)
        vectors, columns = self.vectors(), {name: values.tolist() for name, values in self.columns().items()}
        for start in range(0, len(vectors), 5000):
            part = range(start, min(start + 5000, len(vectors)))
            metadata: Any = [{name: columns[name][row] for name in columns} for row in part]
            rows.add(ids=[str(row) for row in part], embeddings=vectors[part.start : part.stop], metadatas=metadata)

    def open(self) -> None:
        self.rows = self.client().get_collection("rows", embedding_function=None)
        self.load_columns()
        self.set = 0

    def search(self, queries: Any, condition: dict[str, Any]) -> list[list[int]]:
        if self.knob != self.set:
            self.rows.modify(configuration={"hnsw": {"ef_search": self.knob}})
            self.set = self.knob or 0
        where: Any = None
        if "mag_r" in condition:
            where = {"mag_r": {"$lt": condition["mag_r"]}}
        elif condition:
            low_ra, high_ra, low, high = condition["box"]
            limits = (("ra", "$gte", low_ra), ("ra", "$lte", high_ra), ("dec", "$gte", low), ("dec", "$lte", high))
            where = {"$and": [{name: {sign: limit}} for name, sign, limit in limits]}
        count = 2 * K if "box" in condition else K
        found = self.rows.query(query_embeddings=queries, n_results=count, where=where, include=["metadatas"])
        return within(self, [[int(name) for name in names] for names in found["ids"]], condition)


class Qdrant(Engine):
    package = "qdrant-client"

    def build(self) -> None:
        from qdrant_client import QdrantClient, models

        client = QdrantClient(path=str(self.place))
        vectors, columns = self.vectors(), {name: values.tolist() for name, values in self.columns().items()}
        how = models.VectorParams(size=vectors.shape[1], distance=models.Distance.COSINE)
        client.create_collection("rows", vectors_config=how)
        for start in range(0, len(vectors), 1000):
            part = range(start, min(start + 1000, len(vectors)))
            payloads = [{name: columns[name][row] for name in columns} for row in part]
            batch = models.Batch(ids=list(part), vectors=vectors[part.start : part.stop].tolist(), payloads=payloads)
            client.upsert("rows", batch)
        client.close()

    def open(self) -> None:
        from qdrant_client import QdrantClient

        self.client = QdrantClient(path=str(self.place))
        self.load_columns()

    def search(self, queries: Any, condition: dict[str, Any]) -> list[list[int]]:
        from qdrant_client import models

        limits = {}
        if "mag_r" in condition:
            limits = {"mag_r": models.Range(lt=condition["mag_r"])}
        elif condition:
            low_ra, high_ra, low, high = condition["box"]
            limits = {"ra": models.Range(gte=low_ra, lte=high_ra), "dec": models.Range(gte=low, lte=high)}
        must: Any = [models.FieldCondition(key=name, range=limit) for name, limit in limits.items()]
        count = 2 * K if "box" in condition else K
        asked = [
            models.QueryRequest(query=query.tolist(), limit=count, filter=models.Filter(must=must), with_payload=True)
            for query in queries
        ]
        found = self.client.query_batch_points("rows", asked)
        return within(self, [[int(point.id) for point in each.points] for each in found], condition)


class Galembed(Engine):
    package = "galembed"
    kind = "auto"

    def build(self) -> None:
        """Only the indexes: benchmarks/search.py writes the rows."""
        from galembed.store import open_store
        from galembed.store.index import build_index

        report = build_index(open_store(self.place), self.kind, recall=ENOUGH)
        print(report, file=sys.stderr)

    def open(self) -> None:
        from galembed.store import open_store

        self.store = open_store(self.place)

    def search(self, queries: Any, condition: dict[str, Any]) -> list[list[int]]:
        asked: dict[str, Any] = {}
        if "mag_r" in condition:
            asked = {"where": f"mag_r < {condition['mag_r']!r}"}
        elif condition:
            ra, dec, radius = condition["cone"]
            asked = {"cone": (ra, dec, radius * 3600)}
        if len(queries) == 1:
            return [self.store.similar(queries[0], K, **asked)["source_id"].astype(int).tolist()]
        hits = self.store.similar_to_each(queries, K, **asked)
        numbers, query = hits["source_id"].astype(int), hits["query"]
        return [numbers[query == row].tolist() for row in range(len(queries))]


class GalembedHnsw(Galembed):
    kind = "hnsw"


class GalembedRq(Galembed):
    kind = "rq"


class GalembedExact(Galembed):
    kind = "exact"


ENGINES = {
    "galembed": Galembed,
    "galembed-hnsw": GalembedHnsw,
    "galembed-rq": GalembedRq,
    "galembed-exact": GalembedExact,
    "numpy": Numpy,
    "faiss-flat": Faiss,
    "faiss-hnsw": FaissHnsw,
    "chromadb": Chroma,
    "qdrant": Qdrant,
}


def within(engine: Engine, found: list[list[int]], condition: dict[str, Any]) -> list[list[int]]:
    """Return the nearest that lie in the cone: engines without cones were asked for the box around it."""
    if "box" not in condition:
        return found
    inside = set(engine.passing(condition).tolist())
    return [[row for row in rows if row in inside][:K] for rows in found]


def recall(found: list[list[int]], truth: Any) -> float:
    """Return the share of the true nearest that was found; `truth` may go on beyond the queries of `found`."""
    true = [set(rows) - {-1} for rows in truth[: len(found)].tolist()]
    return sum(len(each & set(rows)) for each, rows in zip(true, found, strict=True)) / sum(map(len, true))


def measure(engine: Engine) -> dict[str, Any]:
    """Return recall and seconds of each condition, by one query a call and by all in one."""
    asked = np.load(engine.folder / "questions.npz")
    queries = asked["queries"]
    conditions = json.loads((engine.folder / "conditions.json").read_text())
    start = time.perf_counter()
    engine.open()
    engine.knob = engine.knobs[0]
    engine.search(queries[:1], {})
    opened = time.perf_counter() - start
    results = {}
    for name, condition in conditions.items():
        for knob in engine.knobs:
            engine.knob = knob
            few = len(engine.knobs) == 1
            if recall(engine.search(queries[: 1 if few else None], condition), asked[name]) >= ENOUGH or few:
                break
        singles, seconds = [], []
        for row in range(len(queries)):
            start = time.perf_counter()
            singles += engine.search(queries[row : row + 1], condition)
            seconds.append(time.perf_counter() - start)
            if row >= 19 and sum(seconds) > 10:
                break
        many = queries[: len(seconds)]
        start = time.perf_counter()
        batch = engine.search(many, condition)
        batched = time.perf_counter() - start
        results[name] = {
            "knob": engine.knob,
            "recall": recall(singles, asked[name]),
            "recall_batched": recall(batch, asked[name]),
            "p50": float(np.quantile(seconds, 0.5)),
            "p95": float(np.quantile(seconds, 0.95)),
            "qps": len(seconds) / sum(seconds),
            "batched": batched / len(many),
        }
    return {"opened": opened, "version": version(engine.package), "conditions": results}


def main() -> None:
    name, action, folder = sys.argv[1:]
    engine = ENGINES[name](Path(folder), name)
    if action == "build":
        start = time.perf_counter()
        engine.build()
        print(json.dumps({"seconds": time.perf_counter() - start}))
    else:
        print(json.dumps(measure(engine)))


if __name__ == "__main__":
    main()
