"""Artifacts and checkpoints on a hub: push one, pull one, and read a checkpoint there without keeping it here.

huggingface_hub speaks the protocol and finds the token; this room adds what an artifact of hundreds of gigabytes needs:
resuming inside a file, hashes checked against the manifest, one bad file that does not take the others along.
"""

from .locate import resolve
from .pulling import pull
from .pushing import PushSummary, push
from .remote import open_remote
from .shard_pusher import ShardPusher

__all__ = ["PushSummary", "ShardPusher", "open_remote", "pull", "push", "resolve"]
