"""Failing laws show the values they compared."""

import pytest

pytest.register_assert_rewrite("tests.laws.laws")
