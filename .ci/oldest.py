"""Print the oldest version of each library that setup.cfg allows, as constraints for pip."""

import configparser
import re
import sys
from pathlib import Path

setup = configparser.ConfigParser()
setup.read(Path(__file__).parent.parent / "setup.cfg", encoding="utf-8")
extras = setup["options.extras_require"]
for line in "\n".join([setup["options"]["install_requires"], *(extras[name] for name in sys.argv[1:])]).splitlines():
    found = re.match(r"([\w.-]+)>=([\d.]+)", line.strip())
    # There is no small build of the oldest torch, see docs/training.md.
    if found and found[1] != "torch":
        sys.stdout.write(f"{found[1]}=={found[2]}\n")
