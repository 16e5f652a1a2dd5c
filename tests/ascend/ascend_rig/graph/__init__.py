"""An NPU that captures graphs, as far as the host can tell: streams, events, task groups, recorded calls."""
