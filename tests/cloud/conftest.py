"""An account of PAI on loopback, and keys whose every trace can be looked for."""

import json
import socket
import warnings

import pytest

from tests.cloud.plane import Plane


@pytest.fixture(scope="module")
def patches():
    with pytest.MonkeyPatch.context() as patches:
        yield patches


@pytest.fixture(scope="module")
def plane(tmp_path_factory, patches):
    """The plane, and an environment like that of a user who has configured the SDK. Nothing may dial another machine."""
    connect = socket.socket.connect

    def at_home(self, address):
        assert self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1"), f"{address} is another machine"
        return connect(self, address)

    patches.setattr(socket.socket, "connect", at_home)
    folder = tmp_path_factory.mktemp("plane")
    with Plane(folder) as plane:
        (folder / "config.json").write_text(json.dumps(plane.account))
        for name, value in {
            "PAI_CONFIG_PATH": str(folder / "config.json"), "PAI_NETWORK_TYPE": "PUBLIC", "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python", "NO_PROXY": "127.0.0.1",
            "ALIBABA_CLOUD_ACCESS_KEY_ID": plane.key_id, "ALIBABA_CLOUD_ACCESS_KEY_SECRET": plane.key_secret,
            "ALIBABA_CLOUD_ECS_METADATA_DISABLED": "true", "HOME": str(folder), "QWENVL_IMAGE": "registry.example/qwenvl-ft:1",
        }.items():  # fmt: skip
            patches.setenv(name, value)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the SDK's files, when Python compiles them for the first time
            import pai.estimator
            import pai.model  # noqa: F401
        plane.attach(patches)
        yield plane
