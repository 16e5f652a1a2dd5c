"""Artifacts and checkpoints on a hub: pushing, pulling, and reading a checkpoint without a local copy.

`hub.py` has the protocols of a hub; `huggingface/` and `modelscope/` implement them with that hub's own client;
`transfer/` fetches bytes, resumed inside files and checked.
"""

from .locate import resolve
from .pulling import pull
from .pushing import PushSummary, push
from .remote import open_remote
from .shard_pusher import ShardPusher

__all__ = ["PushSummary", "ShardPusher", "open_remote", "pull", "push", "resolve"]
