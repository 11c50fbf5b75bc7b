"""The sweep: pairs of the keys' values, through every command, judged by what must hold of any run.

`python -m tests.sweep --minutes 60` runs it, `make sweep MINUTES=60` too.
"""
