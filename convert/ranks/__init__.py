"""One conversion by several processes: their shares, claims and journals on a shared file system; ranks of torchrun."""
