"""What pyproject.toml cannot say: the configs of the repository's top become part of the wheel."""

import pathlib

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Copies `configs/` to `vssd_jax/configs/` of the built package."""

    def run(self):
        super().run()
        if self.editable_mode:
            return  # a checkout has them beside the package
        target = pathlib.Path(self.build_lib) / "vssd_jax" / "configs"
        self.mkpath(str(target))
        for path in sorted(pathlib.Path("configs").glob("*.py")):
            self.copy_file(str(path), str(target / path.name))


setup(cmdclass={"build_py": BuildWithConfigs})
