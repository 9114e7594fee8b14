"""Publishes weights on the Hugging Face hub, with a model card.

    python -m vssd_jax.hub push --weights runs/pets --repo owner/pets [--private]
        [--revision BRANCH] [--license apache-2.0] [--message TEXT]

`--weights` takes a weights folder, a .pth file, the workdir of a training run, or an hf:// address.
The token is that of `hf auth login` or HF_TOKEN. Afterwards hf://owner/pets are weights everywhere.
"""

from absl import flags

from vssd_jax import cli
from vssd_jax.errors import UserError

WEIGHTS = flags.DEFINE_string("weights", None, "What to upload, see above.")
REPO = flags.DEFINE_string("repo", None, "owner/name on the hub; created if it is not there.")
PRIVATE = flags.DEFINE_bool("private", False, "Let only the owner see the repository.")
REVISION = flags.DEFINE_string("revision", None, "A branch; default: the main branch.")
LICENSE = flags.DEFINE_string("license", None, "Of the weights, by the hub's name: apache-2.0.")
MESSAGE = flags.DEFINE_string("message", None, "Of the commit.")


def main() -> None:
    if WEIGHTS.value is None or REPO.value is None:
        raise UserError("--weights and --repo are needed; see --help")
    from vssd_jax.weights.publish import push

    print(
        push(
            WEIGHTS.value,
            REPO.value,
            private=PRIVATE.value,
            revision=REVISION.value,
            license=LICENSE.value,
            message=MESSAGE.value,
        )
    )


if __name__ == "__main__":
    cli.run(main, "__main__", command="push")
