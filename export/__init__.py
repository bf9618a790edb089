"""SavedModels that take raw data, their model cards, and a client that calls them."""
