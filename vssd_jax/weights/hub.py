"""The Hugging Face hub: addresses, downloads and uploads, through huggingface_hub.

So its settings hold: HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT, HF_TOKEN.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import quote, unquote

from vssd_jax.errors import UserError
from vssd_jax.weights.folder import ARRAYS, CONFIG

SCHEME = "hf://"
# Names that end so are files; others are first looked for as folders.
_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


class Address(NamedTuple):
    """A place on the hub.

    Attributes:
      repo: owner/name.
      revision: a branch, a tag or a commit; None is the main branch.
      name: of a file or folder in the repository; "" is the repository itself.
    """

    repo: str
    revision: str | None = None
    name: str = ""

    def uri(self) -> str:
        """What `parse` reads."""
        revision = self.revision or ""
        if revision and not revision.startswith("refs/"):
            revision = quote(revision, safe="")
        return f"{SCHEME}{self.repo}{revision and '@'}{revision}{self.name and '/'}{self.name}"


def parse(uri: str) -> Address:
    """The parts of `hf://owner/repo[@revision][/name]`; a UserError if it has another form.

    A slash inside of a revision is written %2F, but for those that start with `refs/`.
    """
    match = re.fullmatch(
        r"hf://([^/@\s]+/[^/@\s]+)(?:@(refs/[^/\s]+/[^/\s]+|[^/\s]+))?(?:/(.*))?", uri
    )
    if match is None:
        raise UserError(
            f"{uri}: write hf://owner/repo/file, or hf://owner/repo for a weights folder; "
            "@revision may follow the repo"
        )
    repo, revision, name = match.groups()
    return Address(repo, revision and unquote(revision), (name or "").strip("/"))


def download(uri: str) -> Path:
    """The file or weights folder that an address names, from the cache or the hub.

    Args:
      uri: `hf://owner/repo[@revision]/file`; or `hf://owner/repo[@revision]`, perhaps with a folder
        behind it, for a `config.json` and the `model.safetensors` beside it, both of one commit.

    Raises:
      UserError: another form, and what cannot be downloaded.
    """
    address = parse(uri)
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def fetch(name: str, revision: str | None) -> Path:
        return Path(huggingface_hub.hf_hub_download(address.repo, name, revision=revision))

    folder = PurePosixPath(address.name)
    try:
        if folder.suffix.lower() in _SUFFIXES:
            return fetch(address.name, address.revision)
        try:
            config = fetch(str(folder / CONFIG), address.revision)
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError):  # the hub was not asked
                raise
            if not address.name:
                raise UserError(
                    f"{uri} is no weights folder: it has no {CONFIG}; to take one of its files, "
                    "write hf://owner/repo/file"
                ) from error
            return fetch(address.name, address.revision)
        # The commit is in the path. The branch may move on between the two downloads.
        fetch(str(folder / ARRAYS), config.parents[len(folder.parts)].name)
        return config.parent
    except UserError:
        raise
    except Exception as error:  # each of its transports raises errors of its own
        raise UserError(f"{uri} cannot be downloaded: {_reason(error, address)}") from error


def check_upload(repo: str) -> None:
    """Finds out what can be known without the hub; a UserError if no upload is possible."""
    if not re.fullmatch(r"[^/\s]+/[^/\s]+", repo):
        raise UserError(f"--repo={repo}: write owner/name")
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        if constants.HF_HUB_OFFLINE:
            raise UserError("nothing can be uploaded: HF_HUB_OFFLINE is set")
        token = get_token()
    except UserError:
        raise
    except Exception as error:  # a bad name, or a login service that does not answer
        raise UserError(f"{repo}: {_shortened(error)}") from error
    if token is None:
        raise UserError(f"nothing can be uploaded without a token: {_LOGIN}")


def upload(
    repo: str,
    files: Mapping[str, Path | bytes],
    *,
    message: str,
    private: bool = False,
    revision: str | None = None,
) -> str:
    """Uploads files as one commit, so that all of them are there or none.

    Args:
      repo: owner/name; created if it is not there.
      files: name in the repository -> the file on disk, or its content.
      message: of the commit.
      private: whether only its owner sees the repository.
      revision: the branch, created if it is not there; None is the main branch.

    Returns:
      The address of the commit's web page.

    Raises:
      UserError: a repository that exists and is public though `private` is given, no right to
        write, and a hub that cannot be reached.
    """
    check_upload(repo)
    import huggingface_hub

    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.repo_info(repo).private:
            raise UserError(f"{repo} exists and is public: nothing was uploaded")
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo, branch=revision, exist_ok=True)
        # upload_folder may make several commits.
        return api.create_commit(
            repo,
            [
                huggingface_hub.CommitOperationAdd(
                    name, content if isinstance(content, bytes) else str(content)
                )
                for name, content in files.items()
            ],
            commit_message=message,
            revision=revision,
        ).commit_url
    except UserError:
        raise
    except Exception as error:
        reason = _reason(error, Address(repo, revision))
        raise UserError(f"nothing was uploaded to {repo}: {reason}") from error


def _reason(error: Exception, address: Address) -> str:
    """What went wrong, in one line."""
    from huggingface_hub import errors

    causes = list(_causes(error))
    local = isinstance(error, errors.LocalEntryNotFoundError)
    if any(isinstance(cause, errors.OfflineModeIsEnabled) for cause in causes):
        return "HF_HUB_OFFLINE is set" + (", and the cache does not have it" if local else "")
    if local:
        return f"neither the hub gives it nor the cache ({_shortened(causes[:2][-1])})"
    responses = [getattr(cause, "response", None) for cause in causes]
    status = next((found.status_code for found in responses if found is not None), None)
    if isinstance(error, errors.GatedRepoError):
        return f"access to {address.repo} must be asked for on its page; then {_LOGIN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{address.repo} has no revision {address.revision!r}"
    if isinstance(error, errors.EntryNotFoundError):
        return f"{address.repo} has no such file at revision {address.revision or 'main'!r}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"there is no repository {address.repo}, or none that you may read (status {status}); "
            f"if it is private, {_LOGIN}"
        )
    if status == 401:
        return f"the hub does not accept the token (status 401); {_LOGIN}"
    if status == 403:
        owner = address.repo.partition("/")[0]
        return f"the token does not permit it (status 403); take one of {owner} that may write"
    if status is None and any(isinstance(cause, OSError) for cause in causes):
        return f"the hub cannot be reached ({_shortened(error)})"
    return _shortened(error)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _shortened(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
