"""Diagnosis of this machine for the Ascend backend, and a test of its operators against the reference."""
