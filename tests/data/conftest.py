"""A small rendered data set, shared by all tests that only read it."""

import pytest

from anomalib_pack.data import SyntheticLoco


@pytest.fixture(scope="session")
def sizes():
    return {"image_size": 64, "num_train": 4, "num_val": 2, "num_test": 4, "num_workers": 0}


@pytest.fixture(scope="session")
def rendered(tmp_path_factory, sizes):
    """The root of a rendering of both categories."""
    root = tmp_path_factory.mktemp("rendered")
    for category in ("tray", "board"):
        SyntheticLoco(root=root, category=category, **sizes).prepare_data()
    return root
