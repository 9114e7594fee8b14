"""The networks. Importing the package registers the families of models that it holds."""

from vssd_jax.models import mask_rcnn, upernet, vssd  # noqa: F401
