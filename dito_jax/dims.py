"""The legend: dimension letters and mesh axes. Every annotation, parameter and sharding rule in the project uses these.

`axis` is a mesh axis, `dim` an array dimension. Lower case letters are image space; "." names a dimension that is
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
    "data": "copies of the parameters; shards the batch",
    "fsdp": "shards parameters along D, and the batch",
    "expert": "shards experts, and the batch",
    "tensor": "shards heads and the feed-forward width",
}
