"""Data on its way from the user's files to micro-batches: read, check, split, encode (without torch), order, batch."""
