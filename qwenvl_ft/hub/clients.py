"""The two hubs behind one face: list a repository at a pinned revision, bring one file of it, push a folder.

The hubs' own clients do the talking: endpoints, tokens and proxies are theirs (HF_ENDPOINT, MODELSCOPE_ENDPOINT, HF_HUB_OFFLINE),
and so are the progress bars. Whatever they raise comes out as a UserError, but for what this machine's disk refuses: an OSError.
"""

import errno
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

from qwenvl_ft.errors import Problem, UserError

COMMIT = re.compile(r"[0-9a-f]{40}")
LATER = "run the same command again: it goes on where it stopped"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
OF_THE_DISK = (*NO_ROOM, errno.EROFS, errno.EACCES, errno.EPERM)


class Barred(UserError):
    """The hub gives nothing of this repository: whoever asks for its next file hears the same."""


class Unreachable(Barred):
    """The hub does not answer, or may not be asked."""


class Wanted(NamedTuple):
    """What a hub says of a file. `sha256` is None where it knows only git's own name of the content, `blob` (a sha1)."""

    size: int
    sha256: str | None
    blob: str | None

    @property
    def hash(self) -> str | None:
        """What the hub lists to check the content by; None if that is the size alone."""
        return self.sha256 or self.blob


class Hub(Protocol):
    """`fetch` writes at least what is missing of `target` and may leave it wrong: whoever calls it looks.

    `then` is what the user should do once what kept an upload from succeeding is mended.
    """

    def listing(self, repo: str, revision: str | None) -> tuple[str, dict[str, Wanted]]:
        """(the commit that the revision names today, the files at it)."""

    def fetch(self, repo: str, commit: str, name: str, wanted: Wanted, target: Path) -> None:
        """Brings one file; goes on from what an earlier try left, which must not be longer than the file."""

    def claim(self, repo: str, then: str) -> None:
        """Makes the repository, for its owner's eyes only, if it is not there. Raises UserError if it may not be written to."""

    def upload_command(self, repo: str, folder: Path) -> list[str]:
        """What the hub's own tool does the same with."""

    def push(self, repo: str, folder: Path, then: str) -> None:
        """Uploads every file of the folder to a claimed repository."""


class ModelScope:
    """Its client resumes, retries and checks sha256 itself."""

    def __init__(self) -> None:
        from modelscope_hub import HubApi, HubConfig  # not `modelscope`, which takes ten times as long to import

        self.api = HubApi(HubConfig())

    def listing(self, repo: str, revision: str | None) -> tuple[str, dict[str, Wanted]]:
        """A branch is pinned to the commit of its newest file, if the hub lists the same files there; else it stays a branch
        and the files' hashes are what is pinned."""
        branch = revision or "master"
        with _told(repo, branch):
            entries = self._entries(repo, branch)
            newest = max(entries, key=lambda entry: entry.get("CommittedDate") or 0, default={}).get("Revision") or ""
            files = _wanted(entries)
            if COMMIT.fullmatch(branch) or not COMMIT.fullmatch(newest):
                return branch, files
            return (newest if _wanted(self._entries(repo, newest)) == files else branch), files

    def _entries(self, repo: str, revision: str) -> list[dict[str, Any]]:
        """The hub's own words: the client's tidy ones leave the commits out."""
        return [entry for entry in self.api.legacy.list_repo_files(repo, "model", revision) if entry.get("Type") != "tree"]

    def fetch(self, repo: str, commit: str, name: str, wanted: Wanted, target: Path) -> None:
        """The client keeps its part beside the target, as name.incomplete."""
        root = target.parents[len(PurePosixPath(name).parts) - 1]
        with _told(repo, commit, name):
            self.api.download_file(
                repo, "model", name, revision=commit, local_dir=root, expected_sha256=wanted.sha256, file_size=wanted.size
            )

    def claim(self, repo: str, then: str) -> None:
        """Nothing but the upload itself says whether a repository that is there already may be written to."""
        from modelscope_hub.errors import AlreadyExistsError

        with _writing(repo, "modelscope login", then), suppress(AlreadyExistsError):
            self.api.whoami()
            self.api.create_repo(repo, "model", visibility="private")

    def upload_command(self, repo: str, folder: Path) -> list[str]:
        return ["modelscope", "upload", repo, str(folder)]

    def push(self, repo: str, folder: Path, then: str) -> None:
        """In the client's own batches."""
        with _writing(repo, "modelscope login", then):
            self.api.upload_folder(repo, "model", folder, commit_message="Upload the merged model", use_cache=False)


