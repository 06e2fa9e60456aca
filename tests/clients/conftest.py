"""What a client test has run becomes a row of docs/clients.md.

make clients
"""

from functools import partial

import pytest

from clients.javascript import DEMO, MODELS, Artifacts
from clients.rows import Shown, record


@pytest.fixture
def shown(request: pytest.FixtureRequest) -> Shown:
    """Call it at the end of a test, with the arguments of `record`."""
    return partial(record, request.path)


@pytest.fixture(scope="module", params=MODELS)
def artifacts(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Artifacts:
    """The ONNX artifacts of each model for the JavaScript clients."""
    return Artifacts(MODELS[request.param], tmp_path_factory.mktemp("artifacts"))


@pytest.fixture(scope="module")
def of_demo(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """Those of the demo alone."""
    return Artifacts(DEMO, tmp_path_factory.mktemp("demo"))
