"""The Ascend operators on several NPUs: a rank's device, the exchange of expert rows, and rows divided by columns."""
