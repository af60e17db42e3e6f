"""Any weights file: drawn at random, read to the bit or refused. `make fuzz` draws thousands."""

import os
import tempfile
from pathlib import Path

from hypothesis import given, settings
from weights_files import check_file, weights_files


@settings(max_examples=25)
@given(weights_files())
def test_any_weights_file_is_read_to_the_bit_or_refused(drawn):
    with tempfile.TemporaryDirectory() as folder:
        before = Path.cwd()
        os.chdir(folder)  # where what must not run would leave a file
        try:
            check_file(drawn, Path(folder))
        finally:
            os.chdir(before)
