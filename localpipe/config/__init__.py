"""The configuration: every key, how a file becomes one checked object, and how `auto` values are decided."""

from localpipe.config.load import load as load
from localpipe.config.load import parse as parse
from localpipe.config.resume import flatten as flatten
