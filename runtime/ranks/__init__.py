"""The runtime over several processes, one a device: who owns what, and how they talk."""