class HuggingFace:
    """Its client checks sizes only. Its snapshot_download starts a file from zero after a kill; `http_get`, below it, does not."""

    def __init__(self) -> None:
        from huggingface_hub import HfApi

        self.api = HfApi()

    def listing(self, repo: str, revision: str | None) -> tuple[str, dict[str, Wanted]]:
        """Small files have no sha256 there, but git's name of their content."""
        from huggingface_hub.hf_api import RepoFile

        with _told(repo, revision or "main"):
            commit = str(self.api.model_info(repo, revision=revision).sha)
            tree = self.api.list_repo_tree(repo, recursive=True, revision=commit)
            files = [entry for entry in tree if isinstance(entry, RepoFile)]
        return commit, {
            file.path: Wanted(file.size, file.lfs.sha256, None) if file.lfs else Wanted(file.size, None, file.blob_id)
            for file in files
        }

    def fetch(self, repo: str, commit: str, name: str, wanted: Wanted, target: Path) -> None:
        """Appends to what is there; asks nothing if that is the whole of it."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        target.parent.mkdir(parents=True, exist_ok=True)
        with _told(repo, commit, name), target.open("ab") as file:
            url = hf_hub_url(repo, name, revision=commit, endpoint=self.api.endpoint)
            http_get(url, file, resume_size=file.tell(), headers=build_hf_headers(), expected_size=wanted.size)

    def claim(self, repo: str, then: str) -> None:
        """Its `exist_ok` says yes to whoever may read, so the right to write is asked for beside it."""
        with _writing(repo, "hf auth login", then):
            self.api.whoami()
            self.api.create_repo(repo, exist_ok=True, private=True)
            self.api.auth_check(repo, write=True)

    def upload_command(self, repo: str, folder: Path) -> list[str]:
        return ["hf", "upload", repo, str(folder)]

    def push(self, repo: str, folder: Path, then: str) -> None:
        """In one commit."""
        with _writing(repo, "hf auth login", then):
            self.api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload the merged model")


def pieces(target: Path) -> list[Path]:
    """What earlier tries left of a file, of either hub: ModelScope's client puts a large one together of several."""
    ours = re.compile(re.escape(target.name) + r"(\.incomplete|\.parallel_tmp|_\d+_\d+)?")
    return [path for path in target.parent.glob("*") if ours.fullmatch(path.name) and path.is_file()]


HUBS: dict[str, type[ModelScope] | type[HuggingFace]] = {"modelscope": ModelScope, "hf": HuggingFace}


class Source(NamedTuple):
    """A model on a hub; `revision` is a branch, a tag or a commit, None for the hub's default or what was recorded."""

    hub: str
    repo: str
    revision: str | None = None


def read_source(text: str) -> Source | None:
    """`modelscope:ORG/NAME` or `hf:ORG/NAME`, `@REVISION` behind it or not; None if the text names no hub, so it is a path.

    Raises UserError if what follows the hub is no ORG/NAME.
    """
    hub, colon, rest = text.partition(":")
    if not colon or hub not in HUBS:
        return None
    repo, _, revision = rest.strip("/").partition("@")
    if repo.count("/") != 1 or ".." in repo or not all(repo.split("/")):
        raise UserError(Problem(text, "names no repository", f"write {hub}:ORG/NAME, such as {hub}:Qwen/Qwen2-VL-7B-Instruct"))
    return Source(hub, repo, revision or None)


def pushable(where: str) -> Source:
    """The repository that `where` names, made if it was not there; whoever is logged in with the hub's own tool owns it.

    Raises UserError if it names none, or one that this user may not write to: said before a merge, not after it.
    """
    source = _place(where)
    HUBS[source.hub]().claim(source.repo, "run the same command again")
    return source


def push(where: str, folder: Path) -> None:
    """Uploads a folder to a `pushable` place."""
    source, hub = _place(where), HUBS[_place(where).hub]()
    then = f"upload the finished folder: {shlex.join(hub.upload_command(source.repo, folder))}"
    with redirect_stdout(sys.stderr):  # ModelScope's client prints a report; standard output is for what was asked for
        hub.push(source.repo, folder, then)


