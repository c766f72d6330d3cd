"""A mixture leaves the lake: shuffled by seed, cut into shards that a trainer loads, published whole.

    scatter   one document shard -> its taken copies, sorted by their position in the export     (a map)
    gather    one shard of the export <- its part of every scattered file                        (a map)
    finish    the manifest, then the folder takes its name                                       (once)

Scatter and gather are functions on files: they run on any executor in any order, a killed one is run again, and a
finished one is not repeated. Whoever calls them keys the working folder by what decides the bytes (documents,
mixture, seed, number of shards, format), so that pieces of another export are never taken for this one's.
"""

from storage.exports.files import FORMATS, ExportFile, Format
from storage.exports.publish import finish, read_manifest, settle, verify
from storage.exports.shuffle import Scattered, gather, scatter, shard_count

__all__ = [
    "FORMATS",
    "ExportFile",
    "Format",
    "Scattered",
    "finish",
    "gather",
    "read_manifest",
    "scatter",
    "settle",
    "shard_count",
    "verify",
]
