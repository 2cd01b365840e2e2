"""For tests that train: every one begins with the same random numbers, on one thread."""

import pytest


@pytest.fixture(autouse=True)
def seeded():
    try:
        import torch
    except ModuleNotFoundError:
        yield  # the tests that need it are skipped
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
    torch.set_num_threads(threads)
