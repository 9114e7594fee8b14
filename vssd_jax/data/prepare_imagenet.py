"""Makes array_record files of ImageNet-1K from its archives, with TensorFlow Datasets' own builder.

    pip install 'vssd_jax[imagenet]'
    python -m vssd_jax.data.prepare_imagenet --manual-dir archives --data-dir data

`archives` holds ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar from https://image-net.org. It
takes about an hour and 160 GB beside the archives. Only this command needs TensorFlow: training
and evaluation read the files without it.
"""

import argparse
import importlib.util
import os
import pathlib
import shutil
import sys

from vssd_jax.data.datasets.imagenet2012 import prepared_folder
from vssd_jax.errors import UserError

ARCHIVES = ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")


def prepare(manual_dir: str | os.PathLike, data_dir: str | os.PathLike) -> pathlib.Path:
    """Prepares `imagenet2012` unless it is there already; returns its folder.

    An interrupted run leaves nothing that looks complete, and can be repeated.

    Raises:
      UserError: TensorFlow or an archive is missing, or the disk is too full.
    """
    manual_dir, data_dir = pathlib.Path(manual_dir), pathlib.Path(data_dir)
    folder = prepared_folder(data_dir)
    if folder is not None:
        print(f"Already prepared: {folder}")
        return folder
    missing = [name for name in ARCHIVES if not (manual_dir / name).is_file()]
    if missing:
        raise UserError(
            f"Missing in {manual_dir}: {' and '.join(missing)}. Register at "
            "https://image-net.org/download-images and put the archives there."
        )
    absent = [m for m in ("tensorflow", "importlib_resources") if not importlib.util.find_spec(m)]
    if absent:
        raise UserError(
            f"Preparing ImageNet needs {' and '.join(absent)}: `pip install 'vssd_jax[imagenet]'`."
        )
    data_dir.mkdir(parents=True, exist_ok=True)
    # The builder's temporary copy shrinks as the final files grow.
    needed = int(1.1 * sum((manual_dir / name).stat().st_size for name in ARCHIVES))
    free = shutil.disk_usage(data_dir).free
    if free < needed:
        raise UserError(
            f"{data_dir} has {free / 1e9:.0f} GB free, about {needed / 1e9:.0f} GB are needed."
        )

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow_datasets as tfds

    builder = tfds.builder("imagenet2012", data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(manual_dir=manual_dir)
    )
    folder = prepared_folder(data_dir)
    assert folder is not None
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vssd_jax.data.prepare_imagenet", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--manual-dir", required=True, help="folder with the two archives")
    parser.add_argument("--data-dir", required=True, help="where imagenet2012/ is to be written")
    arguments = parser.parse_args()
    try:
        folder = prepare(arguments.manual_dir, arguments.data_dir)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"imagenet2012 is ready in {folder}. Train with --config.data_dir={arguments.data_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
