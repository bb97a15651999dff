"""The build backend of setuptools, or one sentence where there is none: with --no-build-isolation nothing brings it."""

import build_config

build_config.check_setuptools()

from setuptools.build_meta import *  # noqa: E402, F403
