"""Alibaba's SDK, opened with what the user has configured, and what it raises, in words.

The AccessKey comes from the environment or from the files that Alibaba's own tools write; the SDK reads it, and nothing here keeps
or prints it. Nothing of this room imports the SDK before it is asked for.
"""

import importlib.util
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenvl_ft.errors import Problem, UserError

KEY_ID, KEY_SECRET = "ALIBABA_CLOUD_ACCESS_KEY_ID", "ALIBABA_CLOUD_ACCESS_KEY_SECRET"
KEY_TOKEN = "ALIBABA_CLOUD_SECURITY_TOKEN"  # of a key for some hours
# Other places that the SDK looks into: what a role of the machine or a tool before it has left there.
ELSEWHERE = ("ALIBABA_CLOUD_CREDENTIALS_URI", "ALIBABA_CLOUD_ECS_METADATA", "ALIBABA_CLOUD_OIDC_TOKEN_FILE")
FILES = ("~/.alibabacloud/credentials.ini", "~/.alibabacloud/credentials", "~/.aliyun/config.json")
CONFIGURE = "python -m pai.toolkit.config"
TOKEN = "QWENVL_KEY"  # the variable that holds a service's token, here and in the service
SECRETS = (KEY_ID, KEY_SECRET, KEY_TOKEN, TOKEN)
LOOKS_SECRET = re.compile(r"\b(?:LTAI|STS\.)\w{8,}")  # an AccessKey's or a temporary key's id

REFUSED = re.compile(r"accesskey|signature|securitytoken|credential", re.IGNORECASE)
FORBIDDEN = re.compile(r"forbidden|denied|permission|unauthori[sz]ed|auth", re.IGNORECASE)
FULL = re.compile(r"quota|insufficient|shortage|stock|not.?enough.?resource", re.IGNORECASE)
ABSENT = re.compile(r"not.?found|not.?exist|nosuch", re.IGNORECASE)


@dataclass(frozen=True)
class Account:
    """Where jobs, services and files go: what `python -m pai.toolkit.config` asks for and writes."""

    region_id: str
    workspace_id: str
    oss_bucket_name: str
    oss_endpoint: str

    def uri(self, key: str) -> str:
        """The place of an object of the bucket; a folder's ends with a slash."""
        return f"oss://{self.oss_bucket_name}/{key}"


def read_account() -> Account:
    """Raises UserError where the SDK is missing, or what its configuration lacks. Asks nobody."""
    need_sdk()
    path = Path(os.environ.get("PAI_CONFIG_PATH") or "~/.pai/config.json").expanduser()
    fix = f"run `{CONFIGURE}`, which asks for it and writes {path}"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(Problem(str(path), "is not there: it says which region, workspace and bucket are yours", fix)) from None
    except (OSError, ValueError):
        raise UserError(Problem(str(path), "cannot be read as JSON", fix)) from None
    found = found if isinstance(found, dict) else {}
    lacking = [key for key in ("region_id", "workspace_id", "oss_bucket_name") if not found.get(key)]
    if lacking:
        raise UserError(*(Problem(str(path), f"has no {key}", fix) for key in lacking))
    endpoint = found.get("oss_endpoint") or f"oss-{found['region_id']}.aliyuncs.com"
    return Account(str(found["region_id"]), str(found["workspace_id"]), str(found["oss_bucket_name"]), str(endpoint))


def need_sdk() -> None:
    """Raises UserError where the extra is not installed."""
    if importlib.util.find_spec("pai") is None or importlib.util.find_spec("pai.session") is None:
        fix = "in the checkout: pip install '.[pai]', or make .venv/ready"
        raise UserError(Problem("qwenvl-ft pai", "needs Alibaba's SDK, alipai, which is not installed", fix))
    # eas-prediction's generated code is refused by every protobuf since 4 but the one in Python. Until it is generated anew.
    os.environ.setdefault("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", "python")


