"""The Ascend operators on several NPUs: the device of a rank, the exchange of expert rows, products divided by inputs."""
