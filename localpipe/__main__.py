"""`python -m localpipe`: the same as the console script `localpipe`.

torchrun starts workers as `-m localpipe train CONFIG`.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    # `python -m` looks for modules in the working directory first. A user's random.py there would
    # hide the standard one, so the directory comes later.
    folder = os.getcwd()
    if sys.path[:1] in ([folder], [""]):
        del sys.path[0]
    from localpipe.environment import add_import_folder

    add_import_folder(folder)
    from localpipe.cli import main

    raise SystemExit(main())
