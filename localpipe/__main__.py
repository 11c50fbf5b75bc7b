"""`python -m localpipe` is the console script `localpipe`; torchrun starts its workers through it."""

from localpipe.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
