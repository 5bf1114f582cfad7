"""Moving a store to another backbone: what changed, probes fitted again, and the switch. See `docs/migration.md`."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from galembed.errors import ArtifactMismatch, BadRequest
from galembed.files import is_url
from galembed.neighbours import nearest_others
from galembed.probes import Probe, Report, load_probe, refit_probe, save_probe
from galembed.probes.reports import markdown_table
from galembed.store import Store, matrix, open_store
from galembed.store.places import read_json, write_json

JOURNAL: Final = "migration.json"
"""Where a store that took another's place came from."""

NEIGHBOURS: Final = 10
QUERIES: Final = 1_000
GALLERY: Final = 100_000
"""Sources among which neighbours are looked for; drawn at random where there are more."""

_SHOWN: Final = 10
_QUANTILES: Final = (0.05, 0.25, 0.5, 0.75, 0.95)
_ID_LETTERS: Final = 8


@dataclass(frozen=True)
class Coverage:
    """What the new store has settled of the old one's sources.

    Attributes
    ----------
    sources : int
        Settled in the old store: embedded or failed.
    embedded : int
        Embedded in both.
    lost, gained : int
        Embedded in the old store and failed in the new one; the other way round.
    extra : int
        Settled in the new store alone.
    lost_keys : tuple of str
        Some of the lost ones.
    """

    sources: int
    embedded: int
    lost: int
    gained: int
    extra: int
    lost_keys: tuple[str, ...]


@dataclass(frozen=True)
class Overlap:
    """How alike the neighbours of sources are in both stores.

    Attributes
    ----------
    queries, gallery : int
        Sources asked about, and among which neighbours were looked for.
    mean : float
        Share of the 10 nearest in the old store that are among the 10 nearest in the new one.
    quantiles : mapping of float to float
        Of that share, over the sources.
    changed : float
        Share of the sources of which another one is the nearest now.
    chance : float
        Mean of two random choices.
    """

    queries: int
    gallery: int
    mean: float
    quantiles: dict[float, float]
    changed: float
    chance: float


@dataclass(frozen=True)
class Refitted:
    """A probe on both stores, fitted to the same labels: those of sources that both have embedded.

    Attributes
    ----------
    name : str
    old, new : Report
    out : Path
        Where the new probe is.
    """

    name: str
    old: Report
    new: Report
    out: Path


@dataclass(frozen=True)
class Migration:
    """What moving a store to another backbone changes; `str` gives Markdown.

    `pictures_lost` says that the old store keeps thumbnails and the new one none.
    """

    old: str
    new: str
    old_id: str
    new_id: str
    coverage: Coverage
    overlap: Overlap
    probes: tuple[Refitted, ...]
    pictures_lost: bool

    def __str__(self) -> str:
        found, near = self.coverage, self.overlap
        lines = [
            f"# From {self.old} to {self.new}",
            "",
            f"Backbone {self.old_id[:12]} to {self.new_id[:12]}. All {found.sources:,} sources of the old store are "
            f"settled in the new one; {found.embedded:,} are embedded in both.",
            "",
        ]
        if found.lost:
            lines += [f"- {found.lost:,} were embedded and failed now: {', '.join(found.lost_keys)}{_more(found.lost)}"]
        if found.gained:
            lines += [f"- {found.gained:,} had failed and are embedded now"]
        if found.extra:
            lines += [f"- {found.extra:,} are in the new store alone"]
        if self.pictures_lost:
            lines += ["- the old store keeps thumbnails and the new one none; `galembed embed --thumbnails` makes them"]
        if lines[-1]:
            lines.append("")
        quantiles = ", ".join(f"{share:.0%}: {value:.2f}" for share, value in near.quantiles.items())
        lines += [
            f"Of the {NEIGHBOURS} nearest neighbours {near.mean:.1%} stayed (by chance {near.chance:.1%}); quantiles "
            f"over sources {quantiles}. The nearest one changed for {near.changed:.1%}. {near.queries:,} sources, "
            f"neighbours among {near.gallery:,}.",
            "",
        ]
        if self.probes:
            lines += markdown_table(
                ("probe", "score", "old", "new", "labels", "written to"),
                [(one.name, *_scores(one), one.old.count, one.out) for one in self.probes],
            )
            lines.append("Scores by cross-validation on labels of sources that both stores have embedded.")
        return "\n".join(lines).rstrip()


