#!/usr/bin/env python3
"""Makes an API key for a server: python jobs/make_key.py keys.yaml anna; then serve with keys=keys.yaml.

The key is printed once. The file holds its hash alone.
"""

import argparse
import sys
from pathlib import Path

from valley.command import run_command
from valley.serving.keys import make_key


def main() -> int:
    """Makes the key that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="file of keys; made if there is none")
    parser.add_argument("name", help="whom the key is for, as logs call it")
    arguments = parser.parse_args()
    return run_command(lambda: print(make_key(arguments.file, arguments.name)))


if __name__ == "__main__":
    sys.exit(main())
