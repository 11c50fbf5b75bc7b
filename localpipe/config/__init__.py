"""Every key of a configuration, and how a file becomes one checked, resolved object."""

from localpipe.config.load import load as load
from localpipe.config.load import parse as parse
from localpipe.config.resume import flatten as flatten
