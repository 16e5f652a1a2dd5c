"""What this machine has for the Ascend backend, and whether its operators compute what they should."""
