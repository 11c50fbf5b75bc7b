"""Starts one worker: `python .../start.py MODULE FOLDER...`.

It is a script, because `python -m` would look for every module in the working directory first, and
a file there may be named like a standard module. FOLDER...: where the launcher finds modules.

The process is bound to its launcher's life first, then the module with the slow imports is loaded.
"""

from __future__ import annotations

import sys


def main() -> int:
    """Run the module of the first argument, and return the exit status of its `main()`."""
    import importlib

    from localpipe.environment import add_import_folder, die_with_parent, is_spare, wait_for_rank

    die_with_parent()
    for folder in sys.argv[2:]:
        add_import_folder(folder)
    from localpipe.output import open_closed_streams, tolerate_own_output

    open_closed_streams()
    tolerate_own_output()
    module = importlib.import_module(sys.argv[1])
    if is_spare():
        module.warm_up()
        wait_for_rank()
    status: int = module.main()
    return status


if __name__ == "__main__":
    # Python has put the folder of this script first. That of the package comes after the standard
    # library, and before the installed packages, where another version may be.
    del sys.path[0]
    root = __file__.rsplit("/", 4)[0]
    installed = [entry.endswith(("site-packages", "dist-packages")) for entry in sys.path]
    sys.path.insert(installed.index(True) if any(installed) else len(sys.path), root)
    raise SystemExit(main())
