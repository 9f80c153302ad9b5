"""pytest with these arguments; what fails is told by its report alone."""

import sys

import pytest

code = pytest.main(sys.argv[1:])
sys.exit(0 if code == pytest.ExitCode.TESTS_FAILED else code)
