"""Publishes weights on the Hugging Face hub."""

import json
import os
import tempfile
from pathlib import Path

from vssd_jax.weights import hub
from vssd_jax.weights.convert import with_names
from vssd_jax.weights.folder import ARRAYS, CONFIG, write_folder
from vssd_jax.weights.load import load
from vssd_jax.weights.model_card import model_card

CARD = "README.md"


def push(
    source: str | os.PathLike,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    license: str | None = None,
    message: str | None = None,
) -> str:
    """Uploads weights as a weights folder with a model card, in one commit.

    The files of a weights folder are uploaded as they are; other weights are converted first. A
    card that is on the hub already is replaced.

    Args:
      source: what `vssd_jax.weights.load.load` reads.
      repo: owner/name; created if it is not there.
      private: whether only its owner sees the repository.
      revision: the branch, created if it is not there; None is the main branch.
      license: of the weights, by the hub's identifier, as "apache-2.0"; None leaves it open.
      message: of the commit.

    Returns:
      A line that says what was uploaded and where it is.

    Raises:
      UserError: what `load` and `vssd_jax.weights.hub.upload` raise.
    """
    hub.check_upload(repo)
    address = hub.Address(repo, revision).uri()
    weights = load(source)
    note = ""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(source)
        if not all((folder / name).is_file() for name in (ARRAYS, CONFIG)):
            folder = Path(scratch) / "weights"
            weights, note = with_names(weights)
            write_folder(folder, weights)
        config = json.loads((folder / CONFIG).read_text())
        card = model_card(config, address, license=license)
        url = hub.upload(
            repo,
            {CONFIG: folder / CONFIG, ARRAYS: folder / ARRAYS, CARD: card.encode()},
            message=message or f"Weights of {weights.model}",
            private=private,
            revision=revision,
        )
    return f"{weights.model} from {os.fspath(source)} -> {address} ({url}){note}"
