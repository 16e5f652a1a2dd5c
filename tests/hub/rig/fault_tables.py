"""The faults that a push, a pull and a conversion from the hub survive, as docs/hub.md lists them.

Each ends as if nothing had happened.
"""

from __future__ import annotations

from faults import Fault
from streaming import SOURCE
from support import MANIFEST

SHARD = "model-00002-of"

# Every route of a push, failing once or twice in every way.
PUSH = {
    "500 on whoami": Fault("whoami", status=500),
    "500 on create": Fault("repos/create", status=500),
    "500 on the tree": Fault("/tree/", status=500),
    "500 on preupload": Fault("/preupload/", after=1, status=500),
    "503 on the LFS batch": Fault("objects/batch", after=2, status=503, times=2),
    "500 on an upload": Fault("^PUT /lfs/", after=1, status=500),
    "403 on an upload, its address expired": Fault("^PUT /lfs/", after=1, status=403),
    "reset amid an upload": Fault("^PUT /lfs/", after=2, reset_after=700_000),
    "reset before an upload's answer": Fault("^PUT /lfs/", after=1, lose_response=True),
    "500 on verify": Fault("objects/verify", status=500),
    "500 on the first commit": Fault("/commit/", status=500),
    "500 on the last commit": Fault("/commit/", after=2, status=500),
    "reset amid a commit": Fault("/commit/", after=2, reset_after=1000),
    "the first commit's answer lost": Fault("/commit/", lose_response=True),
    "the weights' commit's answer lost": Fault("/commit/", after=1, lose_response=True),
    "the last commit's answer lost": Fault("/commit/", after=2, lose_response=True),
    "429 with Retry-After": Fault("^PUT /lfs/", status=429, headers={"Retry-After": "0"}),
}

PULL = {
    "500 on the branch": Fault("/revision/main", status=500),
    "500 on the manifest": Fault(f"resolve/.*{MANIFEST}", status=500),
    "reset on the manifest": Fault(f"resolve/.*{MANIFEST}", reset_before=True),
    "500 on the tree": Fault("/tree/", status=500),
    "503 on a small file": Fault(r"^GET .*tokenizer\.json", status=503),
    "503 on a file": Fault(f"^GET .*{SHARD}", status=503, times=2),
    "reset before a file": Fault(f"^GET .*{SHARD}", reset_before=True),
    "reset amid a file, twice": Fault(f"^GET .*{SHARD}", reset_after=400_000, times=2),
    "reset amid a small file": Fault(r"^GET .*tokenizer\.json", reset_after=1000),
    "a file cut short": Fault(f"^GET .*{SHARD}", truncate=5000),
    "a bit flipped on the way": Fault(f"^GET .*{SHARD}", corrupt=1_000_000),
    "429": Fault(f"^GET .*{SHARD}", status=429),
}

CONVERT = {
    "500 on the repository": Fault(f"models/{SOURCE}/revision|models/{SOURCE}$", status=500),
    "500 on a header": Fault(r"^GET .*\.safetensors", status=500),
    "500 on a range": Fault(r"^GET .*\.safetensors", after=5, status=500, times=3),
    "resets amid ranges": Fault(r"^GET .*\.safetensors", after=4, reset_after=100_000, times=5),
    "reset before a range": Fault(r"^GET .*\.safetensors", after=6, reset_before=True),
    "a range cut short": Fault(r"^GET .*\.safetensors", after=6, truncate=10),
    "slow": Fault(r"^GET .*\.safetensors", after=6, bytes_per_second=3_000_000, times=2),
}
