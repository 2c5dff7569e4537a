"""Fingerprint of a data set: what shows, without reading the examples, that it is another one than before."""

import hashlib
from typing import Any

from dito_jax.data.sources import Source, class_names


def fingerprint(source: Source) -> dict[str, Any]:
    """{"examples": number, "classes": number, "sha256": of the class names and of `source.contents()`}.

    `contents` is optional. It yields bytes that tell the examples of one source from those of another: names of files,
    labels. A file that is replaced by another one of the same name is not noticed.
    """
    sha = hashlib.sha256()
    for name in class_names(source):
        sha.update(name.encode(errors="surrogateescape") + b"\0")
    for part in getattr(source, "contents", tuple)():
        sha.update(part + b"\0")
    return {"examples": len(source), "classes": source.num_classes, "sha256": sha.hexdigest()}