def compare_stores(
    old: str | Path,
    new: str | Path,
    probes: Sequence[tuple[str | Path, str | Path]] = (),
    *,
    seed: int = 0,
) -> Migration:
    """Compare a store with one of the same sources by another backbone, and fit probes again.

    Parameters
    ----------
    old, new : str or Path
        Stores; `new` was made by ``galembed embed`` of the same sources.
    probes : sequence of (probe, out)
        Folders of probes of the old store, and those for the new ones.
    seed : int
        Of the sample of sources.

    Raises
    ------
    ArtifactNotFound, ArtifactMismatch
        If a store or probe is absent, or a probe is of another backbone.
    BadRequest
        If both stores are of one backbone, a source of the old store is not settled in the new one, or a probe keeps no
        labels.
    """
    before, after = open_store(old), open_store(new)
    old_id, new_id = before.contract.embedding_id, after.contract.embedding_id
    if old_id == new_id and before.contract.numeric_class == after.contract.numeric_class:
        raise BadRequest(f"{old} and {new} are of one backbone, {old_id[:12]}; nothing is to be moved")
    loaded = [(load_probe(path), Path(out)) for path, out in probes]
    for probe, _ in loaded:
        probe.require_store(before)
        probe.require_labels()
    found, shared = _require_settled(before, after)
    if not found.embedded:
        raise BadRequest(f"no source is embedded in both {old} and {new}")
    overlap = _overlap(before, after, shared, seed)
    refitted = tuple(_refit(before, after, probe, shared, out) for probe, out in loaded)
    pictures_lost = bool(before.contract.thumbnails) and not after.contract.thumbnails
    return Migration(str(old), str(new), old_id, new_id, found, overlap, refitted, pictures_lost)


def _more(count: int) -> str:
    return f" and {count - _SHOWN:,} more" if count > _SHOWN else ""


def _scores(one: Refitted) -> tuple[str, str, str]:
    """Return the name of a probe's score, and its values on both stores."""
    return one.old.score_name, one.old.score, one.new.score


def _require_settled(before: Store, after: Store) -> tuple[Coverage, pa.Array]:
    """Return what is settled in both, and the joined keys of what is embedded in both, or raise BadRequest."""
    found, missing, shared = _coverage(before, after)
    if missing.num_rows:
        keys = [f"{row['survey']}:{row['source_id']}" for row in missing.slice(0, _SHOWN).to_pylist()]
        raise BadRequest(
            f"{after.path} has not settled {missing.num_rows:,} of the {found.sources:,} sources of {before.path}: "
            f"{', '.join(keys)}{_more(missing.num_rows)}; run `galembed embed` of the same sources with --store "
            f"{after.path} until it is through"
        )
    return found, shared


def _coverage(before: Store, after: Store) -> tuple[Coverage, pa.Table, pa.Array]:
    """Return what is settled in both, the keys that the new store lacks, and those that are embedded in both."""
    from galembed.store.keys import joined_key, keys

    old, new = keys(before.path), keys(after.path)
    embedded, failed = joined_key(old.embedded), joined_key(old.failed)
    now_embedded, now_failed = joined_key(new.embedded), joined_key(new.failed)
    settled = pa.concat_arrays([embedded, failed])
    now_settled = pa.concat_arrays([now_embedded, now_failed])
    rows = pa.concat_tables([table.select(["survey", "source_id"]) for table in (old.embedded, old.failed)])
    lost = embedded.filter(pc.is_in(embedded, value_set=now_failed))
    return (
        Coverage(
            sources=len(settled),
            embedded=_count(embedded, now_embedded),
            lost=len(lost),
            gained=_count(failed, now_embedded),
            extra=len(now_settled) - _count(now_settled, settled),
            lost_keys=tuple(key.replace("\x1f", ":") for key in lost.slice(0, _SHOWN).to_pylist()),
        ),
        rows.filter(pc.invert(pc.is_in(settled, value_set=now_settled))),
        embedded.filter(pc.is_in(embedded, value_set=now_embedded)),
    )


def _count(keys: pa.Array, others: pa.Array) -> int:
    return int(pc.sum(pc.is_in(keys, value_set=others)).as_py() or 0)


# -------------------------------------------------------------------------------------------------------- comparing


