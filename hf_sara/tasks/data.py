"""What the tasks' data have in common."""

import glob

# The label of a token that the loss does not count.
IGNORED = -100


def data_pattern(file: str) -> str:
    """A file as `load_dataset` takes it. A local path is a name, not a pattern: brackets in it are brackets."""
    return file if "://" in file else glob.escape(file)
