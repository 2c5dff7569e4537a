"""Names of array dimensions and mesh axes, used by all annotations, parameters and sharding rules.

`axis` is a mesh axis, `dim` an array dimension. Lower-case letters are image dimensions; "." is a dimension that is
never sharded.
"""

DIMS = {
    "B": "batch",
    "T": "query positions (tokens)",
    "S": "key positions",
    "D": "model width",
    "N": "query heads",
    "K": "key/value heads",
    "H": "head width",
    "F": "feed-forward width",
    "V": "vocabulary: classes, or text tokens",
    "L": "layers, stacked for scan",
    "E": "experts",
    "A": "experts active per token",
    "R": "routed rows, sorted by expert",
    "h": "image height",
    "w": "image width",
    "c": "image channels",
    "p": "patch side",
}

AXES = {
    "data": "data parallelism: shards the batch, replicates the parameters",
    "fsdp": "FSDP: shards the parameters along D, and the batch",
    "expert": "expert parallelism: shards the experts, and the batch",
    "tensor": "tensor parallelism: shards the heads and the feed-forward width",
}
