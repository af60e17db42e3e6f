"""Thousands of random weights files, each read to the bit or refused; `make fuzz` runs it.

    python tests/fuzz_files.py --files 5000

Prints how many files had each part, how many were read and how many refused, and ends with exit
code 1 where one is neither, or runs code, which is then printed, as small as hypothesis finds it;
or where a part came up less than 50 times in 5,000 files.
"""

import os
import sys
import tempfile
from pathlib import Path

from fuzzing import examples_of, main
from weights_files import check_file, weights_files


def read(drawn):
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        outcome = check_file(drawn, Path(folder))
        os.chdir("/")
    return {*drawn.features, outcome}, drawn


def fuzz(job):
    return examples_of(job, weights_files(), read)


if __name__ == "__main__":
    sys.exit(main(fuzz, __doc__.splitlines()[0], "files", 5000, rare=0.01))
