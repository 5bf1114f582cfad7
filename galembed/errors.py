"""Everything that galembed raises on purpose.

::

    GalembedError
    ├── UnreadableInput      a file is damaged, empty or not what its name says   (OSError)
    ├── MissingBand          a file or survey lacks a band that the backbone asks (ValueError)
    ├── MissingWCS           a position is needed and the header has none         (ValueError)
    ├── UnknownUnit          pixels whose unit cannot be turned into nJy          (ValueError)
    ├── NoData               a cutout holds no finite pixel                       (ValueError)
    ├── SchemaMismatch       a table breaks its contract                          (ValueError)
    ├── ArtifactNotFound     a backbone, engine, store or catalogue is absent     (FileNotFoundError)
    ├── ArtifactMismatch     a digest or identity is not the one on record        (ValueError)
    ├── EmbeddingDrift       an exported engine disagrees with torch              (ArithmeticError)
    ├── StoreBusy            another job holds the lease of the store             (RuntimeError)
    ├── StorageError         the disk or object storage under a store fails       (OSError)
    └── BadRequest           a query, filter or option that cannot be carried out (ValueError)

Catch `GalembedError` to catch them all; each is also the built-in that a stranger would catch. The command line
turns any of them into one line and exit code 1. `reason` is the stable code that job reports and the `failures`
table use.
"""


class GalembedError(Exception):
    """Root of the tree. The message says what, where, what was got and what to do next."""

    reason = "error"


class UnreadableInput(GalembedError, OSError):
    """A file cannot be read: damaged, truncated, empty or not what its name says."""

    reason = "unreadable"


class MissingBand(GalembedError, ValueError):
    """A band role that the backbone asks for has no band in the data."""

    reason = "missing_band"


class MissingWCS(GalembedError, ValueError):
    """A sky position is needed and the file's header gives no celestial WCS."""

    reason = "missing_wcs"


class UnknownUnit(GalembedError, ValueError):
    """The pixel unit is absent or not one that converts to nJy."""

    reason = "unknown_unit"


class NoData(GalembedError, ValueError):
    """A cutout has no usable pixels in at least one band."""

    reason = "no_data"


class SchemaMismatch(GalembedError, ValueError):
    """A table lacks a column, has the wrong type, or holds values its schema forbids."""

    reason = "schema"


class ArtifactNotFound(GalembedError, FileNotFoundError):
    """A backbone, engine, store, catalogue or probe is not where it was looked for."""

    reason = "not_found"


class ArtifactMismatch(GalembedError, ValueError):
    """Something does not carry the identity or digest that it should."""

    reason = "mismatch"


class EmbeddingDrift(GalembedError, ArithmeticError):
    """An exported engine differs from torch by more than the stated tolerance."""

    reason = "drift"


class StoreBusy(GalembedError, RuntimeError):
    """Another job holds the lease of this store."""

    reason = "store_busy"


class StorageError(GalembedError, OSError):
    """The disk is full, or the place of a store cannot be reached or written."""

    reason = "storage"


class BadRequest(GalembedError, ValueError):
    """A query, filter or option that cannot be carried out as asked."""

    reason = "bad_request"
