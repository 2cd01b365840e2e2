"""What is fixed for every test here."""

from tests.pruning.one_thread import seeded  # noqa: F401
