"""`python -m localpipe`: the same as the console script `localpipe`.

torchrun starts workers as `-m localpipe train CONFIG`.
"""

from __future__ import annotations

from localpipe.cli.command_line import main

if __name__ == "__main__":
    raise SystemExit(main())
