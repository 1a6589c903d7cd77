"""Edits for many machines: immutable files of edits, a codebook in shards, a manifest replaced in one step.

    publish("edits", "s3://bucket/edits")
    store = Store("s3://bucket/edits")
    store.follow()

docs/vllm.md describes the files. They are those of a folder of edits (docs/files.md): the file of an edit and
a shard of the codebook have the tables of a segment, and the adapter's two files are PEFT's.
"""

from .manifest import StoreManifest
from .publishing import Published, publish
from .reading import EditFile, Moment, Store, StoredEdit

__all__ = ["EditFile", "Moment", "Published", "Store", "StoreManifest", "StoredEdit", "publish"]