def _overlap(before: Store, after: Store, shared: pa.Array, seed: int) -> Overlap:
    rng = np.random.default_rng(seed)
    chosen = pc.sort_indices(shared).to_numpy()
    chosen = rng.permutation(chosen)[:GALLERY]
    gallery = shared.take(pa.array(chosen))
    queries = np.arange(min(QUERIES, len(gallery)))
    count = min(NEIGHBOURS, len(gallery) - 1)
    if count < 1:
        raise BadRequest("one source alone has no neighbours to compare; embed more")
    old, new = (nearest_others(_vectors(store, gallery), queries, count) for store in (before, after))
    shares = np.array([len(np.intersect1d(*pair)) / count for pair in zip(old, new, strict=True)])
    return Overlap(
        queries=len(queries),
        gallery=len(gallery),
        mean=float(shares.mean()),
        quantiles={share: float(np.quantile(shares, share)) for share in _QUANTILES},
        changed=float((old[:, 0] != new[:, 0]).mean()),
        chance=count / (len(gallery) - 1),
    )


def _vectors(store: Store, keys: pa.Array) -> NDArray[np.float32]:
    """Return the vectors of some sources, shape (key, dim), in the order of their joined keys."""
    from galembed.store.keys import joined_key

    vectors = np.empty((len(keys), store.dim), np.float32)
    for batch in store.batches(["survey", "source_id", "vector"], batch_size=32_768):
        at = pc.index_in(joined_key(batch), value_set=keys)
        here = at.is_valid()
        vectors[at.filter(here).to_numpy()] = matrix(batch.column("vector").filter(here))
    return vectors


def _refit(before: Store, after: Store, probe: Probe, shared: pa.Array, out: Path) -> Refitted:
    from galembed.store.keys import joined_key

    labels = probe.require_labels()
    common = replace(probe, labels=labels.filter(pc.is_in(joined_key(labels), value_set=shared)))
    _, old = refit_probe(before, common)
    fitted, new = refit_probe(after, common)
    save_probe(fitted, out)
    return Refitted(probe.name, old, new, out)


# -------------------------------------------------------------------------------------------------------- switching


def switch_stores(old: str | Path, new: str | Path) -> str:
    """Put a store in another's place, which is kept beside it as ``OLD.before-<embedding_id>``.

    Both are directories, and renamed. What is stopped in between `finish_switch` finishes.

    Returns
    -------
    str
        What was done, for reading.

    Raises
    ------
    BadRequest
        If one is on object storage or they are on two file systems, where nothing can be renamed; or the new store
        lacks sources of the old one.
    StoreBusy
        If a job is writing to one of them.
    ArtifactNotFound
        If there is no such store.
    ArtifactMismatch
        If the name to keep the old one by is taken.
    """
    from galembed.store.lease import Lease

    for store in (old, new):
        if is_url(store):
            raise BadRequest(
                f"{store}: stores on object storage cannot change places, since nothing is renamed there; have scripts "
                "open the new address, and delete the old one when nothing needs it any more"
            )
    before, after = open_store(old), open_store(new)
    here, there = _absolute(old), _absolute(new)
    backup = here.with_name(f"{here.name}.before-{before.contract.embedding_id[:_ID_LETTERS]}")
    if backup.exists():
        raise ArtifactMismatch(f"{backup} is there already, where the old store would be kept; move it away")
    if os.stat(here.parent).st_dev != os.stat(there.parent).st_dev:
        raise BadRequest(f"{old} and {new} are on two file systems; make the new store beside the old one")
    # Jobs that begin after this find that their lease is gone, and commit nothing.
    with Lease(here), Lease(there):
        _require_settled(before, after)
        write_json(
            there / JOURNAL,
            {
                "old": str(here),
                "new": str(there),
                "backup": str(backup),
                "old_embedding_id": before.contract.embedding_id,
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            },
        )
    _rename(here, backup)
    _rename(there, here)
    return _switched(here, backup)


def finish_switch(old: str | Path, new: str | Path) -> str | None:
    """Finish a switch of two stores that was stopped; nothing is done if it is finished, or was not begun.

    Returns
    -------
    str or None
        What the state is now, for reading; None if no switch of these two was begun.
    """
    if is_url(old) or is_url(new):
        return None
    here, there = _absolute(old), _absolute(new)
    if here.exists() == there.exists():
        return None
    journal = read_json((there if there.exists() else here) / JOURNAL)
    if (journal.get("old"), journal.get("new")) != (str(here), str(there)):
        return None
    backup = Path(str(journal["backup"]))
    if there.exists():
        if not backup.exists():
            return None
        _rename(there, here)
    return _switched(here, backup)


def _absolute(store: str | Path) -> Path:
    # Links are not followed: the name is to lead to the new store.
    return Path(os.path.abspath(Path(store).expanduser()))


def _rename(source: Path, target: Path) -> None:
    source.rename(target)
    handle = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _switched(store: Path, backup: Path) -> str:
    return f"{store} is the new store; the old one is kept as {backup}, to be deleted when nothing needs it any more"
