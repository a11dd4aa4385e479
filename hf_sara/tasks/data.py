"""Helpers of all tasks for loading and encoding their data."""

import glob

# The label of a token that the loss does not count.
IGNORED = -100


def data_pattern(file: str) -> str:
    """The path of a file for `load_dataset`, which reads brackets and stars as a pattern unless they are escaped."""
    return file if "://" in file else glob.escape(file)
