"""Artifacts and checkpoints on a hub: push one, pull one, and read a checkpoint there without keeping it here.

`hub.py` says what npuq asks of any hub; `huggingface/` and `modelscope/` answer, each through that hub's own client;
`transfer/` brings bytes, resumed inside files and checked.
"""

from .locate import resolve
from .pulling import pull
from .pushing import PushSummary, push
from .remote import open_remote
from .shard_pusher import ShardPusher

__all__ = ["PushSummary", "ShardPusher", "open_remote", "pull", "push", "resolve"]
