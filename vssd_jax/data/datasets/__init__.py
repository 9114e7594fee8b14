"""One module per dataset, called as `config.dataset` calls it; see `vssd_jax.data.registry`."""
