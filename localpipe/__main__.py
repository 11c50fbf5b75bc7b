"""`python -m localpipe` is the console script `localpipe`; torchrun starts its workers through it."""

from __future__ import annotations

from localpipe.cli.command_line import main

if __name__ == "__main__":
    raise SystemExit(main())
