"""Writes the commit into wheels and source archives (draftbench/_stamp.json); all else is in pyproject.toml."""

import importlib.util
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

_spec = importlib.util.spec_from_file_location("environment", Path(__file__).parent / "draftbench" / "environment.py")
environment = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(environment)


class BuildPy(build_py):
    """Stamps the built package, never the source tree of an editable install."""

    def run(self):
        super().run()
        if not self.editable_mode:
            environment.stamp(Path(self.build_lib, "draftbench", "_stamp.json"))


class Sdist(sdist):
    """Stamps the archive, so that a wheel built from it knows its commit."""

    def make_release_tree(self, base_dir, files):
        super().make_release_tree(base_dir, files)
        environment.stamp(Path(base_dir, "draftbench", "_stamp.json"))


setup(cmdclass={"build_py": BuildPy, "sdist": Sdist})
