"""Choices that depend on the device, as `npuq doctor --tune` has measured them."""