def _place(where: str) -> Source:
    if not (source := read_source(where)) or source.revision:
        raise UserError(Problem(f"--push {where}", "names no repository on a hub", "write modelscope:ORG/NAME or hf:ORG/NAME"))
    return source


def _wanted(entries: list[dict[str, Any]]) -> dict[str, Wanted]:
    return {entry["Path"]: Wanted(int(entry["Size"]), entry.get("Sha256") or None, None) for entry in entries}


@contextmanager
def _told(repo: str, revision: str, name: str = "", then: str = LATER) -> Iterator[None]:
    """Says in our words what a hub's client raises."""
    import requests
    from huggingface_hub import errors as hf
    from modelscope_hub import errors as ms

    where = repo + (f"@{revision}" if revision else "") + (f", {name}" if name else "")
    own_tool = "log in with the hub's own tool"
    try:
        yield
    except hf.OfflineModeIsEnabled:
        fix = "unset it, or give a folder that is complete" if then == LATER else f"unset it, then {then}"
        raise Unreachable(Problem(where, "HF_HUB_OFFLINE is set", fix)) from None
    except hf.RevisionNotFoundError:
        raise _problem(where, "there is no such revision", "name a branch, a tag or a commit of the repository") from None
    except (hf.GatedRepoError, ms.PermissionDeniedError) as error:
        raise Barred(Problem(where, "is not open to everyone", f"ask for access on its page, then {own_tool}")) from error
    except (hf.RepositoryNotFoundError, hf.EntryNotFoundError, ms.NotExistError, ms.AuthenticationError) as error:
        what = "is not there, or only for those who are logged in"
        fix = f"check ORG/NAME, capitals too, and the revision; if it is private, {own_tool}"
        of_all = isinstance(error, hf.RepositoryNotFoundError | ms.AuthenticationError)
        raise (Barred if of_all else UserError)(Problem(where, what, fix)) from error
    except (hf.HFValidationError, ms.InvalidParameter) as error:
        raise _problem(where, f"is refused: {_first_line(error)}", "write ORG/NAME and an existing revision") from error
    except ms.FileIntegrityError as error:
        raise _problem(where, f"the hub sends another file than it lists: {_first_line(error)}", LATER) from error
    except (hf.HTTPError, ms.HubError, requests.RequestException, OSError) as error:
        if isinstance(error, hf.HfHubHTTPError) and error.response.status_code in (401, 403):
            raise Barred(Problem(where, f"the hub refuses the token: {_first_line(error)}", f"{own_tool} again")) from error
        for met in (error, error.__cause__):  # ModelScope's client wraps some of them as errors of the network
            if isinstance(met, OSError) and met.errno in OF_THE_DISK:
                raise met from None
        fix = f"look at the connection, then {then}"
        raise Unreachable(Problem(where, f"the hub does not answer: {_first_line(error)}", fix)) from error


@contextmanager
def _writing(repo: str, log_in: str, then: str) -> Iterator[None]:
    """As `_told`; whoever is refused while writing lacks a token that may write, not access to what can be read."""
    from huggingface_hub import errors as hf
    from modelscope_hub import errors as ms

    fix = f"log in with a token that may write there (`{log_in}`), then {then}"
    with _told(repo, "", then=then):
        try:
            yield
        except (hf.LocalTokenNotFoundError, ms.AuthenticationError, ms.PermissionDeniedError) as error:
            raise _problem(repo, f"may not be written to: {_first_line(error)}", fix) from error
        except hf.HfHubHTTPError as error:
            if error.response.status_code not in (401, 403) and not isinstance(error, hf.RepositoryNotFoundError):
                raise
            raise _problem(repo, f"may not be written to: {_first_line(error)}", fix) from error
        except RuntimeError as error:  # ModelScope's client, after several batches that did not arrive
            raise Unreachable(Problem(repo, f"the upload stopped: {_first_line(error)}", f"wait a little, then {then}")) from error


def _problem(where: str, what: str, fix: str) -> UserError:
    return UserError(Problem(where, what, fix))


def _first_line(error: Exception) -> str:
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])[:200]
