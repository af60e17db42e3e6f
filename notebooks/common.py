"""The first import of every notebook: what is missing said clearly, one style, quick mode."""

import os
import sys
from pathlib import Path

try:
    import matplotlib.pyplot as plt
    import scipy  # noqa: F401

    import retrofit  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"the notebooks need {error.name}, which this kernel does not have: run "
        "`pip install '.[notebooks]'` in the project's folder, then restart the kernel"
    ) from None

QUICK = os.environ.get("QUICK") == "1"  # fewer pictures and steps, as in `make notebooks`

plt.style.use("retrofit.plots")
sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))  # for `import pictures`
