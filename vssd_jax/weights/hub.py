"""Files of the Hugging Face hub."""

from pathlib import Path

from vssd_jax.errors import UserError

SCHEME = "hf://"


def download(uri: str) -> Path:
    """The file that `hf://owner/repo/file` names, from huggingface_hub's cache or the hub.

    Raises:
      UserError: another form, and a file that cannot be downloaded.
    """
    owner, _, rest = uri.removeprefix(SCHEME).partition("/")
    repo, _, file = rest.partition("/")
    if not (owner and repo and file):
        raise UserError(f"{uri}: write hf://owner/repo/file")
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(f"{owner}/{repo}", file))
    except Exception as error:  # each of its transports raises errors of its own
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{uri} cannot be downloaded: {type(error).__name__}: {reason}") from error