def open_session(account: Account) -> Any:
    """The SDK's session. Raises UserError where there is no AccessKey."""
    check_credentials()
    from alibabacloud_credentials.models import Config
    from pai.session import Session

    given, temporary = [os.environ.get(name) for name in (KEY_ID, KEY_SECRET)], os.environ.get(KEY_TOKEN)
    kind = "sts" if temporary else "access_key"
    key = Config(type=kind, access_key_id=given[0], access_key_secret=given[1], security_token=temporary)
    return Session(
        credential_config=key if all(given) else None,  # else the SDK looks into its files
        region_id=account.region_id, workspace_id=account.workspace_id, oss_bucket_name=account.oss_bucket_name,
        oss_endpoint=account.oss_endpoint, network=os.environ.get("PAI_NETWORK_TYPE") or None,
    )  # fmt: skip


def check_credentials() -> None:
    """Raises UserError with what is missing. Without this the SDK would ask an address that only Alibaba's machines have."""
    lacking = [name for name in (KEY_ID, KEY_SECRET) if not os.environ.get(name)]
    files = [*FILES, os.environ.get("ALIBABA_CLOUD_CREDENTIALS_FILE") or FILES[0]]
    if (
        not lacking
        or any(map(os.environ.get, ELSEWHERE))
        or (len(lacking) == 2 and any(Path(at).expanduser().is_file() for at in files))
    ):
        return
    fix = f"export it, or run `{CONFIGURE}`, which writes the AccessKey to {FILES[0]}; it never belongs into a config or a command"
    raise UserError(*(Problem(name, "is not set", fix) for name in lacking))


@contextmanager
def in_words(where: str) -> Iterator[None]:
    """What PAI, OSS or a service refuses, and that one cannot be reached, as a UserError about `where`."""
    import oss2
    import requests
    from alibabacloud_credentials.exceptions import CredentialException
    from pai.exception import PredictionException
    from Tea.exceptions import RetryError, TeaException

    try:
        yield
    except oss2.exceptions.OssError as error:
        raise UserError(refusal(where, error.code or "", error.message or str(error.body or ""), error.status)) from None
    except PredictionException as error:
        said = error.message.decode("utf-8", "replace") if isinstance(error.message, bytes) else str(error.message)
        raise UserError(refusal(where, "", said, error.code)) from None
    except CredentialException as error:
        raise UserError(refusal(where, "credentials", str(error), 403)) from None
    except TeaException as error:
        if isinstance(getattr(error, "inner_exception", None), CredentialException):
            raise UserError(refusal(where, "credentials", error.message or "", 403)) from None
        status = getattr(error, "statusCode", None) or getattr(error, "status_code", None) or 0
        raise UserError(refusal(where, error.code or "", error.message or "", status)) from None
    except (requests.exceptions.RequestException, RetryError) as error:
        raise UserError(refusal(where, "", type(error).__name__, 0)) from None


def refusal(where: str, code: str, message: str, status: int | None = None) -> Problem:
    """What was answered, and what to do about it. `status` is HTTP's; 0 or less: there was no answer."""
    said = scrubbed(" ".join(message.split()))[:300]
    named = ": ".join(part for part in (code, said) if part and part != "None") or f"status {status}"
    if status is not None and status <= 0:
        return Problem(where, f"cannot be reached ({named})", "check region_id and the network; PAI_NETWORK_TYPE=PUBLIC or VPC")
    if REFUSED.search(code):
        fix = f"check {KEY_ID} and {KEY_SECRET}: both of one AccessKey, which is enabled and not expired"
        return Problem(where, f"the AccessKey is refused ({named})", fix)
    if FULL.search(code) or (status is None and FULL.search(message)) or status == 429:
        fix = "take another --instance-type or a smaller --count, stop what is not needed, or ask Alibaba for a higher quota"
        return Problem(where, f"there is no room for it ({named})", fix)
    if FORBIDDEN.search(code) or status in (401, 403):
        fix = "ask the workspace's administrator for the role of a developer, and for the rights to read and write the bucket"
        return Problem(where, f"this account may not do that ({named})", fix)
    if ABSENT.search(code) or status == 404:
        return Problem(where, f"is not there ({named})", "check the name, and the region and workspace that it belongs to")
    if status is not None and status >= 500:
        return Problem(where, f"does not answer now ({named})", "try again in a moment; what it says of itself is in the console")
    return Problem(where, f"PAI refuses it ({named})", "mend what it names; the console shows more")


def scrubbed(text: str) -> str:
    """Without the secrets that are known here, and without what looks like one."""
    for name in SECRETS:
        if secret := os.environ.get(name):
            text = text.replace(secret, "***")
    return LOOKS_SECRET.sub("***", text)
