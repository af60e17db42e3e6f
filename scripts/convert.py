"""`retrofit convert` for people who look for a script: python scripts/convert.py --help."""

import sys

from retrofit.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
