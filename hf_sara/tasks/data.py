"""What all tasks need to load and encode their data."""

import glob

# The label of a token that the loss does not count.
IGNORED = -100


def data_pattern(file: str) -> str:
    """A file as `load_dataset` takes it. That reads brackets and stars in a path as a pattern, so they are escaped."""
    return file if "://" in file else glob.escape(file)
