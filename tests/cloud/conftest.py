"""An account of PAI on loopback, and keys whose every trace can be looked for."""

import contextlib
import io
import json
import socket
import warnings

import pytest

from qwenvl_ft.cli.main import main
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
            "PAI_CONFIG_PATH": str(folder / "config.json"), "PAI_NETWORK_TYPE": "PUBLIC", "NO_PROXY": "127.0.0.1",
            "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python",
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


def run(*words: str) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of a command line, run in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(list(words))
        except SystemExit as exit:
            code = int(exit.code or 0)
    return code, out.getvalue(), err.getvalue()
