"""Jobs become bytes on disk, in any order, resumably: workers, shards, hashes, the journal."""
