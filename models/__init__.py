"""Networks, losses and metrics on tf-models-official."""
