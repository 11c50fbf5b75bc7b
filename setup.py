import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Copies configs/ into the package when a wheel is built.

    A checkout and an editable install read it where it is.
    """

    def run(self):
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "localpipe", "configs")
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree("configs", target)

    def get_source_files(self):
        return [*super().get_source_files(), *map(str, Path("configs").rglob("*.yaml"))]


setup(cmdclass={"build_py": BuildWithConfigs})
